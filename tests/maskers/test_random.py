"""Random masking: targets are patches drawn one by one, the rest is the context."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize(("ratio", "count"), [(0.6, 30), (0.5, 25), (0.001, 1), (0.97, 48)])
def test_units_are_drawn_whole_and_rounded_up(ratio: float, count: int) -> None:
    """224 px in patches of 16 px and units of 32 px, as in SimMIM: 7 x 7 units of 2 x 2 patches."""
    masker = Random(grid=(14, 14), ratio=ratio, unit=32, patch_size=16)
    assert masker.num_targets == 4 * count
    masks = masker(np.arange(50), seed=0, epoch=0)
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        table = np.zeros((7, 2, 7, 2), dtype=int)
        table.reshape(-1)[target.numpy()] = 1
        per_unit = table.sum((1, 3))
        assert set(per_unit.ravel()) <= {0, 4}
        assert (per_unit == 4).sum() == count
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(196))


def test_every_unit_is_as_likely() -> None:
    images = 4000
    masks = Random(grid=(8, 12), unit=32, patch_size=8, ratio=0.5)(np.arange(images), seed=0, epoch=0)
    counts = np.bincount(masks.targets.index, minlength=96).reshape(2, 4, 3, 4)
    assert (counts == counts[:, :1, :, :1]).all()
    z = (counts[:, 0, :, 0].ravel() - images / 2) / np.sqrt(images / 4)
    assert stats.chi2.sf((z**2).sum() * 5 / 6, 5) > 1e-3


def test_a_unit_of_one_patch_draws_patches() -> None:
    patches, units = Random(grid=(8, 8), ratio=0.5), Random(grid=(8, 8), ratio=0.5, unit=4, patch_size=4)
    first, second = (masker(np.arange(9), seed=1, epoch=2).targets.index for masker in (patches, units))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 32}, "unit (=32) is in pixels, so it needs patch_size"),
        (
            {"unit": 24, "patch_size": 16},
            "unit (=24) must be a multiple of patch_size (=16) and divide both sides of the image (128 x 192)",
        ),
        ({"unit": 80, "patch_size": 16}, "unit (=80) must be a multiple of patch_size (=16) and divide both sides"),
        ({"unit": 0, "patch_size": 16}, "unit (=0) must be a multiple of patch_size (=16) and divide both sides"),
        (
            {"unit": 64, "patch_size": 16, "ratio": 0.9},
            "ratio (=0.9) must be above 0 and leave a context among the 6 units of an image: at most 0.833",
        ),
        ({"unit": 64, "patch_size": 16, "ratio": 0.0}, "ratio (=0.0) must be above 0 and leave a context among"),
        ({"unit": 64, "patch_size": 16, "ratio": float("nan")}, "ratio (=nan) must be above 0 and leave a context"),
    ],
)
def test_units_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Random(grid=(8, 12), **options)
    assert str(error.value).startswith(message)


def test_grid() -> None:
    with pytest.raises(ValueError, match=r"^grid \(=\(2, 8\)\) must be"):
        Random(grid=(2, 8))
