"""Blockwise masking: place blocks one by one until a fixed fraction of the image is masked (BEiT, data2vec)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jepa_kit.maskers.blocks import Blocks, BoolArray, corners
from jepa_kit.maskers.checks import check_aspect_ratio, check_grid, check_range, check_ratio
from jepa_kit.maskers.packing import keep_first, lengths_of, mask_batch
from jepa_kit.registry import MASKERS, check_choice
from jepa_kit.rng import FloatArray, IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch

ROUNDS = 15
"""Maximum number of blocks of an image; the rest is taken from one end of the image (see ``Blockwise``)."""
AT_FIRST = 7
"""Blocks that are drawn for every image; few images need more."""
TRIES = 10
"""Refusals in succession after which ``at_most`` ends."""

Count = Literal["exact", "at_most"]


@MASKERS.register("blockwise")
class Blockwise:
    """Mask a union of blocks, the one target of an image; the rest is the context.

    Source: BEiT (Bao et al. 2021, arXiv 2106.08254, algorithm 1), with a ratio of 0.4; data2vec (Baevski et al. 2022,
    arXiv 2202.03555) takes 0.6, iBOT (Zhou et al. 2021, arXiv 2111.07832) 0.1 to 0.5. A block's area is uniform between
    ``min_scale`` of the grid and what is still missing, its aspect ratio log-uniform, its place uniform. The paper
    masks at least the ratio, the released codes at most. Here ``count`` decides:

    - ``exact`` (a departure): exactly the ratio, so that shapes are static. The last block contributes its first or its
      last patches in raster order, with equal probability. A block that does not fit is clipped to the grid. After 15
      blocks, the next block is the whole grid.
    - ``at_most``: as in the released codes. A block is refused if it is as high or as wide as the grid, adds no patch,
      or adds more than are missing; after ten refusals in succession the mask is complete. So sets differ in length (on
      average 74.5 patches for 75 of 196). Departures: an image without any patch gets some from one end, as under
      ``exact``, and the released iBOT rounds its ratio down.

    Counts of the released codes on a grid of 14 x 14: BEiT 75 patches (``ratio`` 0.383), data2vec 120 (0.612), CAE 98
    (0.5), with blocks of at least 16 (``min_scale`` 0.0816).

    Results with I-JEPA: not published, not measured here.

    Args:
        grid: (H, W), each at least 4.
        ratio: fraction of masked patches, rounded to whole patches; or its range, from which each image's is drawn.
        min_scale: minimum area of a block over the grid's, 0 to the lowest ``ratio``.
        aspect_ratio: height over width of a block.
        count: see above.

    Raises:
        ValueError: the grid is too small, an option is out of its range, or ``ratio`` leaves no target or no context.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        ratio: float | tuple[float, float] = 0.4,
        min_scale: float = 0.08,
        aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
        count: Count = "exact",
    ) -> None:
        self.grid = check_grid(grid)
        low, high = ratio if isinstance(ratio, Sequence) else (ratio, ratio)
        self.ratio = check_range("ratio", (low, high), " with low <= high", lambda low, high: low <= high)
        for end in self.ratio:
            check_ratio("ratio", end, self.grid)
        if not 0 < min_scale <= low:
            raise ValueError(f"min_scale (={min_scale}) must be above 0 and at most ratio (={low})")
        self.min_area = max(1.0, min_scale * self.grid[0] * self.grid[1])
        self.aspect_ratio = check_aspect_ratio("aspect_ratio", aspect_ratio)
        check_choice("count", count, Count)
        self.count = count

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        samples = np.asarray(samples)
        low, high = self.ratio
        ratio = np.full(len(samples), low)
        if low < high:
            ratio += (high - low) * uniforms(Stream.MASK_SIZE, samples, 1, seed=seed, epoch=epoch)[:, 0]
        quota = np.rint(ratio * (self.grid[0] * self.grid[1])).astype(np.int64)  # [B]
        draw = self._exact if self.count == "exact" else self._at_most
        masked = draw(samples, quota, seed=seed, epoch=epoch)
        return mask_batch(~masked[None], masked[None], self.grid)

    def _size(self, u: FloatArray, area: FloatArray) -> FloatArray:
        """Return height and width [2, B] in whole patches, from numbers for the aspect ratio [B] and areas [B]."""
        low, high = np.log(self.aspect_ratio)
        side, root = np.sqrt(area), np.exp((low + u * (high - low)) / 2)  # of height over width
        return np.maximum(np.rint(np.array((side * root, side / root))), 1)

    def _blocks(self, u: FloatArray, size: FloatArray) -> BoolArray:
        """Return the patches [B, N] of blocks clipped to the grid, from numbers for their corners [2, B]."""
        sides = np.array(self.grid)[:, None]
        clipped = np.minimum(size, sides).astype(np.int64)
        top, left = corners(u, clipped, sides, "inclusive")
        return Blocks(top, left, clipped[0], clipped[1], self.grid).cells()

    def _exact(self, samples: IntArray, quota: IntArray, *, seed: int, epoch: int) -> BoolArray:
        """Return masks [B, N] of exactly ``quota`` [B] patches."""
        u = uniforms(Stream.MASK, samples, 4 * AT_FIRST + 1, seed=seed, epoch=epoch).T  # [4 * AT_FIRST + 1, B]
        from_last, draws = u[0] < 0.5, u[1:].reshape(AT_FIRST, 4, -1)  # of each block: area, ratio, top, left
        shape = len(samples), self.grid[0] * self.grid[1]
        masked, last = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)  # masked before, and by, the last block
        at = np.arange(len(masked))  # indices of unfinished images; for each of them:
        so_far, missing = np.zeros_like(masked), quota.copy()
        quota = quota.copy()  # of the last block
        for k in range(ROUNDS + 1):
            if k < ROUNDS:
                if k == AT_FIRST:
                    u = uniforms(Stream.MASK, samples[at], 4 * ROUNDS + 1, seed=seed, epoch=epoch).T
                    draws = np.empty((ROUNDS, 4, len(samples)))
                    draws[:, :, at] = u[1:].reshape(ROUNDS, 4, -1)
                drawn = draws[k].take(at, axis=1)
                area = self.min_area + drawn[0] * np.maximum(missing - self.min_area, 0)
                new = self._blocks(drawn[2:], self._size(drawn[1], area))
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
        return masked | _cut(last, quota, from_last)

    def _at_most(self, samples: IntArray, quota: IntArray, *, seed: int, epoch: int) -> BoolArray:
        """Return masks [B, N] of 1 to ``quota`` [B] patches."""
        masked = np.zeros((len(samples), self.grid[0] * self.grid[1]), dtype=bool)
        missing, refusals = quota.copy(), np.zeros_like(quota)
        at = np.arange(len(samples))  # indices of unfinished images
        draws = np.empty((TRIES, 4, len(samples)))  # of each block: area, ratio, top, left
        k = 0
        while at.size:
            if k % TRIES == 0:
                u = uniforms(Stream.MASK, samples[at], 4 * (k + TRIES) + 1, seed=seed, epoch=epoch)[:, 4 * k + 1 :]
                draws[:, :, at] = u.T.reshape(TRIES, 4, -1)
            drawn = draws[k % TRIES].take(at, axis=1)
            size = self._size(drawn[1], self.min_area + drawn[0] * (missing[at] - self.min_area))
            new = self._blocks(drawn[2:], size) & ~masked[at]
            added = lengths_of(new)
            fits = (size < np.array(self.grid)[:, None]).all(axis=0) & (added > 0) & (added <= missing[at])
            masked[at[fits]] |= new[fits]
            missing[at[fits]] -= added[fits]
            refusals[at] = np.where(fits, 0, refusals[at] + 1)
            at = at[(missing[at] > 0) & (refusals[at] < TRIES)]
            k += 1
        if (none := np.flatnonzero(missing == quota)).size:
            from_last = uniforms(Stream.MASK, samples[none], 1, seed=seed, epoch=epoch)[:, 0] < 0.5
            masked[none] = _cut(~masked[none], quota[none], from_last)
        return masked


def _cut(cells: BoolArray, count: IntArray, from_last: BoolArray) -> BoolArray:
    """Return the first or last ``count`` [B] patches of each set [B, N]."""
    cells = np.where(from_last[:, None], cells[:, ::-1], cells)
    cells = keep_first(cells, count[:, None])
    return np.where(from_last[:, None], cells[:, ::-1], cells)
