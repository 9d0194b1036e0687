"""data2vec: the check passes on the recording and sees faults; configs build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jepa_kit.config import load_config
from jepa_kit.training import train
from jepa_kit.trials.recorded import Recorded, Report
from projects.data2vec import check

CONFIGS = Path(__file__).parents[2] / "projects/data2vec/configs"


def test_the_recording_is_reproduced(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(fixtures / "methods/data2vec"), "--tolerance", "1e-12"]) == 0
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-4, "layers of the target encoder"),
        ("target_layers", [1, 2], "targets"),
        ("l1_beta", 0.5, "gradients"),
        ("warmup_epochs", 0, "learning rates"),
        ("ema_start_at", 2, "momenta"),
        ("ema_start_at", 0, "momenta"),
        ("no_weight_decay", [], "weight decay"),
        ("clip_grad", 0.1, "loss"),
        ("weight_decay", 0.5, "loss"),
    ],
)
def test_another_setting_is_seen(altered: Any, key: str, value: Any, failed: str) -> None:
    report = Report()
    check.check(altered("data2vec", key, value), report)
    assert report.failed[0] == failed


def test_targets_that_are_not_built_are_refused(altered: Any) -> None:
    with pytest.raises(ValueError, match=r"settings other than those of the released run for B: l2_loss \(=True\)"):
        check.check(altered("data2vec", "l2_loss", True), Report())


def test_the_ramp_of_the_momentum_ends_with_an_epoch() -> None:
    """The released rule, for 3 updates an epoch: the last value of a ramp over 5 updates stays for the sixth."""
    steps = {
        start: [check.momentum_step(i, {"ema_start_at": start, "iterations_per_epoch": 3}) for i in range(8)]
        for start in (0, 3, 5)
    }
    assert steps == {0: [0, 1, 2, 3, 4, 5, 6, 7], 3: [0, 1, 2, 2, 2, 2, 6, 7], 5: [0, 1, 2, 3, 4, 4, 6, 7]}


def test_the_check_builds_the_config_of_the_project(fixtures: Path, same_parts: Any) -> None:
    recording = check.config_of(Recorded(fixtures / "methods/data2vec").meta)
    shipped = load_config(CONFIGS / "in1k_vitb16.yaml")
    same_parts(recording, shipped, without=("masker", "target_update"), options=("layers", "layer_scale"))
    for key in ("counting", "betas", "weight_decay", "start_lr", "final_lr", "clip_grad"):
        assert getattr(recording.optim, key) == getattr(shipped.optim, key)


@pytest.mark.integration
def test_a_run(shards: Path, tmp_path: Path) -> None:
    small = ["data.image_size=16", "encoder.patch_size=4", "encoder.embed_dim=12", f"data.shards={shards}"]
    run = ["train.batch_size=10", "train.epochs=2", f"train.output_dir={tmp_path}/run", "train.device=cpu"]
    train(load_config(CONFIGS / "quick.yaml", [*small, *run]))
    assert (tmp_path / "run/checkpoint_00000004.pt").exists()
