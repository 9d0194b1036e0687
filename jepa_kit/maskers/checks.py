"""Checks of options that maskers share; each raises ValueError at construction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jepa_kit.structures import Grid

SMALLEST_SIDE = 4
"""A grid has at least this many rows and columns."""

Range = tuple[float, float]
"""(low, high)."""


def check_grid(grid: Sequence[int]) -> Grid:
    """Return the grid as two ints.

    Raises:
        ValueError: it is not two numbers, or a side is below 4.
    """
    if len(grid) != 2 or min(grid) < SMALLEST_SIDE:
        raise ValueError(f"grid (={tuple(grid)}) must be (rows, columns) with at least {SMALLEST_SIDE} of each")
    return int(grid[0]), int(grid[1])


def check_at_least(name: str, value: int, least: int) -> int:
    """Return ``value``, or raise ValueError if it is below ``least``."""
    if value < least:
        raise ValueError(f"{name} (={value}) must be at least {least}")
    return value


def check_at_most(name: str, value: int, most: int, why: str) -> None:
    """Raise ValueError, whose message ends with ``why``, if ``value`` is above ``most``."""
    if value > most:
        raise ValueError(f"{name} (={value}) must be at most {most}{why}")


def check_ratio(name: str, ratio: float, grid: Grid) -> int:
    """Return the number of patches that a fraction of the grid is, rounded.

    Raises:
        ValueError: this is no patch or all patches, or the ratio is not finite.
    """
    patches = grid[0] * grid[1]
    if not math.isfinite(ratio) or not 0 < round(patches * ratio) < patches:
        raise ValueError(
            f"{name} (={ratio}) must leave a target and a context among the {patches} patches of a "
            f"{grid[0]} x {grid[1]} grid: from {1 / patches:.3g} to {1 - 1 / patches:.3g}"
        )
    return round(patches * ratio)


def check_range(name: str, values: Sequence[float], rule: str, is_valid: Callable[[float, float], bool]) -> Range:
    """Return (low, high) as floats; raise ValueError, with ``rule``, if they are not valid."""
    if len(values) != 2 or not is_valid(*values):
        raise ValueError(f"{name} (={tuple(values)}) must be (low, high){rule}")
    return float(values[0]), float(values[1])


def check_scale(name: str, scale: Sequence[float], grid: Grid) -> Range:
    """Return a range of areas, as fractions of the grid.

    Raises:
        ValueError: not 0 < low <= high <= 1, or the largest area is less than one patch.
    """
    low, high = check_range(name, scale, " with 0 < low <= high <= 1", lambda low, high: 0 < low <= high <= 1)
    patches = grid[0] * grid[1]
    if int(patches * high) < 1:
        raise ValueError(
            f"{name} (={(low, high)}) is less than one of the {patches} patches of a {grid[0]} x {grid[1]} grid; "
            f"its upper end must be at least {1 / patches:.2g}"
        )
    return low, high


def check_aspect_ratio(name: str, ratio: Sequence[float]) -> Range:
    """Return a range of height over width.

    Raises:
        ValueError: not 0 < low <= high, or not finite.
    """
    rule = ", height over width, with 0 < low <= high"
    return check_range(name, ratio, rule, lambda low, high: 0 < low <= high < math.inf)
