"""Measures of a representation in float64, each by the formula of its source.

N = images    D = width of a feature    C = classes    q = samples of a class
K = min(N, D), the maximum rank of N features of width D
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from jepa_kit.rng import FloatArray

Features = NDArray[np.floating[Any]]

RANKME_EPSILON = 1e-7
"""Added to every p_k so that its logarithm is finite (Garrido et al. 2023, equation 2)."""
LIDAR_DELTA = 1e-4
"""Added to the diagonal of Sigma_w so that it has an inverse (Thilak et al. 2024, section 4)."""


def check_features(features: Features) -> FloatArray:
    """Return features [N, D] as float64.

    Raises:
        ValueError: if there are fewer than 2 samples, the shape is not [N, D], or a value is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N at least 2, not of shape {features.shape}")
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise ValueError(f"features must be finite, but that of sample {bad} is not")
    return np.asarray(features, dtype=np.float64)


def deviation(features: Features) -> float:
    """Return the standard deviation over samples, averaged over the width: 0 for a constant.

    It has the features' own scale. Source: the variance term of VICReg (Bardes et al. 2022, section 4.1).
    """
    return float(check_features(features).std(axis=0).mean())


def unit_deviation(features: Features) -> float:
    """Return ``deviation`` of unit-length features times sqrt(D): 0 for a constant, near 1 for random directions.

    Source: SimSiam (Chen and He 2021, section 4.1), which plots it without the factor to detect collapse.
    """
    unit = unit_length(features)
    return float(unit.std(axis=0).mean() * np.sqrt(unit.shape[1]))


def mean_cosine(features: Features) -> float:
    """Return the cosine between two samples, averaged over all pairs: 1 for a constant, 0 for random directions."""
    unit = unit_length(features)
    n = len(unit)
    # the sum over all pairs, less each sample with itself
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (n * (n - 1)))


def uniformity(features: Features, t: float = 2.0) -> float:
    """Return log of the mean over pairs of exp(-t |u - v|^2) of unit-length features: 0 for a constant, else lower.

    About -4 for random directions in a large width. Source: Wang and Isola 2020, section 4.1.2, with t = 2.
    """
    unit = unit_length(features)
    first, second = np.triu_indices(len(unit), 1)
    cosine = (unit @ unit.T)[first, second]
    exponent = -t * np.maximum(2.0 - 2.0 * cosine, 0.0)  # |u - v|^2 = 2 - 2 u.v
    return float(np.log(np.exp(exponent).mean()))


def unit_length(features: Features) -> FloatArray:
    """Return features [N, D], each divided by its length; a feature of zeros stays zero."""
    x = check_features(features)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def rankme(features: Features) -> float:
    """Return exp of the entropy of the singular values: how many directions the features fill, from 1 to K.

    Features are not centred, so their mean is one direction, and often the largest.
    Source: RankMe (Garrido et al. 2023, equations 1 and 2), p_k = s_k / sum(s) + 1e-7.
    """
    return entropy_rank(singular_values(check_features(features)), RANKME_EPSILON)


def effective_rank(features: Features) -> float:
    """Return exp of the entropy of the covariance's eigenvalues: how many directions the variance fills.

    Source: Roy and Vetterli 2007, section 2, applied to the covariance matrix, whose singular values are its
    eigenvalues. They are squares, so directions of low variance count less than in RankMe.
    """
    return entropy_rank(covariance_spectrum(features))


def entropy_rank(values: FloatArray, epsilon: float = 0.0) -> float:
    """Return exp of the entropy of p_k = values_k / sum(values) + epsilon, for values >= 0; 0 if all are 0."""
    total = values.sum()
    if not total > 0:
        return 0.0
    p = values / total + epsilon
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def covariance_spectrum(features: Features) -> FloatArray:
    """Return the [K] eigenvalues of the covariance matrix (1 / N), descending."""
    x = check_features(features)
    return np.square(singular_values(x - x.mean(axis=0))) / len(x)


def singular_values(x: FloatArray) -> FloatArray:
    """Return the [K] singular values, descending."""
    with threadpool_limits(1):  # for matrices this small, threads cost more than they save
        return np.asarray(np.linalg.svd(x, compute_uv=False), dtype=np.float64)


def alpha_req(features: Features, first: int = 11) -> float | None:
    """Return alpha in lambda_j ~ j^-alpha, the decay of the covariance's eigenvalues.

    The fit is least squares of log lambda_j on log j with weights 1 / j, from the 11th eigenvalue (K / 4 if that is
    smaller) to K / 2, beyond which the spectrum falls because the sample is finite. Alpha near 1 goes with useful
    features; far above it few directions have all the variance, far below it noise fills the space.
    Source: alpha-ReQ (Agrawal et al. 2022), with the fit of Stringer et al. 2019.

    Returns:
        alpha; None if fewer than 3 eigenvalues in the range are above rounding.
    """
    values = covariance_spectrum(features)
    k = len(values)
    j = np.arange(1, k + 1)
    # below 1e-14 of the largest, eigenvalues are rounding of float64, or of float32 features
    within = (j >= min(first, max(k // 4, 1))) & (j <= k // 2) & (values > 1e-14 * values[0])
    if within.sum() < 3:
        return None
    x, y, weight = np.log(j[within]), np.log(values[within]), 1.0 / j[within]
    x_mean, y_mean = (np.average(v, weights=weight) for v in (x, y))
    slope = np.sum(weight * (x - x_mean) * (y - y_mean)) / np.sum(weight * np.square(x - x_mean))
    return float(-slope)


def lidar(classes: NDArray[np.floating[Any]], delta: float = LIDAR_DELTA) -> float:
    """Return exp of the entropy of the eigenvalues of a linear discriminant analysis of images.

    An image is a class and its views are the samples: directions in which views of one image differ as much as images
    do count little. The eigenvalues are those of Sigma_w^-1/2 Sigma_b Sigma_w^-1/2, where Sigma_b is the covariance of
    the class means and Sigma_w the mean covariance within a class plus ``delta`` on the diagonal.
    Source: LiDAR (Thilak et al. 2024, section 4).

    Args:
        classes: [C, q, D], C and q at least 2.
        delta: in the features' own units, squared.

    Returns:
        a number from 1 to min(C - 1, D); 0 if all classes have one mean.

    Raises:
        ValueError: if C or q is below 2.
    """
    if classes.ndim != 3 or min(classes.shape[:2]) < 2:
        raise ValueError(f"classes must be [C, q, D] with C and q at least 2, not of shape {classes.shape}")
    x = np.asarray(classes, dtype=np.float64)
    means = x.mean(axis=1)  # [C, D]
    between = means - means.mean(axis=0)
    inside = (x - means[:, None]).reshape(-1, x.shape[-1])  # [C * q, D]
    with threadpool_limits(1):
        within = inside.T @ inside / len(inside) + delta * np.eye(x.shape[-1])  # [D, D]
        factor = np.linalg.cholesky(within)
        # Sigma_w = L L^T: L^-1 Sigma_b L^-T has the eigenvalues of Sigma_w^-1/2 Sigma_b Sigma_w^-1/2
        whitened = np.linalg.solve(factor, between.T)  # [D, C]
    return entropy_rank(np.square(singular_values(whitened)))
