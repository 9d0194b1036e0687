"""What the maskers share in checking their options."""

from __future__ import annotations

import pytest

from jepa_kit.maskers.checks import check_aspect_ratio, check_at_least, check_grid, check_scale


def test_what_passes_comes_back_as_numbers() -> None:
    assert check_grid([4, 9]) == (4, 9)
    assert check_at_least("count", 1, 1) == 1
    assert check_scale("scale", [0.5, 1], (4, 4)) == (0.5, 1.0)
    assert check_scale("scale", (1 / 16, 1 / 16), (4, 4)) == (1 / 16, 1 / 16)
    assert check_aspect_ratio("ratio", [1, 1]) == (1.0, 1.0)


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (0, 0), (14,), (4, 4, 4)])
def test_grid(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        check_grid(grid)
    assert str(error.value) == f"grid (={grid}) must be (rows, columns) with at least 4 of each"


def test_at_least() -> None:
    with pytest.raises(ValueError, match=r"^num_targets \(=0\) must be at least 1$"):
        check_at_least("num_targets", 0, 1)


@pytest.mark.parametrize("scale", [(0.0, 0.5), (-0.1, 0.5), (0.5, 0.4), (0.5, 1.1), (0.5,), (float("nan"), 0.5)])
def test_scale(scale: tuple[float, ...]) -> None:
    with pytest.raises(ValueError) as error:
        check_scale("target_scale", scale, (14, 14))
    assert str(error.value) == f"target_scale (={scale}) must be (low, high) with 0 < low <= high <= 1"


def test_scale_below_a_patch() -> None:
    with pytest.raises(ValueError) as error:
        check_scale("target_scale", (0.01, 0.05), (4, 4))
    assert str(error.value) == (
        "target_scale (=(0.01, 0.05)) is less than one of the 16 patches of a 4 x 4 grid; "
        "its upper end must be at least 0.062"
    )


@pytest.mark.parametrize("ratio", [(0.0, 1.0), (1.5, 0.75), (1.0,), (1.0, float("inf")), (float("nan"), 1.0)])
def test_aspect_ratio(ratio: tuple[float, ...]) -> None:
    with pytest.raises(ValueError) as error:
        check_aspect_ratio("target_aspect_ratio", ratio)
    assert str(error.value) == (
        f"target_aspect_ratio (={ratio}) must be (low, high), height over width, with 0 < low <= high"
    )
