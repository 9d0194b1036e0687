"""Block masking: one block is the target, the rest is the context."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import Block


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (5, 31), (20, 9)])
def test_one_rectangle_and_the_rest(grid: tuple[int, int]) -> None:
    rows, columns = grid
    masks = Block(grid=grid)(np.arange(300), seed=0, epoch=0)
    assert len(masks.context) == len(masks.targets) == 300
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(rows * columns))
        row, column = np.divmod(target.numpy(), columns)
        h, w = np.ptp(row) + 1, np.ptp(column) + 1
        assert len(target) == h * w
        # Sides are rounded: the area is off by half a patch on each.
        assert abs(h * w - 0.6 * rows * columns) <= (h + w) / 2 + 0.25


def test_places_and_ratios() -> None:
    grid = (14, 14)
    masks = Block(grid=grid)(np.arange(6000), seed=0, epoch=0)
    first, last = (np.array([t[i].item() for t in masks.targets.split()]) for i in (0, -1))
    (top, left), (bottom, right) = np.divmod(first, 14), np.divmod(last, 14)
    h, w = bottom - top + 1, right - left + 1
    # sqrt(117.6 * 0.75) = 9.4 to sqrt(117.6 * 1.5) = 13.3; a width of sqrt(117.6 / ratio).
    assert set(h) == {9, 10, 11, 12, 13}
    assert set(w) == {9, 10, 11, 12, 13}
    assert (np.diff(w[np.argsort(h, kind="stable")]).max()) <= 1
    for size, start in ((h, top), (w, left)):
        for side in (9, 11, 13):
            assert stats.chisquare(np.bincount(start[size == side], minlength=15 - side)).pvalue > 1e-3


def test_options() -> None:
    masks = Block(grid=(10, 10), target_scale=(0.25, 0.25), target_aspect_ratio=(1, 1))(np.arange(9), seed=0, epoch=0)
    assert list(masks.targets.lengths) == [25] * 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (14, 2)}, "grid (=(14, 2)) must be (rows, columns) with at least 4 of each"),
        ({"min_keep": 0}, "min_keep (=0) must be at least 1"),
        ({"target_scale": (0.6,)}, "target_scale (=(0.6,)) must be (low, high) with 0 < low <= high <= 1"),
        (
            {"target_aspect_ratio": (-1, 1)},
            "target_aspect_ratio (=(-1, 1)) must be (low, high), height over width, with 0 < low <= high",
        ),
        (
            {"target_scale": (0.5, 1.0)},
            "min_keep (=1) must be at most 0: on a grid of 14 x 14, target_scale (=(0.5, 1.0)) can draw a block of "
            "14 x 14 patches; or reduce target_scale",
        ),
        (
            {"min_keep": 80},
            "min_keep (=80) must be at most 75: on a grid of 14 x 14, target_scale (=(0.6, 0.6)) can draw a block of "
            "11 x 11 patches; or reduce target_scale",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Block(**{"grid": (14, 14), **options})
    assert str(error.value) == message
