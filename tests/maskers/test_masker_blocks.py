"""Sizes, places and cells of blocks against plain Python, one block at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jepa_kit.maskers.blocks import Blocks, BlockShape, corners, fewest_left, reach
from jepa_kit.rng import Stream, uniforms

sides = st.integers(4, 32)
ranges = st.tuples(st.floats(0.07, 1), st.floats(0.07, 1)).map(lambda r: (min(r), max(r)))
ratios = st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(lambda r: (min(r), max(r)))


def draws(count: int, numbers: int = 2, epoch: int = 0) -> np.ndarray:
    """[numbers, count] in [0, 1)."""
    return uniforms(Stream.EVALUATION, np.arange(count), numbers, seed=1, epoch=epoch).T


@settings(max_examples=200, deadline=None)
@given(rows=sides, columns=sides, scale=st.floats(0.07, 1), ratio=st.floats(0.1, 10))
def test_inclusive_sizes_keep_area_and_ratio_within_rounding(
    rows: int, columns: int, scale: float, ratio: float
) -> None:
    area = rows * columns * scale
    height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if height > rows:
        height, width = rows, area / rows
    elif width > columns:
        height, width = area / columns, columns
    assert height * width == pytest.approx(area)
    shape = BlockShape((rows, columns), (scale, scale), (ratio, ratio), "inclusive")
    h, w = (int(x[0]) for x in shape.size(np.zeros(1), np.zeros(1)))
    assert 1 <= h <= rows
    assert 1 <= w <= columns
    assert abs(h - max(height, 1)) <= 0.5 + 1e-9
    assert abs(w - max(width, 1)) <= 0.5 + 1e-9


@settings(max_examples=200, deadline=None)
@given(rows=sides, columns=sides, scale=st.floats(0.07, 1), ratio=st.floats(0.1, 10))
def test_released_sizes_stay_below_the_grid(rows: int, columns: int, scale: float, ratio: float) -> None:
    area = int(rows * columns * scale)
    shape = BlockShape((rows, columns), (scale, scale), (ratio, ratio), "released")
    h, w = (int(x[0]) for x in shape.size(np.zeros(1), np.zeros(1)))
    assert h == max(1, min(rows - 1, round(math.sqrt(area * ratio))))
    assert w == max(1, min(columns - 1, round(math.sqrt(area / ratio))))


def test_scale_and_aspect_ratio_are_uniform_and_independent() -> None:
    """On a grid so fine that rounding does not show."""
    scale, ratio = (0.15, 0.2), (0.75, 1.5)
    h, w = BlockShape((2000, 1000), scale, ratio, "inclusive").size(*draws(4000))
    got_scale, got_ratio = h * w / 2e6, h / w
    assert stats.kstest(got_scale, stats.uniform(scale[0], scale[1] - scale[0]).cdf).pvalue > 1e-3
    assert stats.kstest(got_ratio, stats.uniform(ratio[0], ratio[1] - ratio[0]).cdf).pvalue > 1e-3
    assert stats.spearmanr(got_scale, got_ratio).pvalue > 1e-3


def test_one_number_for_both_couples_scale_and_aspect_ratio() -> None:
    u = np.linspace(0, 1, 500)
    h, w = BlockShape((1000, 1000), (0.15, 0.2), (0.75, 1.5), "released").size(u, u)
    assert stats.spearmanr(h * w, h / w).statistic > 0.999


@settings(max_examples=60, deadline=None)
@given(
    rows=sides,
    columns=sides,
    scale=ranges,
    ratio=ratios,
    edges=st.sampled_from(["inclusive", "released"]),
    coupled=st.booleans(),
)
def test_bounds_hold_every_size(rows: int, columns: int, scale: tuple, ratio: tuple, edges: str, coupled: bool) -> None:
    shape = BlockShape((rows, columns), scale, ratio, edges)
    u = np.concatenate([draws(2000), np.array([[0, 0, 1, 1], [0, 1, 0, 1]])], axis=1)
    sizes = set(zip(*(x.tolist() for x in shape.size(u[0], u[0 if coupled else 1])), strict=True))
    largest, smallest = (shape.bounds(largest=x, coupled=coupled) for x in (True, False))
    for h, w in sizes:
        assert any(h <= a and w <= b for a, b in largest)
        assert any(h >= a and w >= b for a, b in smallest)


def test_bounds_are_tight() -> None:
    """Of the released sizes at 14 x 14, areas of 29 to 39 patches, they are those of the smallest and largest area."""
    shape = BlockShape((14, 14), (0.15, 0.2), (0.75, 1.5), "released")
    steps = [0.75 + 0.75 * i / 20_000 for i in range(20_001)]
    for largest, area in ((True, 39), (False, 29)):
        plain = {(round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))) for ratio in steps}
        assert shape.bounds(largest=largest, coupled=False) == sorted(plain)
        assert len(shape.bounds(largest=largest, coupled=True)) == 5  # all that the release draws
    assert BlockShape((4, 4), (1, 1), (1, 1), "inclusive").bounds(largest=True, coupled=True) == [(4, 4)]


@settings(max_examples=60, deadline=None)
@given(rows=sides, columns=sides, data=st.data())
def test_cells_against_slices(rows: int, columns: int, data: st.DataObject) -> None:
    plain = np.zeros((2, 3, rows, columns), dtype=bool)
    top, left, height, width = (np.empty((2, 3), dtype=np.int64) for _ in range(4))
    for i in np.ndindex(2, 3):
        height[i], width[i] = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
        top[i], left[i] = data.draw(st.integers(0, rows - height[i])), data.draw(st.integers(0, columns - width[i]))
        plain[i][top[i] : top[i] + height[i], left[i] : left[i] + width[i]] = True
    cells = Blocks(top, left, height, width, (rows, columns)).cells()
    assert np.array_equal(cells, plain.reshape(2, 3, -1))


def test_corners() -> None:
    u = np.array([0.0, 0.5, 1 - 2**-32])
    assert corners(u, np.array([11, 11, 11]), 14, "inclusive").tolist() == [0, 2, 3]
    assert corners(u, np.array([11, 11, 11]), 14, "released").tolist() == [0, 1, 2]
    assert corners(u, np.array([14, 14, 14]), 14, "inclusive").tolist() == [0, 0, 0]
    assert corners(u, np.array([13, 13, 13]), 14, "released").tolist() == [0, 0, 0]


@pytest.mark.parametrize("edges", ["inclusive", "released"])
def test_corners_reach_as_far_as_said_and_are_uniform(edges: str) -> None:
    start = corners(draws(6000)[0], np.full(6000, 5), 14, edges)
    places = 10 if edges == "inclusive" else 9
    assert start.max() + 5 == reach((14, 14), edges)[0]
    assert stats.chisquare(np.bincount(start, minlength=places)).pvalue > 1e-3
    assert len(set(start.tolist())) == places


def test_fewest_left() -> None:
    # A 3 x 4 context in one corner of 4 x 4, a 2 x 2 target in the other: one row of the target is in the context.
    assert fewest_left([(3, 4)], [(2, 2)], (4, 4), stacked=False) == ((3, 4), 10)
    assert fewest_left([(3, 4), (4, 4)], [(1, 1), (2, 2)], (4, 4), stacked=False) == ((3, 4), 10)
    # 1 x 3 and 3 x 1 on top of one another are an L of 5; each alone takes 3.
    assert fewest_left([(4, 4)], [(1, 3), (3, 1)], (4, 4), stacked=True) == ((4, 4), 11)
    assert fewest_left([(4, 4)], [(1, 3), (3, 1)], (4, 4), stacked=False) == ((4, 4), 13)
    assert fewest_left([(3, 3)], [], (4, 4), stacked=True) == ((3, 3), 9)
