"""Predictors: map context tokens and target positions to predictions."""

from jepa_kit.predictors.cross import CrossPredictor
from jepa_kit.predictors.tokens import TokenPredictor
from jepa_kit.predictors.vit import ViTPredictor

__all__ = ["CrossPredictor", "TokenPredictor", "ViTPredictor"]
