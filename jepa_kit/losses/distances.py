"""Distances between prediction and target: one value per patch, averaged by ``Prediction.mean``.

P = target patches    D = width of a target
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.registry import LOSSES
from jepa_kit.structures import Prediction


class Distance(nn.Module):
    """Base of the distances: the mean over the width of one error for each value."""

    is_distance = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, prediction: Prediction) -> Tensor:
        """[P, D] twice -> []."""
        return prediction.mean(self.errors(prediction.prediction, prediction.target).mean(-1))

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[P, D] twice -> [P, D]."""
        raise NotImplementedError


@LOSSES.register("smooth_l1")
class SmoothL1(Distance):
    """Smooth L1, mean over the width: the released code's loss (the paper says L2).

    Args:
        beta: errors e below beta count as e^2 / (2 beta), larger ones as e - beta / 2.
    """

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"beta (={beta}) must be above 0 and finite; use the loss 'l1' for beta 0")
        self.beta = beta

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(prediction, target, beta=self.beta, reduction="none")


@LOSSES.register("l2")
class L2(Distance):
    """Squared error, mean over the width (the paper's distance, section 3, up to the factor D)."""

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction="none")


@LOSSES.register("l1")
class L1(Distance):
    """Absolute error, mean over the width (V-JEPA, Bardes et al. 2024)."""

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction, target, reduction="none")


@LOSSES.register("cosine")
class Cosine(Distance):
    """One minus the cosine between prediction and target, in [0, 2]."""

    def forward(self, prediction: Prediction) -> Tensor:
        """[P, D] twice -> []."""
        return prediction.mean(1.0 - F.cosine_similarity(prediction.prediction, prediction.target, dim=-1))
