"""Causal masking: a raster prefix is the context, what follows it the target."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import Causal

LEVEL = 1e-3
"""Of every statistical test here; the seeds are fixed."""


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (5, 31)])
def test_a_prefix_and_the_rest(grid: tuple[int, int]) -> None:
    masks = Causal(grid=grid)(np.arange(200), seed=0, epoch=0)
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert [*context.tolist(), *target.tolist()] == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(("ratio", "least", "most"), [((0.0, 1.0), 1, 35), ((0.25, 0.5), 9, 18), ((0.5, 0.5), 18, 18)])
def test_every_length_is_equally_likely(ratio: tuple[float, float], least: int, most: int) -> None:
    masks = Causal(grid=(6, 6), context_ratio=ratio)(np.arange(9000), seed=0, epoch=0)
    counts = np.bincount(masks.context.lengths.on_host)
    assert np.flatnonzero(counts).tolist() == list(range(least, most + 1))
    assert least == most or stats.chisquare(counts[least:]).pvalue > LEVEL


def test_a_target_of_fixed_length_comes_next() -> None:
    masks = Causal(grid=(6, 6), target_length=5)(np.arange(500), seed=0, epoch=0)
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert target.tolist() == list(range(len(context), len(context) + 5))
    assert set(masks.context.lengths) == set(range(1, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 6)}, "grid (=(3, 6)) must be (rows, columns) with at least 4 of each"),
        ({"context_ratio": (0.5, 0.2)}, "context_ratio (=(0.5, 0.2)) must be (low, high) with 0 <= low <= high <= 1"),
        ({"context_ratio": (0.5,)}, "context_ratio (=(0.5,)) must be (low, high) with 0 <= low <= high <= 1"),
        ({"target_length": 0}, "target_length (=0) must be at least 1"),
        (
            {"target_length": 36},
            "target_length (=36) must be at most 35: a grid of 6 x 6 has 36 patches, one of which is context",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Causal(**{"grid": (6, 6), **options})
    assert str(error.value) == message
