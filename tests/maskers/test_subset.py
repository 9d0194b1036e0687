"""Some targets of another masker: set by set, and how often each patch is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from jepa_kit.maskers import KeptBlock, Subset
from jepa_kit.registry import MASKERS

GRID = (6, 8)
CUT = {"name": "multiblock", "truncation": "fixed", "context_length": 8, "target_length": 3}


@pytest.mark.parametrize(
    "masker",
    [{"name": "kept_block"}, {"name": "multiblock"}, {"name": "inverse_block", "num_masks": 3}, {"name": "in_place"}],
    ids=lambda masker: masker["name"],
)
def test_a_part_of_each_target_set_is_left(masker: dict[str, Any]) -> None:
    samples, arguments = np.arange(5), {"seed": 3, "epoch": 1, "step": 2}
    part = dict(masker)
    whole = MASKERS.build(part.pop("name"), part, grid=GRID)(samples, **arguments)
    masks = Subset(grid=GRID, masker=masker, fraction=0.3)(samples, **arguments)
    assert masks.grid == GRID
    for name in ("index", "image", "hidden"):
        ours, theirs = (getattr(x.context, name) for x in (masks, whole))
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(masks.context_of, whole.context_of)
    assert torch.equal(masks.targets.image, whole.targets.image)
    for left, every in zip(masks.targets.split(), whole.targets.split(), strict=True):
        assert len(left) == round(0.3 * len(every))
        assert set(left.tolist()) <= set(every.tolist())
        assert left.tolist() == sorted(left.tolist())


def test_every_patch_of_a_set_is_chosen_as_often() -> None:
    images = 4000
    masker = {"name": "kept_block", "roll": False, "aspect_ratio": [1.0, 1.0], "ratio": 0.75}
    whole = KeptBlock(grid=(4, 4), roll=False, aspect_ratio=(1.0, 1.0), ratio=0.75)(np.arange(images), seed=0, epoch=0)
    masks = Subset(grid=(4, 4), masker=masker, fraction=0.25)(np.arange(images), seed=0, epoch=0)
    possible, chosen = (np.bincount(x.targets.index.numpy(), minlength=16) for x in (whole, masks))
    assert chosen.sum() == 3 * images
    assert stats.chisquare(chosen, possible / 4).pvalue > 1e-3
    pairs = masks.targets.index.view(-1, 3)  # neighbours are chosen together no more often than others
    beside = ((pairs[:, 1:] - pairs[:, :-1] == 1) & (pairs[:, 1:] % 4 > 0)).sum().item()
    of = whole.targets.index.view(-1, 12)
    pairs_beside = ((of[:, 1:] - of[:, :-1] == 1) & (of[:, 1:] % 4 > 0)).sum().item()
    expected = pairs_beside * 3 * 2 / (12 * 11)
    assert abs(beside - expected) < 3.3 * expected**0.5


def test_draws_are_a_function_of_sample_seed_and_epoch() -> None:
    masker = Subset(grid=GRID, fraction=0.2)
    every = masker(np.arange(8), seed=3, epoch=1).targets
    alone = masker(np.array([5]), seed=3, epoch=1).targets
    assert torch.equal(alone.index, every.split()[5])
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert not torch.equal(masker(np.arange(8), **other).targets.index, every.index)


def test_at_least_one_patch_is_predicted() -> None:
    masks = Subset(grid=GRID, masker={"name": "random", "ratio": 0.1}, fraction=0.01)(np.arange(5), seed=0, epoch=0)
    assert set(masks.targets.lengths) == {1}


def test_before_truncation_the_other_masker_has_longer_sets() -> None:
    masker, samples = Subset(grid=GRID, masker=CUT, fraction=0.5), np.arange(5)
    cut, whole = masker(samples, seed=0, epoch=0), masker.before_truncation(samples, seed=0, epoch=0)
    assert all(few < many for few, many in zip(cut.targets.lengths, whole.targets.lengths, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction \(={fraction}\) must be above 0 and below 1"):
        Subset(grid=GRID, fraction=fraction)


def test_options_of_the_other_masker_are_checked() -> None:
    with pytest.raises(ValueError, match=r"masker: .*ratio \(=2.0\)"):
        Subset(grid=GRID, masker={"name": "random", "ratio": 2.0})
