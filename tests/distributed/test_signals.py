"""SIGTERM, SIGINT, SIGHUP and SIGUSR1: a run ends after a step, with a checkpoint, and goes on as if it had not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jepa_kit.distributed import signals
from jepa_kit.distributed.signals import EX_TEMPFAIL, Decision, Preempted, Signals, StopConsensus, requeue
from jepa_kit.engine import step as update
from jepa_kit.engine import train as training
from jepa_kit.engine.checkpoint.format import checkpoints
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.training import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def signalled(monkeypatch):
    """Sends this process a signal in a step."""

    def arm(number, at):
        count = iter(range(1000))
        plain = update.train_step

        def train_step(*args, **kwargs):
            if next(count) == at:
                os.kill(os.getpid(), number)
            return plain(*args, **kwargs)

        monkeypatch.setattr(update, "train_step", train_step)

    return arm


@pytest.fixture(autouse=True)
def _listening():
    """Signals are heard, also if the tests were started in the background or by nohup, which ignore two of them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_the_run_after_its_step(tiny, signalled, number, tmp_path, capfd):
    before = signal.getsignal(number)
    signalled(number, 1)
    config = tiny()
    folder = Path(config.train.output_dir)
    with pytest.raises(
        Preempted, match=f"stopped by {number.name} after 2 steps; the checkpoint is written, and --resume continues it"
    ) as stopped:
        train(config)
    assert stopped.value.number == number
    assert stopped.value.status == (130 if number == signal.SIGINT else EX_TEMPFAIL)
    assert signal.getsignal(number) == before
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000002.pt"]
    printed = capfd.readouterr()
    assert f"stopped: {folder}\n" in printed.out
    assert ("stopping after this step, with a checkpoint; Ctrl-C again" in printed.err) == (number == signal.SIGINT)
    train(config, resume=True)
    whole = train(tiny(f"train.output_dir={tmp_path / 'whole'}"))
    assert [line["loss"] for line in read_metrics(folder)] == [line["loss"] for line in read_metrics(whole)]


def test_a_signal_in_the_last_step_ends_nothing(tiny, signalled):
    signalled(signal.SIGTERM, 5)
    assert checkpoints(train(tiny()))[-1].name == "checkpoint_00000006.pt"


def test_the_second_signal_ends_the_process():
    script = (
        "import os, signal, sys, time\n"
        "from jepa_kit.distributed import signals\n"
        "signals.SAME = float(sys.argv[1])\n"
        "with signals.Signals() as heard:\n"
        "    for number in (signal.SIGUSR1, signal.SIGTERM):\n"
        "        os.kill(os.getpid(), number)\n"
        "        time.sleep(0.05)\n"
        "    print(heard.number == signal.SIGUSR1)\n"
    )
    for same, status in ((0.0, -signal.SIGTERM), (60.0, 0)):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script, str(same)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert done.stdout == ("" if status else "True\n")


@pytest.mark.parametrize(
    ("own", "others", "number", "words"),
    [
        (signal.SIGUSR1, [None], signal.SIGUSR1, "stopped by SIGUSR1 after 7 steps; "),
        (None, [signal.SIGUSR1], signal.SIGUSR1, "stopped by SIGUSR1 to another rank after 7 steps; "),
        (signal.SIGUSR1, [None, signal.SIGTERM], signal.SIGTERM, "stopped by SIGTERM to another rank after 7 steps; "),
        (signal.SIGHUP, [signal.SIGINT], signal.SIGINT, "stopped by SIGINT to another rank after 7 steps; "),
    ],
)
def test_ranks_agree_on_the_signal(monkeypatch, own, others, number, words):
    """SIGTERM counts: it may be that of scancel, and its job is not put into the queue again."""
    monkeypatch.setattr(signals, "all_gather_object", lambda value: [value, *others])
    stopped = signals.preempted(own, 7)
    assert stopped.number == number
    assert str(stopped).startswith(words)


def test_a_second_interrupt_aborts(tiny, monkeypatch):
    plain, calls = update.train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)

    monkeypatch.setattr(update, "train_step", train_step)
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert checkpoints(Path(config.train.output_dir)) == []


def test_an_interrupt_before_the_first_step_aborts(tiny, monkeypatch):
    monkeypatch.setattr(training, "build_run", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tiny())


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with Signals() as heard:
        os.kill(os.getpid(), signal.SIGHUP)
        assert heard.number is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_no_signal():
    with Signals() as heard:
        time.sleep(0.0)
    assert heard.number is None


def test_one_process_agrees_with_itself_at_once():
    consensus = StopConsensus()
    assert consensus.poll(1, False, False) is Decision.CONTINUE
    assert consensus.poll(1, False, True) is Decision.STOP
    assert consensus.poll(1, True, True) is Decision.FAILED
    assert consensus.wait() is Decision.CONTINUE


def test_requeue(tmp_path, monkeypatch):
    assert requeue({}) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="job 7 was not requeued: there is no scontrol here"):
        requeue({"SLURM_JOB_ID": "7"})
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > ' + str(tmp_path / "called") + "\n")
    scontrol.chmod(0o755)
    assert requeue({"SLURM_JOB_ID": "7"}) == "job 7 is requeued"
    assert (tmp_path / "called").read_text() == "requeue 7\n"
    scontrol.write_text("#!/bin/sh\necho 'Invalid job id' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="job 7 was not requeued: Invalid job id"):
        requeue({"SLURM_JOB_ID": "7"})


def test_the_status_is_documented():
    assert EX_TEMPFAIL == os.EX_TEMPFAIL == 75


@pytest.mark.integration
def test_all_ranks_stop_at_one_step(tiny, torchrun, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, sys\n"
        "from jepa_kit.config import load_config\n"
        "from jepa_kit.distributed.collectives import read_environment\n"
        "from jepa_kit.engine import step as update\n"
        "from jepa_kit.training import train\n"
        "from jepa_kit.distributed.signals import Preempted\n"
        "plain, calls = update.train_step, []\n"
        "def train_step(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and read_environment().rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return plain(*args, **kwargs)\n"
        "update.train_step = train_step\n"
        "try:\n"
        "    train(load_config(sys.argv[1]))\n"
        "except Preempted as stopped:\n"
        "    sys.stdout.write(f'STOPPED {len(calls)} {stopped}\\n')  # at once: two processes write to one pipe\n"
        "    sys.stdout.flush()\n"
    )
    config = tiny("train.epochs=8")
    config.save(tmp_path)
    printed = torchrun(2, script, tmp_path / "config.yaml").stdout
    assert printed.count("STOPPED 9 stopped by ") == 2  # asked at step 4, answered at step 8
    assert "STOPPED 9 stopped by SIGTERM after 9 steps; " in printed
    assert "STOPPED 9 stopped by SIGTERM to another rank after 9 steps; " in printed
    assert checkpoints(Path(config.train.output_dir))[-1].name == "checkpoint_00000009.pt"
