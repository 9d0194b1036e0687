"""What a linear probe is given: features standardised, or brought to principal components of one variance.

N  training samples    M  any samples    D  width of a feature
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jepa_kit.evaluation.protocols.base import Array
from jepa_kit.rng import FloatArray


class Standardising:
    """Array to columns of mean 0 and variance 1 over the training set; a constant one counts for nothing.

    Args:
        features: [N, D] of the training set.
    """

    def __init__(self, features: Array) -> None:
        self.mean = features.mean(axis=0, dtype=np.float64)  # [D]
        deviation = features.std(axis=0, dtype=np.float64)
        # what is left of a constant after rounding is no signal
        self.scale = np.where(deviation > 1e-7 * np.abs(self.mean), 1.0 / np.maximum(deviation, 1e-30), 0.0)

    def __call__(self, features: Array) -> NDArray[np.float32]:
        """[M, D] -> [M, D]."""
        return np.concatenate([part.astype(np.float32) for part in self.parts(features)])

    def parts(self, features: Array) -> Iterator[FloatArray]:
        """The same in float64, some rows at a time: small variances need the digits, large sets the memory."""
        for start in range(0, len(features), 8192):
            yield (features[start : start + 8192] - self.mean) * self.scale


class Whitening:
    """Array to their principal components, each of mean 0 and variance 1 over the training set.

    Args:
        features: [N, D] of the training set. Each column is standardised first.
    """

    def __init__(self, features: Array) -> None:
        self.standardised = Standardising(features).parts
        covariance = np.zeros((features.shape[1], features.shape[1]))
        for part in self.standardised(features):
            covariance += part.T @ part
        values, vectors = np.linalg.eigh(covariance / len(features))  # ascending
        self.variances: FloatArray = np.maximum(values[::-1], 0.0)  # [D]
        self.axes: FloatArray = vectors[:, ::-1]  # [D, D], a column each

    def above(self, cut: float) -> int:
        """How many components have more than the share ``cut`` of the largest variance; at least 1."""
        return max(1, int(np.sum(self.variances > cut * self.variances[0])))

    def __call__(self, features: Array, components: int) -> NDArray[np.float32]:
        """[M, D] -> [M, components]."""
        axes = self.axes[:, :components] / np.sqrt(np.maximum(self.variances[:components], 1e-30))
        return np.concatenate([(part @ axes).astype(np.float32) for part in self.standardised(features)])
