"""dev/torture.py, short: a run that is killed again and again is the run that was not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[2] / "dev" / "torture.py"


def run(*options, timeout=900):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(TORTURE), *options], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights and moments" in done.stdout
    assert "are the same, bit for bit" in done.stdout
    return done.stdout


@pytest.fixture
def torture():
    spec = importlib.util.spec_from_file_location("torture", TORTURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
def test_three_kills_and_a_signal(ranks):
    printed = ranks(1, TORTURE, "--fork", "--kills", "3", "--signals", "2", "--steps", "18")
    assert "are the same, bit for bit" in printed
    assert printed.count("SIGKILL") == 3
    assert printed.count("SIGINT") == 1
    assert "writing a checkpoint" in printed


@pytest.mark.slow
def test_twenty_kills_of_real_processes():
    printed = run(timeout=3600)
    assert printed.count("SIGKILL") == 20


@pytest.mark.slow
def test_a_killed_rank_under_torchrun():
    printed = run("--processes", "2", "--kills", "3", "--steps", "24", timeout=3600)
    assert printed.count(", rank ") == 3


def test_what_shows_is_told(torture, tmp_path, monkeypatch):
    lines = {
        "one": [{"step": 0, "loss": 1.0, "data_wait": 0.1, "eval/seconds": 0.3}],
        "other": [{"step": 0, "loss": 1.5, "data_wait": 0.2, "eval/seconds": 0.4}],
    }
    monkeypatch.setattr(torture, "read_metrics", lambda folder: lines[folder.name])
    monkeypatch.setattr(
        torture, "load_checkpoint", lambda folder: type("C", (), {"step": 1, "model": {}, "optimizer": {}})()
    )
    assert torture.differences(tmp_path / "one", tmp_path / "other") == ["step 0: loss 1.0 and 1.5"]
    lines["other"].append({"step": 0, "loss": 1.0})
    assert "steps of the lines: 1 without stops, 2 with them" in torture.differences(
        tmp_path / "one", tmp_path / "other"
    )


def test_a_run_that_fails_says_why(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TORTURE), "--fork", "train.nope=1"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "train.nope is not an option" in done.stdout


def test_help_has_examples(torture, capsys):
    with pytest.raises(SystemExit) as stopped:
        torture.main(["--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out
