"""Losses: the distance between prediction and target, and any regulariser.

A recipe takes a list of weighted terms; each sees the whole ``Prediction`` and gives a scalar.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from jepa_kit.losses.distances import L1, L2, Cosine, SmoothL1
from jepa_kit.structures import Prediction

__all__ = ["L1", "L2", "Cosine", "Loss", "SmoothL1", "is_distance"]


class Loss(Protocol):
    """What a recipe asks of a loss (a module that is registered in ``LOSSES``).

    Attributes:
        is_distance: it measures how far predictions are from targets: it draws no random numbers, and is least where
            they are equal. A loss without the attribute counts as one; a regulariser, or a loss that contains one
            (VICReg, SIGReg), declares False. Health compares distances alone (jepa_kit/evaluation/health/measure.py).
    """

    is_distance: bool

    def __call__(self, prediction: Prediction) -> Tensor:
        """A scalar []. ``prediction.mean`` averages a value for each target patch."""
        ...


def is_distance(loss: object) -> bool:
    """Return what a loss declares as ``is_distance``; True if it declares nothing."""
    return bool(getattr(loss, "is_distance", True))
