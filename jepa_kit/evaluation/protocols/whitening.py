"""Inputs of a linear probe: features standardised, or whitened (principal components of variance 1).

scikit-learn's StandardScaler and PCA are not used. They scale a column that is constant but for rounding to variance 1,
hold all samples in float64 at once, and divide by N - 1.

N  training samples    M  any samples    D  width of a feature
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jepa_kit.evaluation.protocols.base import Array
from jepa_kit.rng import FloatArray


class Standardising:
    """Scale columns to mean 0 and variance 1 over the training set, and a constant column to 0.

    Args:
        features: [N, D] of the training set.
    """

    def __init__(self, features: Array) -> None:
        self.mean = features.mean(axis=0, dtype=np.float64)  # [D]
        deviation = features.std(axis=0, dtype=np.float64)
        # a constant column has a small deviation left from rounding
        self.scale = np.where(deviation > 1e-7 * np.abs(self.mean), 1.0 / np.maximum(deviation, 1e-30), 0.0)

    def __call__(self, features: Array) -> NDArray[np.float32]:
        """Return standardised features: [M, D] -> [M, D]."""
        return np.concatenate([part.astype(np.float32) for part in self.parts(features)])

    def parts(self, features: Array) -> Iterator[FloatArray]:
        """Yield the same in float64, some rows at a time: small variances need float64, large sets little memory."""
        for start in range(0, len(features), 8192):
            yield (features[start : start + 8192] - self.mean) * self.scale


class Whitening:
    """Project features onto principal components of mean 0 and variance 1 over the training set.

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
        self.axes: FloatArray = vectors[:, ::-1]  # [D, D], one per column

    def above(self, cut: float) -> int:
        """Return how many components have more than ``cut`` times the largest variance; at least 1."""
        return max(1, int(np.sum(self.variances > cut * self.variances[0])))

    def __call__(self, features: Array, components: int) -> NDArray[np.float32]:
        """Return whitened features, the largest variance first: [M, D] -> [M, components]."""
        axes = self.axes[:, :components] / np.sqrt(np.maximum(self.variances[:components], 1e-30))
        return np.concatenate([(part @ axes).astype(np.float32) for part in self.standardised(features)])
