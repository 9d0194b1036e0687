"""The comparison of two recordings, and the recording in the repository; nothing is trained."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

DEV = Path(__file__).parents[2] / "dev"
RECORD = DEV / "record.py"
BEFORE = DEV / "recordings" / "before.json"
BITS, OTHER_BITS = "a" * 64, "b" * 64

LOSS = ("training", "fsdp", "lines", 1, "loss")
SMALL = {
    "machine": {"commit": "1234567", "torch": "2.0"},
    "training": {
        "fsdp": {
            "config": {"train.seed": 0},
            "lines": [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}],
            "state": {"model": {"encoder.norm.bias": f"{BITS} norm 2.0"}},
        }
    },
    "masks": {"random 14x14": BITS},
    "protocols": {"knn": {"target shape accuracy": {"accuracy": 0.5}}, "linear": {}},
}


def compared(tmp_path, one, other):
    """Return (exit status, lines of what was printed, errors) of ``record.py --compare``."""
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    for file, content in zip(files, (one, other), strict=True):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    done = subprocess.run([sys.executable, str(RECORD), "--compare", *map(str, files)], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (LOSS, 0.375, "training.fsdp.lines.1.loss: 0.25 and 0.375 differ by 1.2e-01"),
        (LOSS, 0.25 + 2**-54, "training.fsdp.lines.1.loss: 0.25 and 0.25000000000000006 differ by 5.6e-17"),
        (LOSS, float("nan"), "training.fsdp.lines.1.loss: 0.25 and nan differ by nan"),
        (("training", "fsdp", "lines", 1, "step"), 2, "training.fsdp.lines.1.step: 1 and 2"),
        (("training", "fsdp", "lines"), [], "training.fsdp.lines: 2 entries and 0"),
        (
            ("training", "fsdp", "state", "model", "encoder.norm.bias"),
            f"{OTHER_BITS} norm 2.5",
            "training.fsdp.state.model.encoder.norm.bias: other bits, norms 2.0 and 2.5 differ by 5.0e-01",
        ),
        (("masks", "random 14x14"), OTHER_BITS, f"masks.random 14x14: '{BITS}' and '{OTHER_BITS}'"),
        (("masks", "block 14x14"), BITS, "masks.block 14x14: only in the second"),
        (
            ("protocols", "knn", "target shape accuracy", "accuracy"),
            0.5 + 3e-12,
            "protocols.knn.target shape accuracy.accuracy: 0.5 and 0.500000000003 differ by 3.0e-12",
        ),
    ],
)
def test_a_difference_is_named_with_its_size(tmp_path, place, value, line):
    other = copy.deepcopy(SMALL)
    part = other
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    assert compared(tmp_path, SMALL, other) == (1, [line, "1 differences"], "")


@pytest.mark.parametrize("section", ["training", "masks", "protocols"])
def test_a_missing_section_or_protocol_is_a_difference(tmp_path, section):
    other = {name: part for name, part in SMALL.items() if name != section}
    assert compared(tmp_path, SMALL, other)[:2] == (1, [f"{section}: only in the first", "1 differences"])
    assert compared(tmp_path, other, SMALL)[:2] == (1, [f"{section}: only in the second", "1 differences"])


def test_rounding_of_protocols_another_machine_and_names_of_options_are_no_difference(tmp_path):
    other = copy.deepcopy(SMALL)
    other["protocols"]["knn"]["target shape accuracy"]["accuracy"] += 5e-13
    other["machine"]["torch"] = "2.1"
    other["training"]["fsdp"]["config"] = {"train.seed": 1}
    notes = ["note: machine.torch: '2.0' and '2.1'", "note: training.fsdp.config.train.seed: 0 and 1"]
    assert compared(tmp_path, SMALL, other) == (0, [*notes, "no difference"], "")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "one.json is no recording of record.py: it has no 'machine'"), ("{", "one.json is no recording")],
)
def test_a_file_that_is_no_recording(tmp_path, content, message):
    status, lines, error = compared(tmp_path, content, SMALL)
    assert (status, lines) == (2, [])
    assert message in error


def test_the_recording_in_the_repository_is_whole():
    content = json.loads(BEFORE.read_text())
    for run in content["training"].values():
        assert [line["step"] for line in run["lines"]] == list(range(32))
        moments = {f"{name}.{key}" for name, state in run["state"]["optimizer"].items() for key in state}
        assert len(moments) == 3 * len(run["state"]["optimizer"]) > 0
    assert content["order"]["batches"]["1 rank, no worker"] == content["order"]["batches"]["2 ranks, 3 workers each"]
    assert all(figures for figures in content["protocols"].values())
    assert BEFORE.stat().st_size < 200_000
    assert {*content["machine"]} >= {"commit", "cpu", "instructions", "torch"}
