"""States, figures and tables of run folders."""

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from jepa_kit.evaluation.health.states import STATES
from jepa_kit.evaluation.tables.run_list import TAIL, RunEntry, age, describe_runs, entry_of, find_runs
from jepa_kit.lock import holder_of, lock_file
from jepa_kit.tools.runs import main
from jepa_kit.training import train

ROOT = Path(__file__).parents[3]


def write_run(folder, *, logged=0, steps=100, saved=None, verdict=None, config=None, **last):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config or {"checkpoint": {"dir": None}}))
    (folder / "run.json").write_text(json.dumps({"steps": steps}))
    lines = [{"step": k, "loss": 1.0 - k / 1000, "images_per_second": 50.0 + k} for k in range(logged)]
    if verdict is not None:
        lines[len(lines) // 2]["eval/verdict"] = float(verdict)
    if lines:
        lines[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved is not None:
        (folder / f"checkpoint_{saved:08d}.pt").touch()
    return folder


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"logged": 100, "saved": 100}, "finished"),
        ({"logged": 40, "saved": 40}, "stopped"),
        ({"logged": 40, "saved": 20}, "failed"),
        ({"logged": 40}, "failed"),
        ({}, "failed"),
    ],
)
def test_states(tmp_path, options, state):
    found = entry_of(write_run(tmp_path / "run", **options))
    assert found.state == state
    assert found.step == options.get("logged", 0)
    assert found.checkpoint == options.get("saved")


def test_figures(tmp_path):
    found = entry_of(write_run(tmp_path / "run", logged=40, saved=40, verdict=2))
    assert (found.steps, found.loss, found.images_per_second) == (100, 1.0 - 39 / 1000, 89.0)
    assert (found.verdict, found.verdict_step) == (STATES[2], 21) == ("dimensional collapse", 21)
    assert datetime.now(timezone.utc) - datetime.fromisoformat(found.changed) < timedelta(minutes=5)


def test_the_last_lines_of_a_long_file(tmp_path):
    folder = write_run(tmp_path / "run", logged=40, saved=40)
    lines = (folder / "metrics.jsonl").read_text()
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": k, "loss": 0.5, "text": "x" * 200}) + "\n" for k in range(40, 9000))
        file.write('{"step": 9000, "lo')  # of a killed process
    assert (folder / "metrics.jsonl").stat().st_size > TAIL + len(lines)
    found = entry_of(folder)
    assert (found.step, found.loss) == (9000, 0.5)


def test_checkpoints_elsewhere(tmp_path):
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/checkpoint_00000040").mkdir()
    apart = {"checkpoint": {"dir": str(tmp_path / "apart")}}
    assert entry_of(write_run(tmp_path / "run", logged=40, config=apart)).state == "stopped"
    remote = {"checkpoint": {"dir": "s3://bucket/run"}}
    assert entry_of(write_run(tmp_path / "far", logged=40, config=remote)).checkpoint is None


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("run.json", "{", "JSONDecodeError"),
        ("metrics.jsonl", "[1]\n", "ValueError: metrics.jsonl must have a mapping with a step in each line"),
        ("config.yaml", "a: [", "ParserError"),
    ],
)
def test_a_damaged_file(tmp_path, capsys, file, text, problem):
    folder = write_run(tmp_path / "run", logged=4)
    (folder / file).write_text(text)
    found = entry_of(folder)
    assert found.state == "unreadable"
    assert found.problem.startswith(problem)
    assert main([str(tmp_path)]) == 0
    assert f"{folder}: {problem}" in capsys.readouterr().out


HOLD = """
import sys, time
from pathlib import Path
from jepa_kit.lock import lock_file
with lock_file(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_run_in_another_process(tmp_path):
    folder = write_run(tmp_path / "run", logged=40, saved=40)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        found = entry_of(folder)
        assert (found.state, found.process) == ("running", holder_of(folder / ".lock"))
        assert found.process.startswith(f"process {process.pid} on ")
        process.kill()
        process.wait()
    assert (folder / ".lock").exists()  # a killed process leaves it, unlocked
    assert entry_of(folder).state == "stopped"
    with lock_file(folder / ".lock"):
        pass
    assert holder_of(folder / ".lock") is None


def test_runs_are_found(tmp_path):
    for name in ("a/run", "b", "b/inner", ".hidden/run"):
        write_run(tmp_path / name)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.yaml").touch()  # of something else
    assert list(find_runs(tmp_path)) == [tmp_path / "a/run", tmp_path / "b"]
    assert list(find_runs(tmp_path / "b")) == [tmp_path / "b"]


def test_a_real_run(tiny):
    found = entry_of(train(tiny("evaluate.every=3", "evaluate.samples=16")))
    assert (found.state, found.step, found.steps, found.checkpoint) == ("finished", 6, 6, 6)
    assert found.loss > 0
    assert found.images_per_second > 0
    assert found.verdict in STATES
    assert found.verdict_step == 6


NOW = datetime(2024, 5, 2, 12, tzinfo=timezone.utc)


def entry(name, state="stopped", **values):
    usual = {"step": 1500, "steps": 12000, "loss": 0.2345678, "images_per_second": 321.4, "verdict": "healthy"}
    changed = (NOW - timedelta(minutes=3)).isoformat()
    return RunEntry(
        run=f"/runs/{name}", state=state, checkpoint=None, verdict_step=None, changed=changed, **(usual | values)
    )


def test_the_table():
    unknown = entry("b", "failed", step=0, steps=None, loss=None, images_per_second=None, verdict=None)
    assert describe_runs([entry("a"), unknown], root="/runs", width=100, now=NOW) == (
        "run  state    step        loss    images/s  verdict  age\n"
        "a    stopped  1500/12000  0.2346  321       healthy  3 min\n"
        "b    failed   0                                      3 min"
    )


def test_long_names_are_cut_at_their_beginning():
    long = "study/" + "x" * 80 + "/seed_3"
    for width in (80, 100):
        lines = describe_runs([entry(long)], root="/runs", width=width, now=NOW).splitlines()
        assert max(map(len, lines)) == width
        assert lines[1].startswith("…x")
        assert "x/seed_3  stopped" in lines[1]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7300, "2 h"), (10**6, "11 d")])
def test_ages(seconds, text):
    assert age(NOW - timedelta(seconds=seconds), NOW) == text


def test_the_tool_sorts_and_selects(tmp_path, capsys):
    for k, (name, options) in enumerate(
        {
            "old": {"logged": 100, "saved": 100},
            "new": {"logged": 50, "saved": 50},
            "bad": {"logged": 90, "saved": 50},
        }.items()
    ):
        folder = write_run(tmp_path / name, **options)
        os.utime(folder / "metrics.jsonl", (time.time() - 1000 * (3 - k),) * 2)

    def names(*options):
        assert main([str(tmp_path), *options, "--json"]) == 0
        return [Path(found["run"]).name for found in json.loads(capsys.readouterr().out)]

    assert names() == ["bad", "new", "old"]
    assert names("--sort", "loss") == names("--sort", "step") == ["old", "bad", "new"]
    assert names("--sort", "name") == ["bad", "new", "old"]
    assert names("--sort", "state") == ["old", "new", "bad"]
    assert names("--state", "failed,finished") == ["bad", "old"]
    assert names("--state", "running") == []
    assert main([str(tmp_path), "--state", "running"]) == 0
    assert capsys.readouterr().out == f"no such run below {tmp_path}\n"
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("bad  failed    90/100 ")
    assert main([str(tmp_path), "--state", "done"]) == 2
    assert "--state (='done') must be one of running, finished, stopped, failed, unreadable" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere') must be a folder with runs in it or below, but is none" in capsys.readouterr().err
