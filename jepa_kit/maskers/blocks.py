"""Rectangular blocks of patches: sizes, places, and the patches they cover.

Legend of shapes:

    B  images in a batch        H, W  rows and columns of patches, the grid
    K  blocks of an image       N     patches of an image, H * W

Sizes come from two numbers in [0, 1): one for the scale (area over the grid's), one for the aspect ratio (height
over width):

    area   = H * W * scale
    height = round(sqrt(area * ratio)), width = round(sqrt(area / ratio))

``edges`` decides what happens at the borders of the grid:

    inclusive  a side that is too long is cut to the grid's and the other side grows, which keeps the area; every
               place inside the grid is possible
    released   the area is first rounded down to whole patches; height stays below H and width below W; the corner is
               drawn below H - height and W - width, exclusively. So no block ever touches the last row or the last
               column (facebookresearch/ijepa, commit 52c1ae9)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jepa_kit.maskers.checks import Range, check_aspect_ratio, check_scale
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.structures import Grid

BoolArray = NDArray[np.bool_]
Edges = Literal["inclusive", "released"]
Size = tuple[int, int]
"""(height, width) in patches."""

_SEGMENTS = 512
"""Segments of the unit interval over which sizes are bounded."""


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a block, a pure function from uniform numbers to (height, width).

    Args:
        grid: (H, W).
        scale: range of the block's area over the grid's.
        aspect_ratio: range of height over width.
        edges: see the module.
    """

    grid: Grid
    scale: Range
    aspect_ratio: Range
    edges: Edges

    def size(self, u_scale: FloatArray, u_aspect: FloatArray) -> tuple[IntArray, IntArray]:
        """Return height and width of blocks, of the same shape as the arguments, which are in [0, 1].

        ``size(u, u)`` is the release's coupling: one number for both draws, so that larger blocks are always taller.
        """
        area = self._area(u_scale)
        low, high = self.aspect_ratio
        return self._height_width(area, low + u_aspect * (high - low))

    def _area(self, u: FloatArray) -> FloatArray:
        low, high = self.scale
        patches = self.grid[0] * self.grid[1]
        area = patches * (low + u * (high - low))
        return np.maximum(np.floor(area) if self.edges == "released" else area, 1.0)

    def _height_width(self, area: FloatArray, ratio: FloatArray) -> tuple[IntArray, IntArray]:
        rows, columns = self.grid
        height, width = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if self.edges == "inclusive":
            # If one side does not fit, the other one grows to keep the area.
            height, width = np.maximum(height, area / columns), np.maximum(width, area / rows)
        margin = 1 if self.edges == "released" else 0
        height = np.clip(np.rint(height), 1, rows - margin)
        width = np.clip(np.rint(width), 1, columns - margin)
        return height.astype(np.int64), width.astype(np.int64)

    def bounds(self, *, largest: bool, coupled: bool) -> list[Size]:
        """Return sizes (height, width) such that every block fits into one of them (or contains one, if smallest).

        Height grows with area and ratio; width grows with area and shrinks with ratio. So over a short segment of
        ratios both are bounded by their values at its ends, and only the largest (smallest) area matters, unless the
        ratio is coupled to it.
        """
        u = np.linspace(0.0, 1.0, _SEGMENTS + 1)
        ratio = self.aspect_ratio[0] + u * (self.aspect_ratio[1] - self.aspect_ratio[0])
        area = self._area(u) if coupled else self._area(np.full_like(u, float(largest)))
        short, tall = ratio[:-1], ratio[1:]
        end = area[1:] if largest else area[:-1]
        height, _ = self._height_width(end, tall if largest else short)
        _, width = self._height_width(end, short if largest else tall)
        return sorted(set(zip(height.tolist(), width.tolist(), strict=True)))


def block_shape(
    name: str, grid: Grid, scale: Sequence[float], aspect_ratio: Sequence[float], edges: Edges = "inclusive"
) -> BlockShape:
    """Return the shape of options ``<name>_scale`` and ``<name>_aspect_ratio``; raise ValueError if one is invalid."""
    checked = check_scale(f"{name}_scale", scale, grid), check_aspect_ratio(f"{name}_aspect_ratio", aspect_ratio)
    return BlockShape(grid, *checked, edges)


@dataclass(frozen=True)
class Blocks:
    """Blocks of a batch of images, inside the grid: [K, B] int64 each, in patches."""

    top: IntArray
    left: IntArray
    height: IntArray
    width: IntArray
    grid: Grid

    def cells(self) -> BoolArray:
        """Return the patches of each block, [K, B, N]."""
        below, right = _half_planes(self.grid)
        # A range is the XOR of two half planes; taking whole rows of a table makes this fast.
        rows = below.take(self.top, axis=0)
        rows ^= below.take(self.top + self.height, axis=0)
        columns = right.take(self.left, axis=0)
        columns ^= right.take(self.left + self.width, axis=0)
        rows &= columns
        return rows


@lru_cache(maxsize=16)
def _half_planes(grid: Grid) -> tuple[BoolArray, BoolArray]:
    """Return [H + 1, N] and [W + 1, N]: patches from row (column) k on, for k = 0 to H (W)."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])  # [N] each
    return row >= np.arange(grid[0] + 1)[:, None], column >= np.arange(grid[1] + 1)[:, None]


def corners(u: FloatArray, size: IntArray, side: int | IntArray, edges: Edges) -> IntArray:
    """Return the first row (or column) of blocks, uniform over the places that ``edges`` allows.

    Args:
        u: in [0, 1).
        size: height (or width), of the same shape.
        side: H (or W), or an array of them.
    """
    places = side - size + (1 if edges == "inclusive" else 0)
    return (u * places).astype(np.int64)


def reach(grid: Grid, edges: Edges) -> Grid:
    """Return the number of rows and columns that blocks can reach."""
    margin = 1 if edges == "released" else 0
    return grid[0] - margin, grid[1] - margin


def fewest_left(contexts: Sequence[Size], targets: Sequence[Size], within: Grid, *, stacked: bool) -> tuple[Size, int]:
    """Return the worst case of contexts in one corner of a rectangle and targets in the opposite one.

    Args:
        contexts: possible sizes (height, width) of contexts.
        targets: possible sizes of targets; may be empty.
        within: height and width of the rectangle.
        stacked: whether an image's targets may have several of the sizes at once, in the same corner.

    Returns:
        The context's size, and the number of patches left in it.
    """
    rows, columns = within
    free: BoolArray = np.ones((max(len(targets), 1), rows, columns), dtype=bool)
    for cells, (h, w) in zip(free, targets, strict=False):
        cells[:h, :w] = False
    if stacked:
        free = np.logical_and.reduce(free, axis=0, keepdims=True)
    left = {size: int(free[:, rows - size[0] :, columns - size[1] :].sum(axis=(1, 2)).min()) for size in contexts}
    return min(left.items(), key=lambda item: item[1])
