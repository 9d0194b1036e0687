"""Losses: distances between prediction and target, and regularisers.

A recipe sums weighted terms; each is given the whole ``Prediction`` and returns a scalar.
"""

from __future__ import annotations

from jepa_kit.losses.contrastive import info_nce
from jepa_kit.losses.cross_entropy import CrossEntropy
from jepa_kit.losses.distances import L1, L2, Cosine, SmoothL1
from jepa_kit.losses.regularisers import VICReg
from jepa_kit.losses.sliced import SIGReg, VISReg

__all__ = ["L1", "L2", "Cosine", "CrossEntropy", "SIGReg", "SmoothL1", "VICReg", "VISReg", "info_nce", "is_distance"]


def is_distance(loss: object) -> bool:
    """Return ``loss.is_distance``, or True if the loss does not declare it."""
    return bool(getattr(loss, "is_distance", True))
