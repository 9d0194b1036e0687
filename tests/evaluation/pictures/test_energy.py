"""Energies of predictions against formulas in float64, patch by patch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.evaluation.health.measure import several_masks
from jepa_kit.evaluation.pictures.energy import Energies, energies, patch_energies
from jepa_kit.evaluation.pictures.sections import show_map
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.losses import L2, Cosine, CrossEntropy, SmoothL1
from jepa_kit.plotting import Figure
from jepa_kit.structures import MaskBatch, PatchSets, Prediction


def recipe_of(*losses):
    """What ``patch_energies`` reads of a recipe."""
    terms = {type(loss).__name__: loss for loss, _ in losses}
    weights = {type(loss).__name__: weight for loss, weight in losses}
    return SimpleNamespace(losses=nn.ModuleDict(terms), weights=weights)


class Spread(nn.Module):
    is_distance = False

    def values(self, prediction, target):
        raise AssertionError("a regulariser is no energy")


class Maximum(nn.Module):
    """A distance without a value for each patch."""

    def forward(self, prediction):
        return (prediction.prediction - prediction.target).abs().max()


def test_the_distances_of_the_recipe():
    guess, truth = 2 * np.random.default_rng(0).standard_normal((2, 30, 5))
    error = np.abs(guess - truth)
    smooth = np.where(error < 0.7, error**2 / 1.4, error - 0.35).mean(1)
    cosine = 1 - (guess * truth).sum(1) / np.linalg.norm(guess, axis=1) / np.linalg.norm(truth, axis=1)
    pair = torch.from_numpy(guess), torch.from_numpy(truth)
    for losses, expected, name in (
        ([(SmoothL1(beta=0.7), 1.0)], smooth, "SmoothL1"),
        ([(L2(), 1.0), (Spread(), 3.0)], np.square(error).mean(1), "L2"),
        ([(SmoothL1(beta=0.7), 0.5), (Cosine(), 2.0)], 0.5 * smooth + 2 * cosine, "SmoothL1 + Cosine"),
        ([(Maximum(), 5.0)], np.square(error).mean(1), "squared error"),
    ):
        found, distance = patch_energies(recipe_of(*losses), *pair)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
        assert distance == name
    # float32 is no excuse: energies are float64
    assert patch_energies(recipe_of((L2(), 1.0)), *(x.float() for x in pair))[0].dtype == torch.float64


def test_codes_have_their_cross_entropy():
    random = np.random.default_rng(0)
    scores, codes = random.standard_normal((20, 7)) * 3, random.integers(0, 7, 20)
    expected = logsumexp(scores, axis=1) - scores[np.arange(20), codes]
    for target in (torch.from_numpy(codes), torch.from_numpy(codes)[:, None]):
        found, name = patch_energies(recipe_of((CrossEntropy(), 1.0)), torch.from_numpy(scores), target)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
        assert name == "cross entropy"


@pytest.mark.parametrize("masker", ["multiblock", "random"])
def test_maps_are_means_over_masks(tiny_config, masker):
    """Patch by patch in numpy: blocks overlap, so a patch may be a target several times in one mask."""
    config = config_from_dict(tiny_config.to_dict() | {"masker": {"name": masker}})
    torch.manual_seed(0)
    jepa = build_recipe(config).double()
    nn.init.normal_(jepa.predictor.proj.weight)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    masks = several_masks(build_masker(config), np.arange(5), 2, seed=3)
    found = energies(jepa, images, masks, others=3)
    assert jepa.training
    assert found.distance == "smooth_l1"
    jepa.eval()
    with torch.no_grad():
        tokens = jepa.target_encoder(images).view(5, 16, 16).numpy()
        s_x = jepa.encoder(images, masks.context)
        guess = jepa.predictor(s_x, masks).numpy()
    truth = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    values = {}
    places = zip(masks.targets.image_of_token.tolist(), masks.targets.index.tolist(), strict=True)
    for row, (image, patch) in enumerate(places):
        for k in range(4):
            error = np.abs(guess[row] - truth[(image + k) % 5, patch])
            energy = np.where(error < 1, error**2 / 2, error - 0.5).mean()
            values.setdefault((k, image, patch), []).append(energy)
    expected = np.full((4, 5, 16), np.nan)
    for place, energy in values.items():
        expected[place] = np.mean(energy)
    np.testing.assert_allclose(found.maps, expected, rtol=1e-9)
    assert np.isnan(expected).any() or masker == "multiblock"
    assert masker == "random" or max(map(len, values.values())) > 1


class Levels:
    """Predicts the number of its image plus 0.25; targets of image b are b at every patch."""

    losses = nn.ModuleDict({"l2": L2()})
    weights = {"l2": 1.0}  # noqa: RUF012

    def modules(self):
        return iter(())

    def eval(self):
        return self

    def targets_at(self, images, patches):
        return patches.image_of_token.double()[:, None].expand(-1, 3)

    def predict(self, view):
        truth = self.targets_at(view.images, view.masks.targets)
        return Prediction(truth + 0.25, truth, truth, view.masks)


def test_the_own_energy_is_the_lowest_of_right_predictions():
    seen = PatchSets.from_padded(torch.tensor([[1, 2, 4, 5]] * 4))
    hidden = PatchSets.from_padded(torch.tensor([[0, 3]] * 3))  # nothing of the last image
    found = energies(Levels(), torch.zeros(4, 3, 4, 6), MaskBatch(seen, hidden, (2, 3), torch.arange(3)), others=2)
    assert np.isnan(found.maps[:, :, [1, 2, 4, 5]]).all()
    assert np.isnan(found.maps[:, 3]).all()
    # b + 0.25 against b, b + 1 and b + 2, modulo 4
    expected = np.square([[0.25] * 3, [0.25 - 1] * 3, [0.25 - 2, 0.25 - 2, 2.25 - 0]])
    np.testing.assert_allclose(found.maps[:, :3, 0], expected)
    figures = found.figures()
    others = expected[1:].mean()
    assert figures == {
        "own": 0.0625,
        "others": pytest.approx(others),
        "own_is_lowest": 3,
        "images": 3,
        "distance": "l2",
    }


def test_figures():
    maps = np.array([[[1.0, np.nan], [2.0, 4.0]], [[3.0, np.nan], [5.0, 1.0]], [[2.0, np.nan], [2.0, 3.0]]])
    assert Energies(maps, "l1").figures() == {
        "own": 2.0,  # of 1 and 3
        "others": 2.625,  # of 3 and 3, 2 and 2.5
        "own_is_lowest": 1,
        "images": 2,
        "distance": "l1",
    }


def test_patches_that_are_never_hidden_show_the_image():
    panel = Figure().subplots()
    image = torch.full((3, 2, 4), 51, dtype=torch.uint8)
    show_map(panel, image, np.array([[0.0, np.nan]]), 0.0, 1.0)
    drawn = panel.images[0].get_array()
    np.testing.assert_allclose(drawn[:, 2:], 0.2, rtol=1e-6)  # grey, 51 / 255
    assert np.all(np.abs(drawn[:, :2] - 0.2) > 0.05)
