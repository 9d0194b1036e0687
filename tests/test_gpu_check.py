"""dev/gpu_check.py: stages that fail or take too long stop no other, and the summary has a line for each figure."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "dev"))

import gpu_check
import gpu_stages
from gpu_check import STAGES, Stage, describe, main, run_all

ROOT = Path(__file__).parents[1]


def stage(name, code, limit=30.0):
    """A stage that runs code with its result's path in ``file``."""
    text = f"import json, os, subprocess, sys, time\nfile = sys.argv[1]\n{code}"
    return Stage(name, limit, (sys.executable, "-c", text))


WRITES = "open(file, 'w').write(json.dumps({'rows': [['speed', '3 m/s']], 'data': {'speed': 3}}))\n"


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path, capsys):
    child = tmp_path / "child"
    hangs = (
        f"{WRITES}p = subprocess.Popen(['sleep', '60'])\nopen({str(child)!r}, 'w').write(str(p.pid))\ntime.sleep(60)"
    )
    stages = [
        stage("good", WRITES),
        stage("fails", "print('first'); sys.exit('no such device')"),
        stage("hangs", hangs, limit=6.0),
        stage("last", WRITES),
    ]
    begin = time.monotonic()
    results = run_all(stages, tmp_path / "out", total=100)
    assert time.monotonic() - begin < 30
    assert [r["status"] for r in results] == [
        "ok",
        "failed with exit status 1: no such device",
        "stopped after 6 s",
        "ok",
    ]
    assert [len(r["rows"]) for r in results] == [1, 0, 1, 1], "what was measured before the end is kept"
    status = Path("/proc", child.read_text(), "stat")

    def lives():
        return status.exists() and status.read_text().split()[2] not in "ZX"  # gone, or waiting to be reaped

    for _ in range(100):  # what a stage started ends with it
        if not lives():
            break
        time.sleep(0.1)
    assert not lives()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(
        [f"{k}_{s.name}.{end}" for k, s in enumerate(stages) for end in ("json", "log")] + ["summary.txt"]
    )
    stored = json.loads((tmp_path / "out" / "0_good.json").read_text())
    assert (stored["data"], stored["stage"], stored["status"]) == ({"speed": 3}, "good", "ok")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary == capsys.readouterr().out
    assert summary.count("    speed                              3 m/s\n") == 3


def test_no_stage_begins_when_the_time_is_up(tmp_path):
    results = run_all([stage("slow", "time.sleep(60)", limit=20), stage("late", WRITES)], tmp_path, total=2)
    assert [r["status"] for r in results] == ["stopped after 2 s", "not run: no time was left"]
    assert "late" in (tmp_path / "summary.txt").read_text()


def test_what_tests_found_is_kept_when_they_are_stopped(tmp_path, monkeypatch):
    lines = (
        "collected 4 items\n",
        "tests/a.py::one[cuda] PASSED [ 25%]\n",
        "tests/a.py::two[a b] FAILED [ 50%]\n",
        "tests/a.py::three SKIPPED (needs a package) [ 75%]\n",
        "E   x = 'PASSED'\n",
    )

    class Stopped(Exception):
        pass

    class Pytest:
        def __init__(self, *_, **__):
            self.stdout = self.lines()

        def lines(self):
            yield from lines
            raise Stopped

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(gpu_stages.subprocess, "Popen", Pytest)
    file = tmp_path / "tests.json"
    record = gpu_stages.Record(argparse.Namespace(device="cuda", small=False, images=None, end=0.0, file=file))
    with pytest.raises(Stopped):
        gpu_stages.tests(record)
    rows = [["failed", "tests/a.py::two[a b]"], ["tests", "1 passed, 1 failed, 1 skipped"]]
    assert json.loads(file.read_text()) == {"rows": rows, "data": {"failed": ["tests/a.py::two[a b]"]}}


def test_the_summary_of_a_stage():
    result = {"stage": "parity", "seconds": 3.25, "status": "ok", "rows": [["float64", "1e-15"]]}
    assert describe(result) == "parity        3.2 s  ok\n    float64                            1e-15"


def test_the_exit_status_and_the_limits(tmp_path, monkeypatch):
    seen = []

    def run(stages, out, total):
        seen.append((stages, total))
        return [{"status": "ok" if s.name != "parity" else "stopped after 1 s"} for s in stages]

    monkeypatch.setattr(gpu_check, "run_all", run)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main([str(tmp_path), "--device", "cuda", "--stages", "machine"]) == 0
    assert main([str(tmp_path), "--device", "cpu", "--small"]) == 1
    (on_cuda, total), (on_cpu, _) = seen
    assert [(s.name, s.limit) for s in on_cuda] == [("machine", STAGES["machine"])]
    assert total <= 600
    assert [s.name for s in on_cpu] == list(STAGES)
    assert "--small" in on_cpu[0].command


def test_a_folder_of_images_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--images", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert f"--images (={tmp_path / 'none'}) must be a folder of images" in capsys.readouterr().err


@pytest.mark.slow
def test_all_stages_on_a_cpu(tmp_path):
    """Every stage ends well with a figure, as on the day on which only the device is new."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "dev" / "gpu_check.sh"), str(tmp_path), "--device", "cpu", "--small"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for number, name in enumerate(STAGES):
        result = json.loads((tmp_path / f"{number}_{name}.json").read_text())
        assert result["status"] == "ok"
        assert result["rows"], name
        figures = [value for _, value in result["rows"] if value == "equal bits" or any(c.isdigit() for c in value)]
        assert figures, name
