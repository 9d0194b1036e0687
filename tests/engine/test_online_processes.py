"""Evaluation inside a run of several processes: what one process gives."""

import pytest

from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.training import train


def evaluations(folder):
    """What each evaluation gave, without its time."""
    lines = [line for line in read_metrics(folder) if "eval/verdict" in line]
    return [{k: v for k, v in line.items() if k.startswith("eval/") and k != "eval/seconds"} for line in lines]


@pytest.mark.integration
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_evaluate_as_one(tiny, ranks, tmp_path, repository, parallel):
    one = train(tiny("encoder.drop_path=0.0", "evaluate.every=3", "evaluate.samples=16"))
    two, tool = tmp_path / "two", repository / "tools" / "train_net.py"
    ranks(2, tool, "--config-file", one / "config.yaml", "--output-dir", two, f"train.parallel={parallel}")
    assert len(evaluations(one)) == 2
    for ours, theirs in zip(evaluations(one), evaluations(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4)
