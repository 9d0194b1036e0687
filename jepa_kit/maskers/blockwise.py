"""Blockwise masking: place blocks one by one until a fixed fraction of the image is masked (BEiT, data2vec)."""

from __future__ import annotations

import numpy as np

from jepa_kit.maskers.blocks import Blocks, BoolArray, corners
from jepa_kit.maskers.checks import check_aspect_ratio, check_grid, check_ratio
from jepa_kit.maskers.packing import keep_first, lengths_of, mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch

ROUNDS = 15
"""Maximum number of blocks of an image; the rest is taken from one end of the image (see ``Blockwise``)."""
AT_FIRST = 7
"""Blocks that are drawn for every image; few images need more."""


@MASKERS.register("blockwise")
class Blockwise:
    """Mask a union of blocks, the one target of an image; the rest is the context.

    Source: BEiT (Bao et al. 2021, arXiv 2106.08254, algorithm 1), with a ratio of 0.4; data2vec (Baevski et al. 2022,
    arXiv 2202.03555) takes 0.6. A block's area is uniform between ``min_scale`` of the grid and what is still
    missing, its aspect ratio log-uniform, its place uniform. Departures: the paper masks at least the ratio, its code
    at most; here it is exactly the ratio, so that shapes are static: the last block contributes its first or its last
    patches in raster order, with equal probability. After 15 blocks, the next block is the whole grid.

    Results with I-JEPA: not published, not measured here.

    Args:
        grid: (H, W), each at least 4.
        ratio: fraction of masked patches, rounded to whole patches.
        min_scale: minimum area of a block over the grid's, 0 to ``ratio``; BEiT has 16 of 196 patches.
        aspect_ratio: height over width of a block. A block that does not fit is clipped to the grid.

    Raises:
        ValueError: the grid is too small, an option is out of its range, or ``ratio`` leaves no target or no context.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        ratio: float = 0.4,
        min_scale: float = 0.08,
        aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        self.grid = check_grid(grid)
        self.ratio, self.num_targets = ratio, check_ratio("ratio", ratio, self.grid)
        """Number of masked patches of an image."""
        if not 0 < min_scale <= ratio:
            raise ValueError(f"min_scale (={min_scale}) must be above 0 and at most ratio (={ratio})")
        self.min_area = max(1.0, min_scale * self.grid[0] * self.grid[1])
        self.aspect_ratio = check_aspect_ratio("aspect_ratio", aspect_ratio)

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        samples = np.asarray(samples)
        u = uniforms(Stream.MASK, samples, 4 * AT_FIRST + 1, seed=seed, epoch=epoch).T  # [4 * AT_FIRST + 1, B]
        from_last, draws = u[0] < 0.5, u[1:].reshape(AT_FIRST, 4, -1)  # of each block: area, ratio, top, left
        low, high = np.log(self.aspect_ratio)
        sides = np.array(self.grid)[:, None]
        shape = len(samples), int(sides.prod())
        masked, last = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)  # masked before, and by, the last block
        quota = np.full(len(masked), self.num_targets)  # of the last block
        at = np.arange(len(masked))  # indices of unfinished images; for each of them:
        so_far, missing = np.zeros_like(masked), quota.copy()
        for k in range(ROUNDS + 1):
            if k < ROUNDS:
                if k == AT_FIRST:
                    u = uniforms(Stream.MASK, samples[at], 4 * ROUNDS + 1, seed=seed, epoch=epoch).T
                    draws = np.empty((ROUNDS, 4, len(samples)))
                    draws[:, :, at] = u[1:].reshape(ROUNDS, 4, -1)
                drawn = draws[k].take(at, axis=1)
                side = np.sqrt(self.min_area + drawn[0] * np.maximum(missing - self.min_area, 0))
                root = np.exp((low + drawn[1] * (high - low)) / 2)  # of height over width
                size = np.rint(np.array((side * root, side / root)))  # [2, B]
                size = np.minimum(np.maximum(size, 1), sides).astype(np.int64)
                top, left = corners(drawn[2:], size, sides, "inclusive")
                new = Blocks(top, left, size[0], size[1], self.grid).cells()
                np.greater(new, so_far, out=new)  # and not masked yet
            else:
                new = ~so_far
            count = lengths_of(new)
            done = np.flatnonzero(count >= missing)
            if done.size:
                masked[at[done]], last[at[done]], quota[at[done]] = so_far[done], new[done], missing[done]
                rest = np.flatnonzero(count < missing)
                at, missing, count = at[rest], missing[rest], count[rest]
                so_far, new = so_far[rest], new[rest]
                if not at.size:
                    break
            so_far |= new
            missing -= count
        masked |= _cut(last, quota, from_last)
        return mask_batch(~masked[None], masked[None], self.grid)


def _cut(cells: BoolArray, count: IntArray, from_last: BoolArray) -> BoolArray:
    """Return the first or last ``count`` [B] patches of each set [B, N]."""
    cells = np.where(from_last[:, None], cells[:, ::-1], cells)
    cells = keep_first(cells, count[:, None])
    return np.where(from_last[:, None], cells[:, ::-1], cells)
