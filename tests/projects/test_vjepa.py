"""V-JEPA 2: the check passes on the recording and sees faults; the config is that of the check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.trials.recorded import Recorded, Report
from projects.vjepa import check

CONFIGS = Path(__file__).parents[2] / "projects/vjepa/configs"


def test_the_recording_is_reproduced(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(fixtures / "methods/vjepa2"), "--tolerance", "1e-12"]) == 0
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-4, "normalised tokens"),
        ("num_heads", 1, "normalised tokens"),
        ("predictor_num_heads", 3, "prediction of configuration 0"),
        ("loss_exp", 2.0, "loss"),
    ],
)
def test_another_setting_is_seen(altered: Any, key: str, value: Any, failed: str) -> None:
    report = Report()
    check.check(altered("vjepa2", key, value), report)
    assert report.failed[0] == failed


def test_videos_are_refused(altered: Any) -> None:
    with pytest.raises(ValueError, match=r"num_frames \(=4\) must be tubelet_size \(=2\)"):
        check.check(altered("vjepa2", "num_frames", 4), Report())


def test_a_recording_with_tables_of_positions_needs_them(altered: Any) -> None:
    with pytest.raises(ValueError, match="has no tensor 'encoder/pos_embed'"):
        check.check(altered("vjepa2", "use_rope", False), Report())


def test_another_exponent_of_the_loss() -> None:
    errors = torch.tensor([[-2.0, 0.5], [0.0, 1.5]], dtype=torch.float64)
    expected = [sum(abs(e) ** 1.5 / 1.5 for e in row) / 2 for row in errors.tolist()]
    values = check.RecordedPower(exponent=1.5).values(errors + 3.0, torch.full_like(errors, 3.0))
    assert values.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_check_builds_the_config_of_the_project(fixtures: Path, same_parts: Any) -> None:
    recording = check.config_of(Recorded(fixtures / "methods/vjepa2").meta, 2)
    same_parts(recording, load_config(CONFIGS / "in1k_vitl16.yaml"))
