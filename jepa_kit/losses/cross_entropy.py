"""Cross entropy of predicted scores, with codes as targets.

P = target patches    K = codes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.losses.distances import Average, averaged
from jepa_kit.registry import LOSSES, check_choice
from jepa_kit.structures import Prediction


@LOSSES.register("cross_entropy")
class CrossEntropy(nn.Module):
    """Cross entropy between predicted scores and the code of each patch (BEiT, arXiv 2106.08254, equation 2).

    Args:
        average: of the patches' values.

    Raises:
        ValueError: ``average`` is unknown; or, in a call, predictions are not [P, K], or targets are not the integers
            [P] or [P, 1]. A code outside 0 to K - 1 is an error of torch.
    """

    is_distance = False

    def __init__(self, *, average: Average = "images") -> None:
        super().__init__()
        check_choice("average", average, Average)
        self.average: Average = average

    def forward(self, prediction: Prediction) -> Tensor:
        """[P, K] scores, [P] or [P, 1] codes -> []."""
        scores, codes = prediction.prediction, prediction.target
        if scores.ndim != 2 or codes.dtype != torch.int64 or codes.numel() != len(scores):
            raise ValueError(
                "'cross_entropy' needs predictions [P, K] and targets int64 [P] or [P, 1], the code of each patch; not "
                f"{tuple(scores.shape)} and {codes.dtype} {tuple(codes.shape)}"
            )
        values = F.cross_entropy(scores, codes.flatten(), reduction="none")
        return averaged(prediction, values, self.average)
