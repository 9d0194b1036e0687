"""The vote of the nearest neighbours: of the protocol ``knn``, and of the probe inside a run.

N  known samples    M  samples that are asked    D  width of a feature    K  classes
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa_kit.rng import IntArray

TEMPERATURE = 0.07
"""Wu et al.'s (2018, arXiv 1805.01978), and DINO's (Caron et al. 2021, arXiv 2104.14294)."""
SIMILARITIES = 2**24
"""So many are held at a time: 64 MiB of float32."""
Array = NDArray[np.floating[Any]]


class Bank:
    """Known features of length 1 and their classes, ready to be asked.

    The k most similar vote for their classes, each with the weight exp(cosine / temperature) (Wu et al. 2018, section
    3.4).

    Args:
        features: [N, D] float32 or float64, which similarities have too.
        labels: [N] classes, 0 to K - 1.
        classes: K.
        temperature: above 0.
        device: where similarities are computed.
    """

    def __init__(
        self,
        features: Array,
        labels: IntArray,
        classes: int,
        temperature: float = TEMPERATURE,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = device
        self.features = _unit(features).to(device)  # [N, D]
        self.labels = torch.from_numpy(labels).to(device)  # [N]
        self.classes, self.temperature = classes, temperature

    def classify(self, features: Array, ks: list[int], leave_out: IntArray | None = None) -> IntArray:
        """The class that the nearest k vote for: [len(ks), M], 0 to K - 1; of equal votes, the lower.

        Args:
            features: [M, D].
            ks: ascending, at most N (N - 1 with ``leave_out``).
            leave_out: [M] the known sample that each may not ask.
        """
        answers = []
        own = None if leave_out is None else torch.from_numpy(leave_out).to(self.device)
        rows = max(1, SIMILARITIES // len(self.features))
        for start in range(0, len(features), rows):
            cosine = _unit(features[start : start + rows]).to(self.device) @ self.features.T  # [m, N]
            if own is not None:
                cosine.scatter_(1, own[start : start + rows, None], -torch.inf)
            near, index = cosine.topk(ks[-1], dim=1)
            # a common factor of a row's weights moves no vote: the largest becomes 1
            weight = ((near - near[:, :1]) / self.temperature).exp()
            votes = weight.new_zeros(len(cosine), self.classes)
            done, best = 0, []
            for k in ks:
                votes.scatter_add_(1, self.labels[index[:, done:k]], weight[:, done:k])
                best.append(votes.argmax(dim=1))
                done = k
            answers.append(torch.stack(best).cpu())
        return torch.cat(answers, dim=1).numpy()


def _unit(features: Array) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(features)), dim=1)
