"""Random masking: targets are random patches, the rest is the context (I-JEPA, table 6)."""

from __future__ import annotations

import math

import numpy as np

from jepa_kit.maskers.checks import check_grid, check_ratio
from jepa_kit.maskers.packing import keep_random, mask_batch
from jepa_kit.registry import MASKERS
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch


@MASKERS.register("random")
class Random:
    """Take a fixed number of random patches, or larger squares, as the one target of an image; the rest is context.

    All sets of a kind have one length, so shapes are static.

    Result of the paper (table 6; ImageNet 1 %, frozen linear, ViT-B/16, 300 epochs): 17.6 with a ratio of 0.6,
    against 54.2 for multi-block.

    Args:
        grid: (H, W), each at least 4.
        ratio: fraction of target patches, rounded to whole patches; with a unit, of units, rounded up.
        unit: side in pixels of the squares that are drawn in place of single patches, 32 in SimMIM (Xie et al. 2022,
            section 4.1.2); a multiple of the patch size that divides the image. Null for patches.
        patch_size: in pixels; supplied by the recipe.

    Raises:
        ValueError: the grid is too small, ``ratio`` leaves no target or no context, or the unit does not fit.
    """

    def __init__(
        self, *, grid: Grid, ratio: float = 0.6, unit: int | None = None, patch_size: int | None = None
    ) -> None:
        self.grid = check_grid(grid)
        self.side = 1
        """Side of a unit in patches."""
        if unit is None:
            self.num_units = check_ratio("ratio", ratio, self.grid)
        else:
            self.side = _side(unit, patch_size, self.grid)
            units = self.grid[0] * self.grid[1] // self.side**2
            if not 0 < ratio < 1 or math.ceil(ratio * units) == units:
                raise ValueError(
                    f"ratio (={ratio}) must be above 0 and leave a context among the {units} units of an image: at "
                    f"most {1 - 1 / units:.3g}"
                )
            self.num_units = math.ceil(ratio * units)
        self.num_targets = self.num_units * self.side**2
        """Number of target patches of an image."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is unused."""
        h, w = (side // self.side for side in self.grid)
        u = uniforms(Stream.MASK, samples, h * w, seed=seed, epoch=epoch)  # [B, units]
        targets = keep_random(np.ones(u.shape, dtype=bool), self.num_units, u)
        if self.side > 1:
            targets = targets.reshape(-1, h, w).repeat(self.side, axis=1).repeat(self.side, axis=2)  # [B, H, W]
            targets = targets.reshape(len(u), -1)  # [B, N]
        return mask_batch(~targets[None], targets[None], self.grid)


def _side(unit: int, patch_size: int | None, grid: Grid) -> int:
    """Return the side of a unit in patches."""
    if patch_size is None:
        raise ValueError(f"unit (={unit}) is in pixels, so it needs patch_size")
    if unit < 1 or unit % patch_size or any(side % (unit // patch_size) for side in grid):
        h, w = (side * patch_size for side in grid)
        raise ValueError(
            f"unit (={unit}) must be a multiple of patch_size (={patch_size}) and divide both sides of the image "
            f"({h} x {w})"
        )
    return unit // patch_size
