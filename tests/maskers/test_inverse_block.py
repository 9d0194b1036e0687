"""Inverse block masking: the kept patches against the strategy written out in plain Python."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import InverseBlock

LEVEL = 1e-3
"""Of every statistical test here; the seeds are fixed."""


@pytest.mark.parametrize(("grid", "kept"), [((4, 4), 3), ((14, 14), 39), ((5, 31), 31)])
def test_lengths_are_static(grid: tuple[int, int], kept: int) -> None:
    masks = InverseBlock(grid=grid)(np.arange(300), seed=0, epoch=0)
    assert set(masks.context.lengths) == {kept}
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(grid[0] * grid[1]))


def plain(side: int, blocks: int, size: int, keep: int) -> set[int]:
    """One context, block by block; patches are then dropped or added one by one."""
    kept: set[int] = set()
    for _ in range(blocks):
        row, column = random.randrange(side), random.randrange(side)
        for r in range(row - size // 2, row - size // 2 + size):
            for c in range(column - size // 2, column - size // 2 + size):
                if 0 <= r < side and 0 <= c < side:
                    kept.add(r * side + c)
    while len(kept) > keep:
        kept.remove(random.choice(sorted(kept)))
    while len(kept) < keep:
        kept.add(random.choice(sorted(set(range(side * side)) - kept)))
    return kept


def neighbours(context: np.ndarray, side: int) -> float:
    """[B, N] -> mean number of kept patches to the right of a kept patch, [B]."""
    cells = context.reshape(-1, side, side)
    return (cells[:, :, 1:] & cells[:, :, :-1]).sum((1, 2))


@pytest.mark.parametrize(("size", "ratio", "adjust"), [(3, 0.8, 0.07), (4, 0.6, 0.0)])
def test_draws_are_those_of_the_strategy(size: int, ratio: float, adjust: float) -> None:
    """How often each patch is kept, and how clustered what is kept is, against the plain loop."""
    side, images = 10, 3000
    masker = InverseBlock(grid=(side, side), block_size=size, ratio=ratio, adjust=adjust)
    masks = masker(np.arange(images), seed=0, epoch=0)
    ours, theirs = np.zeros((2, images, side * side), dtype=bool)
    ours[masks.context.lengths.set_of_token, masks.context.index] = True
    random.seed(0)
    for row in theirs:
        row[list(plain(side, masker.num_blocks, size, masker.context_length))] = True
    assert stats.ks_2samp(neighbours(ours, side), neighbours(theirs, side)).pvalue > LEVEL
    # Each patch's count has the spread of a binomial number; the bound is for all patches at once (Bonferroni).
    p = (ours.mean(0) + theirs.mean(0)) / 2
    z = (ours.mean(0) - theirs.mean(0)) / np.sqrt(2 * p * (1 - p) / images)
    assert np.abs(z).max() < stats.norm.isf(LEVEL / 2 / side**2)


def test_several_masks_an_image_each_with_its_own_target() -> None:
    masks = InverseBlock(grid=(8, 8), num_masks=3)(np.arange(20), seed=0, epoch=0)
    assert len(masks.context) == len(masks.targets) == 60
    assert masks.context_of.tolist() == list(range(60))
    contexts = [c.tolist() for c in masks.context.split()]
    for context, target in zip(contexts, masks.targets.split(), strict=True):
        assert sorted([*context, *target.tolist()]) == list(range(64))
    assert sum(contexts[b] != contexts[20 + b] for b in range(20)) >= 19


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 6)}, "grid (=(3, 6)) must be (rows, columns) with at least 4 of each"),
        ({"num_masks": 0}, "num_masks (=0) must be at least 1"),
        ({"block_size": 0}, "block_size (=0) must be at least 1"),
        ({"block_size": 7}, "block_size (=7) must be at most 6, the shorter side of the grid"),
        ({"adjust": 1.0}, "adjust (=1.0) must be in [0, 1)"),
        (
            {"ratio": 1.0},
            "ratio (=1.0) must leave a target and a context among the 36 patches of a 6 x 6 grid: from 0.0278 to 0.972",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        InverseBlock(**{"grid": (6, 6), **options})
    assert str(error.value) == message
