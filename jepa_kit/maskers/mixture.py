"""A mixture of maskers: one of several maskers is drawn for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from jepa_kit.maskers.checks import check_grid
from jepa_kit.maskers.packing import join
from jepa_kit.registry import MASKERS, build_part
from jepa_kit.rng import IntArray, Stream, uniforms
from jepa_kit.structures import Grid, MaskBatch

CHOICE = 2**16 - 1
"""The attempt number whose draws choose the member; no masker redraws so often."""


@MASKERS.register("mixture")
class Mixture:
    """Draw the masker of each image from a weighted list, as a pure function of (seed, epoch, sample).

    The batch has the first context set of every image, then the second of those that have one, and so on; target sets
    likewise. All images have the same weight in a loss, whatever the number of their target sets.

    V-JEPA (arXiv 2404.08471) trains on several masking strategies at once, all of them on each image; here each image
    has one. Results: not measured here.

    Args:
        grid: (H, W), each at least 4.
        patch_size: in pixels, for the members.
        maskers: name and options of each member, as in the slot ``masker`` of a config.
        weights: relative frequency of each member; None for equal ones.

    Raises:
        ValueError: there is no member; a member is not registered, is a mixture or rejects its options (the message
            begins with ``maskers[i]``); or weights are not one number above 0 per member.
    """

    nested: ClassVar[dict[str, str]] = {"maskers": "masker"}
    """Options that are a part or list parts -> the slot of these parts; for the checks of a config."""

    def __init__(
        self,
        *,
        grid: Grid,
        patch_size: int | None = None,
        maskers: Sequence[dict[str, Any]] = ({"name": "multiblock"}, {"name": "block"}),
        weights: tuple[float, ...] | None = None,
    ) -> None:
        self.grid = check_grid(grid)
        if not maskers:
            raise ValueError("maskers (=[]) must hold at least one masker")
        for i, part in enumerate(maskers):
            if part.get("name") == "mixture":  # it would choose by the same random number as this one
                raise ValueError(
                    f"maskers[{i}].name (='mixture') must not be a mixture: put its maskers into the outer list"
                )
        supplied = {"grid": self.grid, "patch_size": patch_size}
        self.members = [build_part(f"maskers[{i}]", part, MASKERS, **supplied) for i, part in enumerate(maskers)]
        share = np.ones(len(maskers)) if weights is None else np.asarray(weights, dtype=np.float64)
        if share.shape != (len(maskers),) or not np.isfinite(share).all() or not (share > 0).all():
            raise ValueError(f"weights (={weights}) must be one number above 0 for each of the {len(maskers)} maskers")
        self.bounds = np.cumsum(share)[:-1] / share.sum()
        """[members - 1]: boundaries in [0, 1) between the numbers of consecutive members."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a batch; see ``Masker``. ``step`` is passed to the members."""
        return self._join(self.members, samples, seed=seed, epoch=epoch, step=step)

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """Return the masks of a call before members truncate them."""
        whole = [getattr(masker, "before_truncation", masker) for masker in self.members]
        return self._join(whole, samples, seed=seed, epoch=epoch, step=step)

    def _join(
        self, draws: Sequence[Callable[..., MaskBatch]], samples: IntArray, *, seed: int, epoch: int, step: int
    ) -> MaskBatch:
        """Return the masks of a batch; the function in ``draws`` of an image's member draws its masks."""
        samples = np.asarray(samples)
        member = self.member_of(samples, seed=seed, epoch=epoch)
        images = [np.flatnonzero(member == i) for i in range(len(draws))]
        parts = [
            (draw(samples[at], seed=seed, epoch=epoch, step=step), at)
            for draw, at in zip(draws, images, strict=True)
            if at.size
        ]
        return join(parts, self.grid)

    def member_of(self, samples: IntArray, *, seed: int, epoch: int) -> IntArray:
        """Return the index of each sample's member, [B]."""
        u = uniforms(Stream.MASK_SIZE, samples, 1, seed=seed, epoch=epoch, attempt=CHOICE)[:, 0]
        return np.searchsorted(self.bounds, u, side="right")
