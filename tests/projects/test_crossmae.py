"""CrossMAE: the check passes on the recording and sees faults; the config has the settings of the release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.structures import View
from jepa_kit.trials.recorded import Recorded, Report
from projects.crossmae import check

PROJECT = Path(__file__).parents[2] / "projects/crossmae"


def test_the_recording_is_reproduced(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(fixtures / "methods/crossmae"), "--tolerance", "1e-12"]) == 0
    out = capsys.readouterr().out
    assert "not read" not in out
    for quantity in ("outputs of blocks", "mixes", "target", "prediction", "loss", "gradients"):
        assert f"\n{quantity} " in out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-4, "outputs of blocks"),
        ("num_heads", 2, "outputs of blocks"),
        ("decoder_num_heads", 2, "prediction"),
        ("norm_pix_loss", False, "target"),
        ("used_feature_maps", [1, 0, 2], "outputs of blocks"),
    ],
)
def test_another_setting_is_seen(altered: Any, key: str, value: Any, failed: str) -> None:
    report = Report()
    check.check(altered("crossmae", key, value), report)
    assert report.failed[0] == failed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("self_attn", True, "self_attn must be false, as in the released runs"),
        ("decoder_depth", 1, "weights of one side alone: predictor.blocks.1.cross_attn.k.bias"),
    ],
)
def test_refuses(altered: Any, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check.check(altered("crossmae", key, value), Report())


def test_all_hidden_patches_may_be_predicted(altered: Any) -> None:
    config = check.config_of(altered("crossmae", "kept_mask_ratio", 0.75).meta)
    assert config.slots["masker"].name == "random"


def test_the_check_builds_the_config_of_the_project(fixtures: Path, same_parts: Any) -> None:
    recording = check.config_of(Recorded(fixtures / "methods/crossmae").meta)
    shipped = load_config(PROJECT / "configs/in1k_vitb16.yaml")
    same_parts(recording, shipped, without=("masker",), options=("layers",))
    assert recording.slots["masker"].name == shipped.slots["masker"].name
    assert recording.slots["masker"].options["fraction"] == pytest.approx(1 / 3)


def test_the_config_has_the_sizes_of_the_release() -> None:
    config = load_config(PROJECT / "configs/in1k_vitb16.yaml")
    masks = build_masker(config)(np.arange(2), seed=0, epoch=0)
    assert list(masks.context.lengths) == list(masks.targets.lengths) == [49, 49]
    with torch.device("meta"):
        recipe: Any = build_recipe(config)
    assert list(recipe.predictor.mix.shape) == [12, 13]
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (recipe.encoder, recipe.predictor)]
    assert f"| {counts[0]:.1f} M / {counts[1]:.1f} M |" in (PROJECT / "README.md").read_text()


def test_every_block_attends_to_a_mix_of_its_own_that_is_trained() -> None:
    """The mix of each block has a gradient at every layer of the encoder, the input of the first block included."""
    torch.manual_seed(0)
    config = load_config(PROJECT / "configs/quick.yaml")
    recipe: Any = build_recipe(config)
    masks = build_masker(config)(np.arange(4), seed=0, epoch=0)
    recipe(View(torch.randn(4, 3, 64, 64), masks)).loss.backward()
    assert recipe.predictor.mix.grad.shape == (2, 5)
    assert (recipe.predictor.mix.grad != 0).all()
