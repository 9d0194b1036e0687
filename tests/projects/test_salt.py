"""SALT: its two steps, and the student's targets and loss against plain float64 maths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_vit import layers_of, standardise

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.interop import load_encoder
from jepa_kit.recipe import JEPA
from jepa_kit.structures import View
from jepa_kit.training import train

CONFIGS = Path(__file__).parents[2] / "projects/salt/configs"


def config_of(step: str, shards: Any, folder: Path, *overrides: str) -> Any:
    run = [f"data.shards={shards}", f"train.output_dir={folder}", "train.batch_size=4", "train.steps_per_epoch=2"]
    small = ["train.epochs=2", "train.device=cpu", "train.tensorboard=false", "data.num_workers=0"]
    raw = load_config(CONFIGS / f"{step}.yaml").to_dict()
    return config_from_dict(raw, [*run, *small, *overrides])


def test_two_steps(shards: Any, tmp_path: Path) -> None:
    """The teacher of step 1 gives the targets of step 2: its width, its tokens, frozen; L1 by formula."""
    teacher = train(config_of("quick_teacher", shards, tmp_path / "teacher"))
    weights = f"target_update.weights={teacher}"
    config = config_of("quick", shards, tmp_path / "student", weights)
    recipe = build_recipe(config).double()
    assert isinstance(recipe, JEPA)
    masks = build_masker(config)(np.arange(2), seed=0, epoch=0)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = recipe(View(images, masks))
    encoder = load_encoder(teacher, None).vit
    dense = []
    for image in images:
        last = standardise(layers_of(encoder, image)[-1], 1e-6)
        last = last * encoder.norm.weight.double() + encoder.norm.bias.double()
        dense.append(standardise(last, 1e-5))  # [N, 64]
    targets = masks.targets
    wanted = torch.cat([dense[b][i] for b, i in zip(targets.image.tolist(), targets.split(), strict=True)])
    assert out.prediction is not None
    torch.testing.assert_close(out.prediction.target, wanted, rtol=0, atol=1e-10)
    loss = (out.prediction.prediction - wanted).abs().mean()
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-10)
    student = train(config)
    before, after = (load_checkpoint(folder).part("encoder") for folder in (teacher, student))
    assert before["norm.weight"].shape == (64,)
    assert after["norm.weight"].shape == (96,)
    assert load_checkpoint(student).part("target_encoder").keys() == {"_extra_state"}


def test_step_2_needs_the_run_of_step_1(shards: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        build_recipe(config_of("quick", shards, tmp_path, f"target_update.weights={tmp_path / 'nothing'}"))
