"""A mixture of maskers: each image gets its masks from one of several, drawn for it."""

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
"""The attempt whose numbers choose the member: no masker redraws so often."""


@MASKERS.register("mixture")
class Mixture:
    """A union of maskers with weights; which one an image gets is a pure function of (seed, epoch, sample).

    The context sets of a batch are the first of every image, then the second of those that have one, and so on; target
    sets likewise. Every image counts the same in a loss, however many target sets its member gives it.

    Training on several masking strategies at once is that of V-JEPA's groups (arXiv 2404.08471), drawn here image by
    image instead of all for each. Results are not yet measured here.

    Args:
        grid: (H, W), each at least 4.
        maskers: of each member its name and its options, as the config's masker slot takes them.
        weights: of the members, in proportion to how often each is drawn; None for equal ones.

    Raises:
        ValueError: no member, one that is not registered, is a mixture or refuses its options (the message begins with
            ``maskers[i]``); weights that are not one above 0 for each member.
    """

    nested: ClassVar[dict[str, str]] = {"maskers": "masker"}
    """Options that list parts, and the slot these belong to: what the config's checks need to know."""

    def __init__(
        self,
        *,
        grid: Grid,
        maskers: Sequence[dict[str, Any]] = ({"name": "multiblock"}, {"name": "block"}),
        weights: tuple[float, ...] | None = None,
    ) -> None:
        self.grid = check_grid(grid)
        if not maskers:
            raise ValueError("maskers (=[]) must hold at least one masker")
        for i, part in enumerate(maskers):
            if part.get("name") == "mixture":  # it would choose with the same random number as this one
                raise ValueError(
                    f"maskers[{i}].name (='mixture') must not be a mixture: put its maskers into the outer list"
                )
        self.members = [build_part(f"maskers[{i}]", part, MASKERS, grid=self.grid) for i, part in enumerate(maskers)]
        share = np.ones(len(maskers)) if weights is None else np.asarray(weights, dtype=np.float64)
        if share.shape != (len(maskers),) or not np.isfinite(share).all() or not (share > 0).all():
            raise ValueError(f"weights (={weights}) must be one number above 0 for each of the {len(maskers)} maskers")
        self.bounds = np.cumsum(share)[:-1] / share.sum()
        """[members - 1]: where the numbers of one member end in [0, 1) and those of the next begin."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """The masks of a batch; see ``Masker``. ``step`` goes to the members."""
        return self._join(self.members, samples, seed=seed, epoch=epoch, step=step)

    def before_truncation(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """The masks that members' truncation would cut: those of a call, with all their patches."""
        whole = [getattr(masker, "before_truncation", masker) for masker in self.members]
        return self._join(whole, samples, seed=seed, epoch=epoch, step=step)

    def _join(
        self, draws: Sequence[Callable[..., MaskBatch]], samples: IntArray, *, seed: int, epoch: int, step: int
    ) -> MaskBatch:
        """The masks of a batch, each image's by its member's entry in ``draws``."""
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
        """[B]: which member draws the masks of each sample."""
        u = uniforms(Stream.MASK_SIZE, samples, 1, seed=seed, epoch=epoch, attempt=CHOICE)[:, 0]
        return np.searchsorted(self.bounds, u, side="right")
