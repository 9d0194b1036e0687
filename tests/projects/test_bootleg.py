"""Bootleg: targets and loss of the small config against plain float64 maths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_vit import layers_of, standardise

from jepa_kit.config import load_config
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.recipe import JEPA
from jepa_kit.structures import View

CONFIGS = Path(__file__).parents[2] / "projects/bootleg/configs"


@pytest.fixture
def recipe() -> JEPA:
    """The recipe of the small config in float64, with a target encoder that is no copy of the encoder."""
    torch.manual_seed(0)
    recipe = build_recipe(load_config(CONFIGS / "quick.yaml")).double()
    assert isinstance(recipe, JEPA)
    assert recipe.target_encoder is not None
    with torch.no_grad():
        for p in recipe.target_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return recipe


def view_of(recipe: JEPA) -> View:
    masks = build_masker(load_config(CONFIGS / "quick.yaml"))(np.arange(2), seed=0, epoch=0)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return View(images, masks)


def test_targets_and_loss_are_those_of_a_plain_loop(recipe: JEPA) -> None:
    view = view_of(recipe)
    assert view.masks is not None
    out = recipe(view)
    each = [layers_of(recipe.target_encoder, image) for image in view.images]  # type: ignore[arg-type]
    dense = [torch.cat([standardise(layer, 1e-5) for layer in layers[1:]], -1) for layers in each]  # [N, 4 * 96]
    targets = view.masks.targets
    wanted = torch.cat([dense[b][i] for b, i in zip(targets.image.tolist(), targets.split(), strict=True)])
    assert out.prediction is not None
    assert wanted.shape == out.prediction.prediction.shape == (2 * 38, 4 * 96)
    torch.testing.assert_close(out.prediction.target, wanted, rtol=0, atol=1e-12)
    error = (out.prediction.prediction - wanted).abs()
    loss = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-12)


def test_every_layer_is_predicted(recipe: JEPA) -> None:
    """The predictor's last map has gradients for the values of each layer, and the encoder has gradients of all."""
    recipe(view_of(recipe)).loss.backward()
    parts = recipe.predictor.proj.weight.grad.split(96)  # type: ignore[union-attr]
    assert len(parts) == 4
    assert all(part.abs().sum() > 0 for part in parts)
    assert all(p.grad is not None for p in recipe.encoder.parameters())
    assert all(p.grad is None for p in recipe.target_encoder.parameters())  # type: ignore[union-attr]


def test_the_large_config_differs_from_ijepas_in_its_target_alone() -> None:
    ours = load_config(CONFIGS / "in1k_vitb16.yaml").to_dict()
    theirs = load_config(CONFIGS.parents[1] / "ijepa/configs/in1k_vitb16.yaml").to_dict()
    assert ours["target"]["layers"] == [3, 6, 9, 12]
    ours["train"].pop("output_dir"), theirs["train"].pop("output_dir")
    assert {name for name in ours if ours[name] != theirs[name]} == {"target"}
