"""One run at a time in a run folder: which processes are refused."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jepa_kit import lock
from jepa_kit.engine.checkpoint.format import checkpoints
from jepa_kit.lock import only_run_in
from jepa_kit.training import train

ROOT = Path(__file__).parents[3]

HOLDER = """
import os, sys, time
from pathlib import Path
from jepa_kit.lock import only_run_in

with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # a loader worker, which outlives it for a while
        time.sleep(600)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Start another process that locks a folder until its stdin is closed, and return it."""
    started = []

    def start(folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", HOLDER, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_signal_ends_a_start_that_waits(tiny, tmp_path, hold):
    config = tiny()
    hold(Path(config.train.output_dir))
    file = config.save(tmp_path)
    script = "import sys; from jepa_kit.config import load_config; from jepa_kit.training import train\n"
    script += "train(load_config(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(file)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("waiting up to 120 s for process ")
        process.terminate()
        assert process.wait(timeout=100) == -signal.SIGTERM


def test_a_second_run_in_a_folder(tiny, tmp_path, hold, monkeypatch, capsys):
    monkeypatch.setattr(lock, "TIMEOUT", 1.0)
    run = train(tiny("checkpoint.every=2"))
    other = hold(run)
    (run / ".checkpoint_00000008.pt.part").write_text("the other is writing it")
    message = rf"train.output_dir \(='{run}'\) is in use by process {other.pid} on \S+: wait for that run, end it, or"
    with pytest.raises(ValueError, match=message):
        train(tiny("checkpoint.every=2"), resume=True, resume_from=str(run / "checkpoint_00000004.pt"))
    assert [path.name for path in checkpoints(run)] == ["checkpoint_00000004.pt", "checkpoint_00000006.pt"]
    assert (run / ".checkpoint_00000008.pt.part").exists()
    other.kill()
    other.wait()
    train(tiny("checkpoint.every=2"), resume=True)  # nothing is left behind, though the worker is still there
    assert "resumed at step 6\n" in capsys.readouterr().out
    assert not (run / ".lock").exists()


def test_one_that_is_on_its_way_out_is_waited_for(tmp_path, hold, monkeypatch, capsys):
    other, plain = hold(tmp_path / "run"), time.sleep

    def sleep(seconds):
        other.stdin.close()  # it ends while it is waited for
        plain(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    with only_run_in(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert capsys.readouterr().out.startswith(f"waiting up to 120 s for process {other.pid} on ")


def test_a_lock_whose_machine_is_gone(tmp_path, hold):
    """A file server may keep the lock: the file is deleted by hand, and the next run locks a new one."""
    other = hold(tmp_path)
    (tmp_path / ".lock").unlink()
    with only_run_in(tmp_path):
        other.stdin.close()
        assert other.wait() == 0
        assert (tmp_path / ".lock").exists()


def test_a_start_that_fails_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file nothing.pth"):
        train(tiny(f"train.output_dir={tmp_path / 'a' / 'b'}"), resume=True, resume_from="nothing.pth")
    assert not (tmp_path / "a").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with only_run_in(tmp_path):
        pass
    told = capsys.readouterr().out
    assert told == f"note: {tmp_path} has no locks (No locks available); make sure that no other run is started there\n"
