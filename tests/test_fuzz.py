"""dev/fuzz.py: a short run finds nothing, and the runner finds whatever it is to find."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEV = Path(__file__).parents[1] / "dev"


@pytest.mark.integration
def test_a_hundred_cases():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DEV / "fuzz.py"), "--cases", "100", "--processes", "1", "--limit", "120"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert int(table[-1][1]) >= 100
    assert int(table[-1][4]) == 0


@pytest.fixture
def fuzz(monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz", DEV / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz", module)
    spec.loader.exec_module(module)
    return module


def test_what_the_runner_finds(fuzz, capsys):
    """Of seven cases one is fine, one is refused, and five fail; the worker goes on after a hang and a death."""

    def refused():
        from jepa_kit.config.load import parse_yaml

        parse_yaml("[", "x")

    def harmed():
        raise fuzz.Harmed("another number")

    calls = {
        "fine": lambda: None,
        "refused": refused,
        "foreign": lambda: int("x"),
        "bug": lambda: {}["x"],
        "harmed": harmed,
        "hang": lambda: time.sleep(60),
        "death": lambda: os._exit(3),
    }
    status = fuzz.main(
        ["--cases", "7", "--processes", "1", "--limit", "1.5"], {"some": lambda seed: iter(calls.items())}
    )
    printed = capsys.readouterr().out
    assert status == 1
    assert printed.splitlines()[-2].replace(" ", "") == "all|7|1|1|5"
    for text in ("foreign\nTraceback", "bug\nTraceback", "harmed\naccepted: another number", "hang\nno answer for 2 s"):
        assert text in printed
    assert "death\nits process died with status 3" in printed
    assert "--- some:0:2  foreign" in printed


def test_damage_is_damage(fuzz):
    import random

    data = bytes(range(256)) * 4
    ways = [fuzz.damaged(data, random.Random(seed)) for seed in range(200)]
    assert ways == [fuzz.damaged(data, random.Random(seed)) for seed in range(200)]
    assert len({how.split()[0] for how, _ in ways}) == 9
    assert sum(changed != data for _, changed in ways) > 190
