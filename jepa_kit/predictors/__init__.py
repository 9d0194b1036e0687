"""Predictors: context tokens and target positions to predictions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from jepa_kit.predictors.vit import ViTPredictor
from jepa_kit.structures import MaskBatch

__all__ = ["Predictor", "ViTPredictor"]


class Predictor(Protocol):
    """What a recipe asks of a predictor (a module that is registered in ``PREDICTORS``)."""

    def __call__(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """[P_c, D] packed as ``masks.context`` -> [P_t, out_dim] packed as ``masks.targets``."""
        ...
