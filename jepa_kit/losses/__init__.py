"""Losses: the distance between prediction and target, and any regulariser.

A recipe takes a list of weighted terms; each sees the whole ``Prediction`` and gives a scalar.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from jepa_kit.losses.distances import L1, L2, Cosine, SmoothL1
from jepa_kit.structures import Prediction

__all__ = ["L1", "L2", "Cosine", "Loss", "SmoothL1"]


class Loss(Protocol):
    """What a recipe asks of a loss (a module that is registered in ``LOSSES``)."""

    def __call__(self, prediction: Prediction) -> Tensor:
        """A scalar []. ``prediction.mean`` averages a value for each target patch."""
        ...
