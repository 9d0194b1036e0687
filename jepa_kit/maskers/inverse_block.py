"""Inverse block masking: small square blocks are what is kept; all else is the target (data2vec 2.0)."""

from __future__ import annotations

import numpy as np

from jepa_kit.maskers.blocks import Blocks
from jepa_kit.maskers.checks import check_at_least, check_grid, check_ratio
from jepa_kit.maskers.packing import keep_random, mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch


@MASKERS.register("inverse_block")
class InverseBlock:
    """The context is a few square blocks, brought to a fixed number of patches; the target is the rest.

    Source: data2vec 2.0 (Baevski et al. 2022, arXiv 2212.07525). Centres of blocks are drawn over the whole grid, so
    many that their blocks would hold (1 - ratio + adjust) of the patches if they neither overlapped nor stuck out;
    single patches are then masked, or uncovered, at random until exactly 1 - ratio of them are left. Blocks at an edge
    are cut off there. Its image models have a ratio of 0.8, blocks of 3 x 3 and several masks an image. Departure:
    predictions come from the recipe's predictor, not from a convolutional decoder.

    All sets of a kind have one length, so shapes are static. Results with I-JEPA: not published, not yet measured here.

    Args:
        grid: (H, W), each at least 4.
        ratio: share of the patches that are masked, rounded to whole patches of context.
        block_size: side of a kept block in patches, at most the shorter side of the grid.
        adjust: share of the patches by which blocks may hold more than the context needs.
        num_masks: masks of an image, each a context with the target of its own.

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
        if block_size > min(self.grid):
            raise ValueError(
                f"block_size (={block_size}) must be at most {min(self.grid)}, the shorter side of the grid"
            )
        if not 0 <= adjust < 1:
            raise ValueError(f"adjust (={adjust}) must be in [0, 1)")
        self.context_length = patches - check_ratio("ratio", ratio, self.grid)
        """Patches of each context."""
        self.num_blocks = max(1, int(patches * (1 - ratio + adjust) / block_size**2))
        """Blocks of each context."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """The masks of a batch; see ``Masker``. ``step`` is not looked at."""
        rows, columns = self.grid
        k, m = self.num_blocks, self.num_masks
        u = uniforms(Stream.MASK, samples, 2 * k * m, seed=seed, epoch=epoch).T.reshape(2, k, m, -1)  # [2, K, M, B]
        before = self.block_size // 2
        ends = []
        for numbers, side in ((u[0], rows), (u[1], columns)):
            first = (numbers * side).astype(np.int64) - before  # a block sticks out before it is cut off
            ends.append((np.maximum(first, 0), np.minimum(first + self.block_size, side)))
        (top, bottom), (left, right) = ends
        kept = Blocks(top, left, bottom - top, right - left, self.grid).cells().any(axis=0)  # [M, B, N]
        keys = uniforms(Stream.MASK_DROP, samples, m * kept.shape[-1], seed=seed, epoch=epoch)  # [B, M * N]
        keys = np.moveaxis(keys.reshape(len(samples), m, -1), 1, 0)  # [M, B, N]
        # The smallest keys win: at random among the blocks' patches, and the others only after all of these.
        context = keep_random(np.ones_like(kept), self.context_length, keys + ~kept)
        return mask_batch(context, ~context, self.grid, of=range(m))
