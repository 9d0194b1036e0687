"""Latent-MIM: its two losses against plain maths in float64, and the settings of the source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_kit.config import load_config
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.structures import MaskBatch, PatchSets, Prediction, Progress
from projects.latent_mim.losses import PatchInfoNCE, PatchSimilarity

PROJECT = Path(__file__).parents[2] / "projects/latent_mim"


def draw(lengths: tuple[int, ...], seed: int = 0, where: float = 0.0) -> Prediction:
    """Random predictions and targets of target sets of these lengths, one of each image; contexts have 2 patches."""
    torch.manual_seed(seed)
    context = PatchSets.from_padded(torch.tensor([[14, 15]]).expand(len(lengths), -1))
    targets = PatchSets.pack([torch.arange(n) for n in lengths])
    masks = MaskBatch(context, targets, (4, 4), torch.arange(len(lengths)))
    guess, truth = (torch.randn(sum(lengths), 7, dtype=torch.float64) + 0.5 for _ in range(2))
    seen = torch.randn(2 * len(lengths), 7, dtype=torch.float64)
    return Prediction(guess.requires_grad_(), truth, seen.requires_grad_(), masks, Progress(where=where))


def plain_info_nce(guess: Tensor, truth: Tensor, temperature: float, standardise: bool) -> list[float]:
    """Value of each patch of one set, in numpy, pair by pair."""
    p, t = guess.detach().numpy(), truth.numpy()
    if standardise:
        p = (p - p.mean(0)) / (p.std(0, ddof=1) + 1e-4)
    values = []
    for i in range(len(p)):
        cosines = [float(p[i] @ t[j] / np.linalg.norm(p[i]) / np.linalg.norm(t[j])) for j in range(len(t))]
        chances = np.exp(np.array(cosines) / temperature)
        values.append(-2 * temperature * math.log(chances[i] / chances.sum()))
    return values


@pytest.mark.parametrize("lengths", [(5, 5, 5), (2, 7, 4)])
@pytest.mark.parametrize(("temperature", "standardise"), [(0.2, True), (0.7, False)])
def test_info_nce_equals_plain_maths(lengths: tuple[int, ...], temperature: float, standardise: bool) -> None:
    prediction = draw(lengths)
    sets = zip(prediction.prediction.split(lengths), prediction.target.split(lengths), strict=True)
    values = [plain_info_nce(*pair, temperature, standardise) for pair in sets]
    by_image = np.mean([np.mean(each) for each in values])
    by_patch = np.mean(np.concatenate(values))
    for average, expected in (("images", by_image), ("patches", by_patch)):
        loss = PatchInfoNCE(temperature=temperature, standardise=standardise, average=average)  # type: ignore[arg-type]
        assert loss(prediction).item() == pytest.approx(expected, rel=1e-12)


def test_an_image_depends_on_no_other() -> None:
    loss = PatchInfoNCE()
    prediction = draw((3, 4))
    (gradient,) = torch.autograd.grad(loss(prediction), prediction.prediction)
    other = draw((3, 4))
    other.target[3:] += 1
    (changed,) = torch.autograd.grad(loss(other), other.prediction)
    torch.testing.assert_close(changed[:3], gradient[:3], rtol=0, atol=1e-14)
    assert not torch.allclose(changed[3:], gradient[3:])


@pytest.mark.parametrize(("where", "goal"), [(0.0, 0.75), (0.5, 0.5), (1.0, 0.25), (1 / 3, 0.625)])
def test_similarity_equals_plain_maths(where: float, goal: float) -> None:
    prediction = draw((3, 5, 2), where=where)
    expected = 0.0
    for tokens, lengths in ((prediction.prediction, (3, 5, 2)), (prediction.context, (2, 2, 2))):
        means = []
        for one in tokens.detach().split(lengths):
            unit = one / one.norm(dim=1, keepdim=True)
            means.append(np.mean([float(a @ b) for a in unit for b in unit]))
        expected += (np.mean(means) - goal) ** 2
    assert PatchSimilarity()(prediction).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    prediction = draw((3, 2))
    losses: tuple[Any, ...] = (PatchInfoNCE(), PatchSimilarity())

    def total(guess: Tensor, seen: Tensor) -> Tensor:
        return sum(loss(Prediction(guess, prediction.target, seen, prediction.masks)) for loss in losses)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(total, (prediction.prediction, prediction.context))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchInfoNCE(temperature=0.0), r"temperature \(=0.0\) must be above 0 and finite"),
        (lambda: PatchInfoNCE(average="sets"), r"average \(='sets'\) must be one of 'images', 'patches'"),
        (lambda: PatchSimilarity(goal=(0.5, 1.5)), r"goal \(=\(0.5, 1.5\)\) must be two numbers in \[-1, 1\]"),
        (lambda: PatchInfoNCE()(draw((3, 1))), "a target set has 1 patch: patch_info_nce needs 2 or more in each"),
    ],
)
def test_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_config_has_the_settings_of_the_source() -> None:
    config = load_config(PROJECT / "configs/in1k_vitb16.yaml")
    assert build_masker(config)(np.arange(1), seed=0, epoch=0).context.num_patches == 20
    with torch.device("meta"):
        recipe: Any = build_recipe(config)
    assert recipe.target.masked_at == "input"
    assert recipe.predictor.blocks[0].self_attn is not None
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (recipe.encoder, recipe.predictor)]
    assert f"| {counts[0]:.1f} M / {counts[1]:.1f} M |" in (PROJECT / "README.md").read_text()
