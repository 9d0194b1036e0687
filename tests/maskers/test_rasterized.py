"""Rasterized masking: one quadrant is the context, the others are targets."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import Rasterized


def quadrants(rows: int, columns: int) -> list[list[int]]:
    """Patches of the four quadrants, in raster order."""
    halves = [(range(rows // 2), range(rows // 2, rows)), (range(columns // 2), range(columns // 2, columns))]
    return [[r * columns + c for r in vertical for c in across] for vertical in halves[0] for across in halves[1]]


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (5, 7), (9, 4)])
def test_quadrants(grid: tuple[int, int]) -> None:
    images = 200
    masks = Rasterized(grid=grid)(np.arange(images), seed=0, epoch=0)
    plain = quadrants(*grid)
    context, targets = masks.context.split(), masks.targets.split()
    assert len(context) == images
    assert len(targets) == 3 * images
    seen = set()
    for b in range(images):
        here = plain.index(context[b].tolist())
        seen.add(here)
        others = [q for i, q in enumerate(plain) if i != here]
        assert [targets[m * images + b].tolist() for m in range(3)] == others
    assert seen == {0, 1, 2, 3}


def test_each_quadrant_is_as_likely() -> None:
    masks = Rasterized(grid=(4, 4))(np.arange(8000), seed=0, epoch=0)
    first = masks.context.index.view(8000, 4)[:, 0]
    assert stats.chisquare(np.unique(first, return_counts=True)[1]).pvalue > 1e-3


def test_grid() -> None:
    with pytest.raises(ValueError, match=r"^grid \(=\(4, 3\)\) must be"):
        Rasterized(grid=(4, 3))
