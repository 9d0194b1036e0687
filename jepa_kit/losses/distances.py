"""Distances between prediction and target: one value per patch, averaged by ``Average``.

P = target patches    D = width of a target
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.registry import LOSSES, check_choice
from jepa_kit.structures import Prediction

Average = Literal["images", "patches"]
"""How values of patches are averaged: ``images`` gives all images, and all target sets of an image, the same weight
(``Prediction.mean``); ``patches`` gives it to all patches of this process's images, as the released code of MAE, BEiT
and data2vec does."""


def averaged(prediction: Prediction, values: Tensor, average: Average) -> Tensor:
    """Average a value per target patch: [P] -> []."""
    return prediction.mean(values) if average == "images" else values.mean()


class Distance(nn.Module):
    """Base of the distances: the mean over the width of one error for each value.

    Args:
        average: of the patches' values.

    Raises:
        ValueError: ``average`` is unknown; or, in a call, the widths of prediction and target differ.
    """

    is_distance = True

    def __init__(self, *, average: Average = "images") -> None:
        super().__init__()
        check_choice("average", average, Average)
        self.average: Average = average

    def forward(self, prediction: Prediction) -> Tensor:
        """[P, D] twice -> []."""
        ours, theirs = prediction.prediction, prediction.target
        if ours.shape != theirs.shape:
            raise ValueError(
                f"a distance needs predictions and targets of one width, not {tuple(ours.shape)} and "
                f"{tuple(theirs.shape)}; codes as targets need a loss such as 'cross_entropy'"
            )
        return averaged(prediction, self.values(ours, theirs), self.average)

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[P, D] twice -> [P]."""
        return self.errors(prediction, target).mean(-1)

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[P, D] twice -> [P, D]."""
        raise NotImplementedError


@LOSSES.register("smooth_l1")
class SmoothL1(Distance):
    """Smooth L1, mean over the width: the released code's loss (the paper says L2).

    Args:
        beta: errors e below beta count as e^2 / (2 beta), larger ones as e - beta / 2.
        average: of the patches' values.
    """

    def __init__(self, *, beta: float = 1.0, average: Average = "images") -> None:
        super().__init__(average=average)
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

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 1.0 - F.cosine_similarity(prediction, target, dim=-1)
