"""Masks in place: the encoder sees the whole image, with mask tokens at the target patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from jepa_kit.maskers.blocks import BoolArray
from jepa_kit.maskers.checks import check_grid
from jepa_kit.registry import MASKERS, build_part
from jepa_kit.rng import IntArray, Stream, uniforms
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
        probability: of an image to have hidden patches, above 0; iBOT has 0.5. The encoder sees all of another image,
            whose targets are the same, but shown: the recipe decides whether they count.

    Raises:
        ValueError: the other masker is not registered or rejects its options (the message begins with ``masker``), or
            the probability is not in (0, 1].
    """

    nested: ClassVar[dict[str, str]] = {"masker": "masker"}

    def __init__(
        self,
        *,
        grid: Grid,
        patch_size: int | None = None,
        masker: dict[str, Any] = DEFAULT,
        probability: float = 1.0,
    ) -> None:
        self.grid = check_grid(grid)
        if not 0.0 < probability <= 1.0:
            raise ValueError(f"probability (={probability}) must be in (0, 1]")
        self.probability = probability
        self.members = [build_part("masker", masker, MASKERS, grid=self.grid, patch_size=patch_size)]

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is passed to the other masker."""
        return self._hide(self.members[0], samples, seed=seed, epoch=epoch, step=step)

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a call before the other masker truncates its sets."""
        draw = getattr(self.members[0], "before_truncation", self.members[0])
        return self._hide(draw, samples, seed=seed, epoch=epoch, step=step)

    def _hide(
        self, draw: Callable[..., MaskBatch], samples: IntArray, *, seed: int, epoch: int, step: int
    ) -> MaskBatch:
        u = uniforms(Stream.MASK_SHOW, np.asarray(samples), 1, seed=seed, epoch=epoch)[:, 0]  # [B]
        return in_place(draw(samples, seed=seed, epoch=epoch, step=step), u < self.probability)


def in_place(masks: MaskBatch, hides: BoolArray | None = None) -> MaskBatch:
    """Return masks whose contexts are whole images, in which the patches of their targets are hidden.

    Args:
        masks: of the other masker.
        hides: [B], the images in which patches are hidden; None for all.
    """
    sets, patches = len(masks.context), masks.grid[0] * masks.grid[1]
    hidden = np.zeros((sets, patches), dtype=bool)
    hidden[masks.context_of[masks.targets.lengths.set_of_token], masks.targets.index] = True
    image = masks.context.image
    replaced = hidden if hides is None else hidden & hides[image.numpy(), None]
    context = replace(PatchSets.full(sets, patches), image=image, hidden=torch.from_numpy(replaced).flatten())
    return MaskBatch(context, PatchSets.from_mask(hidden, image.numpy()), masks.grid, torch.arange(sets))
