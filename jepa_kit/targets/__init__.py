"""Targets: what is predicted at the target patches."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from jepa_kit.interfaces import Encoder
from jepa_kit.structures import PatchSets
from jepa_kit.targets.pixel import PixelTarget
from jepa_kit.targets.representation import RepresentationTarget

__all__ = ["PixelTarget", "RepresentationTarget", "Target"]


class Target(Protocol):
    """What a recipe asks of a target (a module that is registered in ``TARGETS``).

    Attributes:
        out_dim: width of a target, and so of a prediction.
        needs_encoder: it reads a target encoder; a recipe without one is refused.
    """

    out_dim: int
    needs_encoder: bool

    def __call__(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """s_y [P_t, out_dim], packed as ``patches``, from images [B, C, h, w]."""
        ...
