"""Predictors: map context tokens and target positions to predictions."""

from jepa_kit.predictors.vit import ViTPredictor

__all__ = ["ViTPredictor"]
