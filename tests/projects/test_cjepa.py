"""C-JEPA: VICReg against recorded numbers, and a config that is I-JEPA's but for one term of the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regulariser_recordings as recordings
import torch

from jepa_kit.config import load_config
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.losses import VICReg
from jepa_kit.structures import View
from projects.cjepa.check import main

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "methods" / "vicreg"


def test_recorded_numbers(capsys):
    assert main([str(FIXTURE), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    assert all(quantity in printed for quantity in ("invariance", "covariance", "gradient of y", "projector"))
    assert "num_batches_tracked" not in printed.partition("not read")[2]


def test_other_settings_and_a_wrong_one(tmp_path):
    path = recordings.vicreg(tmp_path / "other")
    assert main([str(path), "--tolerance", "1e-12"]) == 0
    content = json.loads(path.with_suffix(".json").read_text())
    content["meta"]["coefficients"][1] = 6.0
    path.with_suffix(".json").write_text(json.dumps(content))
    assert main([str(path)]) == 1


def test_the_config_is_that_of_ijepa_with_one_more_term():
    ours, theirs = (load_config(ROOT / f"projects/{name}/configs/in1k_vitb16.yaml") for name in ("cjepa", "ijepa"))
    assert ours.losses[0] == theirs.losses[0]
    (part, weight) = ours.losses[1]
    assert (part.name, weight) == ("vicreg", 0.001)
    assert [part.options[name] for name in ("invariance", "variance", "covariance")] == [25.0, 25.0, 1.0]
    mine, base = ours.to_dict(), theirs.to_dict()
    for config in (mine, base):
        del config["loss"], config["train"]["output_dir"]
    assert mine == base


def test_a_step_has_vicreg_of_each_block():
    """Predictions and targets averaged over each of the four blocks, and blocks of one number compared over images."""
    config = load_config(ROOT / "projects/cjepa/configs/quick.yaml", ["masker={name: multiblock, min_keep: 4}"])
    torch.manual_seed(0)
    recipe = build_recipe(config).train()
    images = torch.randn(3, 3, 64, 64)
    masks = build_masker(config)(torch.arange(3).numpy(), seed=0, epoch=0)
    out = recipe(View(images, masks))
    loss = recipe.losses["vicreg"]
    sets = masks.targets.image.tolist()
    parts = {}
    for name in ("prediction", "target"):
        pooled = [x.mean(0) for x in getattr(out.prediction, name).split(masks.targets.lengths.on_host)]
        by_image = [[x for x, image in zip(pooled, sets, strict=True) if image == k] for k in range(3)]
        rows = torch.stack([block for image in by_image for block in image])
        parts[name] = loss.projector(rows).unflatten(0, (3, -1))  # [B, V, D]
    x, y = parts["prediction"], parts["target"]
    wanted = []
    for block in range(x.shape[1]):
        pair = (x[:, block], y[:, block])
        hinge = sum(torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in pair) / 2
        spread = sum((torch.cov(z.T) - torch.diag(z.var(0))).square().sum() / z.shape[1] for z in pair)
        wanted.append(25 * (pair[0] - pair[1]).square().mean() + 25 * hinge + spread)
    assert len(wanted) == 4
    assert out.terms["vicreg"].item() == pytest.approx(sum(wanted).item() / 4, rel=1e-5)
    assert isinstance(loss, VICReg)
