"""Images with unlike numbers of target sets: two processes, and parts of a batch, train as one process on the whole."""

import pytest

from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.training import train

SCRIPT = """
import sys

from jepa_kit.config import load_config
from jepa_kit.training import train

train(load_config(sys.argv[1], sys.argv[2:]))
"""
MASKS = (
    "masker={name: mixture, maskers: [{name: multiblock}, {name: block}, {name: rasterized}]}",
    "encoder.drop_path=0.0",
)


def numbers(folder):
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(folder)]


@pytest.fixture
def alone(tiny, tmp_path):
    """(loss, norm of the gradients) of each step of one process on whole batches."""
    found = numbers(train(tiny(*MASKS, f"train.output_dir={tmp_path / 'alone'}")))
    assert len(found) == 6
    return found


def test_parts_of_a_batch(tiny, alone):
    for found, wanted in zip(numbers(train(tiny(*MASKS, "train.accumulate=2"))), alone, strict=True):
        assert found == pytest.approx(wanted, rel=0, abs=1e-6)


@pytest.mark.integration
def test_two_processes(tiny, alone, ranks, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "two"
    ranks(2, script, tiny(*MASKS).save(tmp_path), f"train.output_dir={folder}")
    for found, wanted in zip(numbers(folder), alone, strict=True):
        assert found == pytest.approx(wanted, rel=0, abs=1e-6)
