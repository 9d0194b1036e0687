"""VICReg, SIGReg and VISReg in numpy and float64, one set of an image and one direction after another.

Embeddings are [V, N, D]: sets or views of an image, images, width.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm


def variance(z: np.ndarray) -> float:
    return float(np.mean([np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean() for x in z]))


def covariance(z: np.ndarray) -> float:
    found = []
    for x in z:
        matrix = np.cov(x.T)
        found.append((matrix[~np.eye(len(matrix), dtype=bool)] ** 2).sum() / len(matrix))
    return float(np.mean(found))


def epps_pulley(x: np.ndarray, points: int, t_max: float) -> float:
    """The statistic of values [N], by the trapezoid rule over the whole interval from -t_max to t_max."""
    t = np.linspace(-t_max, t_max, 2 * points - 1)
    error = np.abs(np.exp(1j * np.outer(x, t)).mean(0) - np.exp(-(t**2) / 2)) ** 2
    return len(x) * float(np.trapezoid(error * np.exp(-(t**2) / 2), t))


def sigreg(z: np.ndarray, directions: np.ndarray, points: int = 17, t_max: float = 3.0) -> float:
    return float(np.mean([epps_pulley(x @ d, points, t_max) for x in z for d in directions.T]))


def visreg(z: np.ndarray, directions: np.ndarray) -> dict[str, float]:
    """The shape is the cost of the best assignment of values to quantiles, by the Hungarian method."""
    deviation = z.std(1, keepdims=True) + 1e-6
    levels = norm.ppf(np.arange(1, z.shape[1] + 1) / (z.shape[1] + 1))
    costs = []
    for x in (z - z.mean(1, keepdims=True)) / deviation:
        for d in directions.T:
            cost = np.subtract.outer(x @ d, levels) ** 2
            costs.append(cost[linear_sum_assignment(cost)].mean())
    return {
        "scale": float(((1 - deviation) ** 2).mean()),
        "shape": float(np.mean(costs)),
        "centre": float((z.mean(1) ** 2).mean()),
    }
