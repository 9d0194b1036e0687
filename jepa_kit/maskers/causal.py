"""Causal masking: the context is a prefix in raster order, the target what follows."""

from __future__ import annotations

import numpy as np

from jepa_kit.maskers.checks import check_at_least, check_at_most, check_grid, check_range
from jepa_kit.maskers.packing import mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch


@MASKERS.register("causal")
class Causal:
    """Take a raster prefix of random length as context of an image; the patches after it are its one target.

    Source: the prefix of AIM (El-Nouby et al. 2024, arXiv 2401.08541), whose length is drawn uniformly and whose loss
    is taken on the rest; raster order is that of iGPT (Chen et al. 2020). Departure: all target patches
    are predicted at once from the prefix, instead of each from all patches before it.

    By construction, the bottom of the image is context only if the top is. Results with I-JEPA: not published, not
    measured here.

    Args:
        grid: (H, W), each at least 4.
        context_ratio: (low, high), fraction of context patches, 0 to 1. Lengths are uniform between the two; at least
            one patch is context, and at least ``target_length`` (or one) are target.
        target_length: number of target patches, directly after the context; None for all.

    Raises:
        ValueError: the grid is too small, or an option is out of its range.
    """

    def __init__(
        self, *, grid: Grid, context_ratio: tuple[float, float] = (0.0, 1.0), target_length: int | None = None
    ) -> None:
        self.grid = check_grid(grid)
        patches = self.grid[0] * self.grid[1]
        self.target_length = target_length
        if target_length is not None:
            check_at_least("target_length", target_length, 1)
            why = f": a grid of {grid[0]} x {grid[1]} has {patches} patches, one of which is context"
            check_at_most("target_length", target_length, patches - 1, why)
        rule = " with 0 <= low <= high <= 1"
        self.context_ratio = check_range("context_ratio", context_ratio, rule, lambda low, high: 0 <= low <= high <= 1)
        most = patches - (target_length or 1)
        self.shortest, self.longest = (min(max(round(patches * share), 1), most) for share in self.context_ratio)
        """Lengths of the shortest and the longest context."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        u = uniforms(Stream.MASK, samples, 1, seed=seed, epoch=epoch)  # [B, 1]
        length = self.shortest + (u * (self.longest - self.shortest + 1)).astype(np.int64)
        place = np.arange(self.grid[0] * self.grid[1])
        context = place < length  # [B, N]
        target = ~context
        if self.target_length is not None:
            target &= place < length + self.target_length
        return mask_batch(context[None], target[None], self.grid)
