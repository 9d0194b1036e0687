"""Masks in place: the encoder sees the whole image, with mask tokens at the target patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from jepa_kit.maskers.checks import check_grid
from jepa_kit.registry import MASKERS, build_part
from jepa_kit.rng import IntArray
from jepa_kit.structures import Grid, MaskBatch, PatchSets

DEFAULT: dict[str, Any] = {"name": "random"}


@MASKERS.register("in_place")
class InPlace:
    """Hide the target patches of another masker in place, as BEiT, SimMIM and data2vec do.

    Each context of the other masker becomes a set of all patches of its image, of which those of its targets are
    hidden: the encoder replaces their content by a mask token (option ``mask_token`` of ``vit``). The target set is the
    hidden patches, in raster order. Patches that are neither context nor target are shown.

    Args:
        grid: (H, W), each at least 4.
        patch_size: in pixels, for the other masker.
        masker: name and options of the other masker, as in the slot ``masker`` of a config.

    Raises:
        ValueError: the other masker is not registered or rejects its options; the message begins with ``masker``.
    """

    nested: ClassVar[dict[str, str]] = {"masker": "masker"}

    def __init__(self, *, grid: Grid, patch_size: int | None = None, masker: dict[str, Any] = DEFAULT) -> None:
        self.grid = check_grid(grid)
        self.members = [build_part("masker", masker, MASKERS, grid=self.grid, patch_size=patch_size)]

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is passed to the other masker."""
        return in_place(self.members[0](samples, seed=seed, epoch=epoch, step=step))

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a call before the other masker truncates its sets."""
        draw = getattr(self.members[0], "before_truncation", self.members[0])
        return in_place(draw(samples, seed=seed, epoch=epoch, step=step))


def in_place(masks: MaskBatch) -> MaskBatch:
    """Return masks whose contexts are whole images, in which the patches of their targets are hidden."""
    sets, patches = len(masks.context), masks.grid[0] * masks.grid[1]
    hidden = np.zeros((sets, patches), dtype=bool)
    hidden[masks.context_of[masks.targets.lengths.set_of_token], masks.targets.index] = True
    image = masks.context.image
    context = replace(PatchSets.full(sets, patches), image=image, hidden=torch.from_numpy(hidden).flatten())
    return MaskBatch(context, PatchSets.from_mask(hidden, image.numpy()), masks.grid, torch.arange(sets))
