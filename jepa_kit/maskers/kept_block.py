"""Kept-block masking: one block is the context, everything else the target (CAPI)."""

from __future__ import annotations

import numpy as np

from jepa_kit.maskers.blocks import Blocks, corners
from jepa_kit.maskers.checks import check_aspect_ratio, check_grid, check_ratio
from jepa_kit.maskers.packing import keep_first, mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch


@MASKERS.register("kept_block")
class KeptBlock:
    """Keep one block of an image as context; the target is the rest.

    Source: CAPI (Darcet et al. 2025, arXiv 2502.08769), "inverse block masking", with a ratio of 0.65. The aspect ratio
    is log-uniform, as far as a block of this area fits into the grid; its sides are rounded up, its place is uniform,
    and its last patches in raster order are left out until the number is exact. With ``roll``, rows and columns are
    then rotated by uniform numbers, so that every patch is kept equally often. (CAPI predicts 5 % of the targets.)

    All sets of a kind have one length, so shapes are static. Results with I-JEPA: not published, not measured here.

    Args:
        grid: (H, W), each at least 4.
        ratio: fraction of masked patches, rounded to whole patches.
        aspect_ratio: height over width of the block.
        roll: whether to rotate rows and columns.

    Raises:
        ValueError: the grid is too small, an option is out of its range, or ``ratio`` leaves no target or no context.
    """

    def __init__(
        self, *, grid: Grid, ratio: float = 0.65, aspect_ratio: tuple[float, float] = (0.5, 2.0), roll: bool = True
    ) -> None:
        self.grid = check_grid(grid)
        rows, columns = self.grid
        self.ratio, self.roll = ratio, roll
        self.context_length = kept = rows * columns - check_ratio("ratio", ratio, self.grid)
        """Number of patches of a context."""
        self.aspect_ratio = np.clip(check_aspect_ratio("aspect_ratio", aspect_ratio), kept / columns**2, rows**2 / kept)

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        rows, columns = self.grid
        u = uniforms(Stream.MASK, samples, 5, seed=seed, epoch=epoch).T[:, None]  # [5, 1, B]
        low, high = np.log(self.aspect_ratio)
        root = np.exp((low + u[0] * (high - low)) / 2)  # of height over width
        side = self.context_length**0.5
        height = np.minimum(np.ceil(side * root), rows).astype(np.int64)
        width = np.minimum(np.ceil(side / root), columns).astype(np.int64)
        top, left = corners(u[1], height, rows, "inclusive"), corners(u[2], width, columns, "inclusive")
        block = keep_first(Blocks(top, left, height, width, self.grid).cells(), self.context_length)  # [1, B, N]
        if self.roll:
            row, column = np.divmod(np.arange(rows * columns), columns)
            down, right = ((u[k] * n).astype(np.int64).T for k, n in ((3, rows), (4, columns)))  # [B, 1] each
            source = (row - down) % rows * columns + (column - right) % columns  # [B, N]
            block = np.take_along_axis(block, source[None], axis=-1)
        return mask_batch(block, np.logical_not(block), self.grid)
