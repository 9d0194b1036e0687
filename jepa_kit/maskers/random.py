"""Random masking: targets are random patches, the rest is the context (I-JEPA, table 6)."""

from __future__ import annotations

import numpy as np

from jepa_kit.maskers.checks import check_grid, check_ratio
from jepa_kit.maskers.packing import keep_random, mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch


@MASKERS.register("random")
class Random:
    """Take a fixed number of random patches as the one target of an image; the rest is context.

    All sets of a kind have one length, so shapes are static.

    Result of the paper (table 6; ImageNet 1 %, frozen linear, ViT-B/16, 300 epochs): 17.6 with a ratio of 0.6,
    against 54.2 for multi-block.

    Args:
        grid: (H, W), each at least 4.
        ratio: fraction of target patches, rounded to whole patches.

    Raises:
        ValueError: the grid is too small, or ``ratio`` leaves no target or no context.
    """

    def __init__(self, *, grid: Grid, ratio: float = 0.6) -> None:
        self.grid = check_grid(grid)
        self.num_targets = check_ratio("ratio", ratio, self.grid)
        """Number of target patches of an image."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        patches = self.grid[0] * self.grid[1]
        u = uniforms(Stream.MASK, samples, patches, seed=seed, epoch=epoch)  # [B, N]
        targets = keep_random(np.ones(u.shape, dtype=bool), self.num_targets, u)
        return mask_batch(~targets[None], targets[None], self.grid)
