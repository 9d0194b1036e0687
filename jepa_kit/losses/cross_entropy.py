"""Cross entropy of predicted scores, with codes or distributions as targets.

P = target patches    K = codes
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.losses.distances import Average, averaged
from jepa_kit.registry import LOSSES, check_choice
from jepa_kit.structures import Prediction


@LOSSES.register("cross_entropy")
class CrossEntropy(nn.Module):
    """Cross entropy between predicted scores and the code of each patch (BEiT, arXiv 2106.08254, equation 2).

    Targets may also be distributions over codes (CAPI, arXiv 2502.08769).

    Args:
        temperature: above 0, by which scores are divided; those of ``prototypes`` are in [-1, 1] and need a small one.
        average: of the patches' values.

    Raises:
        ValueError: an option is outside its range; or, in a call, predictions are not [P, K], or targets are neither
            integers [P] or [P, 1] nor probabilities [P, K]. A code outside 0 to K - 1 is an error of torch.
    """

    is_distance = False

    def __init__(self, *, temperature: float = 1.0, average: Average = "images") -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature (={temperature}) must be above 0 and finite")
        check_choice("average", average, Average)
        self.temperature, self.average = temperature, average

    def forward(self, prediction: Prediction) -> Tensor:
        """[P, K] scores, [P] or [P, 1] codes or [P, K] probabilities -> []."""
        scores, targets = prediction.prediction, prediction.target
        if targets.dtype == torch.int64 and targets.numel() == len(scores):
            targets = targets.flatten()
        elif not targets.is_floating_point() or targets.shape != scores.shape:
            targets = targets[:0]
        if scores.ndim != 2 or len(targets) != len(scores):
            raise ValueError(
                "'cross_entropy' needs predictions [P, K] and as targets the code of each patch, int64 [P] or [P, 1], "
                f"or its probabilities [P, K]; not {tuple(scores.shape)} and {prediction.target.dtype} "
                f"{tuple(prediction.target.shape)}"
            )
        values = F.cross_entropy(scores / self.temperature, targets, reduction="none")
        return averaged(prediction, values, self.average)
