"""Maskers: which patches are context and which are targets. One file a strategy."""

from __future__ import annotations

from jepa_kit.maskers.block import Block
from jepa_kit.maskers.blockwise import Blockwise
from jepa_kit.maskers.causal import Causal
from jepa_kit.maskers.in_place import InPlace
from jepa_kit.maskers.inverse_block import InverseBlock
from jepa_kit.maskers.kept_block import KeptBlock
from jepa_kit.maskers.mixture import Mixture
from jepa_kit.maskers.multiblock import RELEASED, MultiBlock
from jepa_kit.maskers.multigroup import MultiGroup
from jepa_kit.maskers.random import Random
from jepa_kit.maskers.rasterized import Rasterized
from jepa_kit.maskers.subset import Subset

__all__ = [
    "RELEASED",
    "Block",
    "Blockwise",
    "Causal",
    "InPlace",
    "InverseBlock",
    "KeptBlock",
    "Mixture",
    "MultiBlock",
    "MultiGroup",
    "Random",
    "Rasterized",
    "Subset",
]
