"""Blockwise masking: exact numbers, and the union of blocks against BEiT's algorithm written out in plain Python."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import Blockwise, blockwise

LEVEL = 1e-3
"""Of every statistical test here; the seeds are fixed."""


@pytest.mark.parametrize(("grid", "ratio"), [((4, 4), 0.4), ((14, 14), 0.4), ((14, 14), 0.6), ((5, 31), 0.9)])
def test_exactly_the_ratio_is_masked(grid: tuple[int, int], ratio: float) -> None:
    patches = grid[0] * grid[1]
    masks = Blockwise(grid=grid, ratio=ratio)(np.arange(300), seed=0, epoch=0)
    assert set(masks.targets.lengths) == {round(ratio * patches)}
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(patches))


def plain(side: int, quota: int, least: float) -> set[int]:
    """Blocks until the quota is met; of the last one, patches in raster order from one end."""
    masked: set[int] = set()
    from_last = random.random() < 0.5
    while len(masked) < quota:
        missing = quota - len(masked)
        area = random.uniform(least, max(least, missing))
        ratio = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        h = min(max(round(math.sqrt(area * ratio)), 1), side)
        w = min(max(round(math.sqrt(area / ratio)), 1), side)
        top, left = random.randint(0, side - h), random.randint(0, side - w)
        block = {r * side + c for r in range(top, top + h) for c in range(left, left + w)}
        masked |= set(sorted(block - masked, reverse=from_last)[:missing])
    return masked


def edges(sets: np.ndarray, side: int) -> np.ndarray:
    """[B, N] -> [B]: pairs of neighbours of which one is masked, a measure of how compact the mask is."""
    cells = sets.reshape(-1, side, side)
    return (cells[:, 1:] != cells[:, :-1]).sum((1, 2)) + (cells[:, :, 1:] != cells[:, :, :-1]).sum((1, 2))


def test_draws_are_those_of_the_algorithm() -> None:
    side, images = 14, 3000
    masks = Blockwise(grid=(side, side))(np.arange(images), seed=0, epoch=0)
    ours, theirs = np.zeros((2, images, side * side), dtype=bool)
    ours[masks.targets.lengths.set_of_token, masks.targets.index] = True
    random.seed(0)
    for row in theirs:
        row[list(plain(side, 78, 0.08 * 196))] = True
    assert stats.ks_2samp(edges(ours, side), edges(theirs, side)).pvalue > LEVEL
    p = (ours.mean(0) + theirs.mean(0)) / 2
    z = (ours.mean(0) - theirs.mean(0)) / np.sqrt(2 * p * (1 - p) / images)
    assert np.abs(z).max() < stats.norm.isf(LEVEL / 2 / side**2)  # Bonferroni over the patches


def test_what_the_last_round_leaves_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "ROUNDS", 1)
    masks = Blockwise(grid=(8, 8))(np.arange(400), seed=0, epoch=0)
    assert set(masks.targets.lengths) == {26}
    ends = [0 in t or 63 in t for t in masks.targets.split()]  # made up from one end of the image
    assert np.mean(ends) > 0.9


def test_at_most_the_ratio_is_masked_by_whole_blocks() -> None:
    masker = Blockwise(grid=(14, 14), ratio=(0.2, 0.5), min_scale=0.08, count="at_most")
    masks = masker(np.arange(500), seed=0, epoch=0)
    lengths = np.array(list(masks.targets.lengths))
    assert lengths.min() >= 16
    assert 60 < lengths.mean() < 69  # half way between 39 and 98, less what no further block fits into
    assert lengths.max() <= 98
    alone = masker(np.array([7]), seed=0, epoch=0)  # an image's mask does not depend on its batch
    assert alone.targets.index.tolist() == masks.targets.split()[7].tolist()


def test_a_range_of_ratios_is_drawn_uniformly() -> None:
    lengths = Blockwise(grid=(10, 10), ratio=(0.2, 0.5))(np.arange(3000), seed=0, epoch=0).targets.lengths
    counts = np.bincount(np.array(list(lengths)), minlength=51)[20:]
    assert counts.sum() == 3000
    expected = np.array([0.5, *[1] * 29, 0.5]) * 100  # the ends are rounded to from one side
    assert stats.chisquare(counts, expected).pvalue > LEVEL


def test_an_image_that_no_block_fits_into_gets_patches_of_one_end() -> None:
    masks = Blockwise(grid=(4, 30), ratio=0.25, aspect_ratio=(9, 9), count="at_most")(np.arange(40), seed=0, epoch=0)
    assert {tuple(t.tolist()) for t in masks.targets.split()} == {tuple(range(30)), tuple(range(90, 120))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (6, 2)}, "grid (=(6, 2)) must be (rows, columns) with at least 4 of each"),
        (
            {"ratio": 0.01},
            "ratio (=0.01) must leave a target and a context among the 36 patches of a 6 x 6 grid: "
            "from 0.0278 to 0.972",
        ),
        ({"ratio": (0.6, 0.5)}, "ratio (=(0.6, 0.5)) must be (low, high) with low <= high"),
        ({"ratio": (0.3, 0.5), "min_scale": 0.4}, "min_scale (=0.4) must be above 0 and at most ratio (=0.3)"),
        ({"count": "most"}, "count (='most') must be one of 'exact', 'at_most'"),
        ({"min_scale": 0.5}, "min_scale (=0.5) must be above 0 and at most ratio (=0.4)"),
        ({"min_scale": 0.0}, "min_scale (=0.0) must be above 0 and at most ratio (=0.4)"),
        (
            {"aspect_ratio": (2, 1)},
            "aspect_ratio (=(2, 1)) must be (low, high), height over width, with 0 < low <= high",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Blockwise(**{"grid": (6, 6), **options})
    assert str(error.value) == message
