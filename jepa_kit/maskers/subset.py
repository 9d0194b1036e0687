"""Some of the targets of another masker: the others are neither seen nor predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from jepa_kit.maskers.checks import check_grid
from jepa_kit.registry import MASKERS, build_part
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch

DEFAULT: dict[str, Any] = {"name": "random"}


@MASKERS.register("subset")
class Subset:
    """Predict a random part of each target set of another masker, which makes a predictor with many patches cheap.

    CAPI (Darcet et al. 2025, arXiv 2502.08769) predicts 5 % of the hidden patches, CrossMAE (Fu et al. 2024, arXiv
    2401.14391) a third of them. Contexts stay as they are: with ``masker: {name: in_place}`` inside, the encoder sees
    mask tokens for all hidden patches; with this masker inside ``in_place``, for the predicted ones alone.

    Args:
        grid: (H, W), each at least 4.
        patch_size: in pixels, for the other masker.
        masker: name and options of the other masker, as in the slot ``masker`` of a config.
        fraction: of the patches of each target set, in (0, 1), rounded to whole patches; at least one is predicted.

    Raises:
        ValueError: the other masker is not registered or rejects its options (the message begins with ``masker``), or
            the fraction is not in (0, 1).
    """

    nested: ClassVar[dict[str, str]] = {"masker": "masker"}

    def __init__(
        self,
        *,
        grid: Grid,
        patch_size: int | None = None,
        masker: dict[str, Any] = DEFAULT,
        fraction: float = 0.05,
    ) -> None:
        self.grid = check_grid(grid)
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction (={fraction}) must be above 0 and below 1")
        self.fraction = fraction
        self.members = [build_part("masker", masker, MASKERS, grid=self.grid, patch_size=patch_size)]

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is passed to the other masker."""
        return self._choose(self.members[0], samples, seed=seed, epoch=epoch, step=step)

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a call before the other masker truncates its sets."""
        draw = getattr(self.members[0], "before_truncation", self.members[0])
        return self._choose(draw, samples, seed=seed, epoch=epoch, step=step)

    def _choose(
        self, draw: Callable[..., MaskBatch], samples: IntArray, *, seed: int, epoch: int, step: int
    ) -> MaskBatch:
        masks = draw(samples, seed=seed, epoch=epoch, step=step)
        targets, patches = masks.targets, self.grid[0] * self.grid[1]
        u = uniforms(Stream.MASK_SUBSET, np.asarray(samples), patches, seed=seed, epoch=epoch)  # [B, N]
        sets, each = targets.lengths.set_of_token.numpy(), targets.lengths.each
        # Sorted by set, then by number: the first of each set are a random part of it. [P_t]
        order = np.lexsort((u[targets.image_of_token.numpy(), targets.index.numpy()], sets))
        keep = np.empty(len(order), dtype=bool)
        keep[order] = targets.lengths.position.numpy() < np.maximum(np.rint(each * self.fraction), 1)[sets]
        return replace(masks, targets=targets.select(torch.from_numpy(keep)))
