"""Random masking: targets are patches drawn one by one, the rest is the context."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import Random


@pytest.mark.parametrize(
    ("grid", "ratio", "count"), [((14, 14), 0.6, 118), ((4, 4), 0.6, 10), ((5, 7), 0.75, 26), ((4, 9), 0.02, 1)]
)
def test_so_many_patches_and_the_rest(grid: tuple[int, int], ratio: float, count: int) -> None:
    masker = Random(grid=grid, ratio=ratio)
    patches = grid[0] * grid[1]
    assert masker.num_targets == count
    masks = masker(np.arange(100), seed=0, epoch=0)
    assert list(masks.targets.lengths) == [count] * 100
    assert list(masks.context.lengths) == [patches - count] * 100
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(patches))


def test_every_patch_and_every_pair_is_as_likely() -> None:
    """Against draws without replacement: 10 of 16 patches. A patch is a target with 10/16, two with 10/16 * 9/15."""
    images = 8000
    masks = Random(grid=(4, 4))(np.arange(images), seed=0, epoch=0)
    table = np.zeros((images, 16))
    np.put_along_axis(table, masks.targets.index.view(images, 10).numpy(), 1, axis=1)
    single, pair = 10 / 16, 10 / 16 * 9 / 15
    z = (table.sum(0) - images * single) / np.sqrt(images * single * (1 - single))
    # Counts of a row add up: 15 free numbers, and each variance shrunk by 15/16.
    assert stats.chi2.sf((z**2).sum() * 15 / 16, 15) > 1e-3
    both = (table.T @ table)[np.triu_indices(16, 1)]
    z = (both - images * pair) / np.sqrt(images * pair * (1 - pair))
    assert np.abs(z).max() < stats.norm.isf(1e-3 / 2 / len(z))


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.99, 1.0, -0.5, 2.0, float("inf"), float("nan")])
def test_a_ratio_that_leaves_nothing(ratio: float) -> None:
    with pytest.raises(ValueError) as error:
        Random(grid=(4, 4), ratio=ratio)
    assert str(error.value) == (
        f"ratio (={ratio}) must leave a target and a context among the 16 patches of a 4 x 4 grid: from 0.0625 to 0.938"
    )


def test_grid() -> None:
    with pytest.raises(ValueError, match=r"^grid \(=\(2, 8\)\) must be"):
        Random(grid=(2, 8))
