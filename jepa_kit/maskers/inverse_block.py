"""Inverse block masking: keep small square blocks, mask everything else (data2vec 2.0)."""

from __future__ import annotations

import numpy as np

from jepa_kit.maskers.blocks import Blocks
from jepa_kit.maskers.checks import check_at_least, check_at_most, check_grid, check_ratio
from jepa_kit.maskers.packing import keep_random, mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch


@MASKERS.register("inverse_block")
class InverseBlock:
    """Take a few square blocks, adjusted to a fixed number of patches, as context; the target is the rest.

    Source: data2vec 2.0 (Baevski et al. 2022, arXiv 2212.07525). Centres of blocks are drawn over the whole grid, as
    many as would cover (1 - ratio + adjust) of the patches without overlaps and edges, at which blocks are clipped.
    Then random patches are masked, or uncovered, until exactly 1 - ratio of them are left. Its image models have a
    ratio of 0.8, blocks of 3 x 3 and several masks per image. Departure: the recipe's predictor replaces its
    convolutional decoder.

    All sets of a kind have one length, so shapes are static. Results with I-JEPA: not published, not measured here.

    Args:
        grid: (H, W), each at least 4.
        ratio: fraction of masked patches, rounded to whole context patches.
        block_size: side of a kept block in patches, at most the shorter side of the grid.
        adjust: fraction of the patches that blocks cover in excess of the context.
        num_masks: number of masks of an image, each a context with its own target.

    Raises:
        ValueError: the grid is too small, an option is out of its range, or ``ratio`` leaves no target or no context.
    """

    def __init__(
        self, *, grid: Grid, ratio: float = 0.8, block_size: int = 3, adjust: float = 0.07, num_masks: int = 1
    ) -> None:
        self.grid = check_grid(grid)
        patches = self.grid[0] * self.grid[1]
        self.ratio, self.num_masks = ratio, check_at_least("num_masks", num_masks, 1)
        self.block_size = check_at_least("block_size", block_size, 1)
        check_at_most("block_size", block_size, min(self.grid), ", the shorter side of the grid")
        if not 0 <= adjust < 1:
            raise ValueError(f"adjust (={adjust}) must be in [0, 1)")
        self.context_length = patches - check_ratio("ratio", ratio, self.grid)
        """Number of patches of a context."""
        self.num_blocks = max(1, int(patches * (1 - ratio + adjust) / block_size**2))
        """Number of blocks of a context."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        k, m = self.num_blocks, self.num_masks
        u = uniforms(Stream.MASK, samples, 2 * k * m, seed=seed, epoch=epoch).T.reshape(2, k, m, -1)  # [2, K, M, B]
        sides = np.array(self.grid).reshape(2, 1, 1, 1)
        first = (u * sides).astype(np.int64) - self.block_size // 2  # may lie outside the grid; clipped below
        start = np.maximum(first, 0)
        size = np.minimum(first + self.block_size, sides) - start
        kept = Blocks(start[0], start[1], size[0], size[1], self.grid).cells().any(axis=0)  # [M, B, N]
        keys = uniforms(Stream.MASK_DROP, samples, m * kept.shape[-1], seed=seed, epoch=epoch)  # [B, M * N]
        keys = np.moveaxis(keys.reshape(len(samples), m, -1), 1, 0)  # [M, B, N]
        # Keep the smallest keys: random patches of the blocks first, others only if the blocks have too few.
        context = keep_random(np.ones_like(kept), self.context_length, keys + ~kept)
        return mask_batch(context, ~context, self.grid, of=range(m))
