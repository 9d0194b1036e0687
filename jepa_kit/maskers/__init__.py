"""Maskers: which patches are context and which are targets. One file a strategy."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jepa_kit.maskers.block import Block
from jepa_kit.maskers.blockwise import Blockwise
from jepa_kit.maskers.causal import Causal
from jepa_kit.maskers.inverse_block import InverseBlock
from jepa_kit.maskers.mixture import Mixture
from jepa_kit.maskers.multiblock import RELEASED, MultiBlock, Placement
from jepa_kit.maskers.multigroup import MultiGroup
from jepa_kit.maskers.random import Random
from jepa_kit.maskers.rasterized import Rasterized
from jepa_kit.rng import IntArray
from jepa_kit.structures import Grid, MaskBatch

__all__ = [
    "RELEASED",
    "Block",
    "Blockwise",
    "Causal",
    "InverseBlock",
    "Masker",
    "Mixture",
    "MultiBlock",
    "MultiGroup",
    "Placement",
    "Random",
    "Rasterized",
]


@runtime_checkable
class Masker(Protocol):
    """Draws the masks of a batch as a pure function of its arguments.

    One that truncates sets may also have ``before_truncation``, called alike, for the sets with all their patches:
    tools/mask_report.py shows both.
    """

    grid: Grid
    """(H, W): rows and columns of patches."""

    def __call__(self, samples: IntArray, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        """The masks of a batch.

        Args:
            samples: [B] index of each image in its data set; image b of the masks is samples[b].
            seed: of the run.
            epoch: in which the images are drawn.
            step: of the run, for what a strategy shares across a batch.
        """
        ...
