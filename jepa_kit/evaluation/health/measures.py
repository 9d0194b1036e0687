"""Measures of a representation, each by the formula of its source, in float64.

N = images    D = width of a feature    C = classes    q = samples of a class
K = min(N, D), the most directions that N features of width D can span
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from jepa_kit.rng import FloatArray

Features = NDArray[np.floating[Any]]

RANKME_EPSILON = 1e-7
"""RankMe's, added to every share so that its logarithm is finite (Garrido et al. 2023, equation 2)."""
LIDAR_DELTA = 1e-4
"""LiDAR's, added to the diagonal within classes so that it has an inverse (Thilak et al. 2024, section 4)."""


def check_features(features: Features) -> FloatArray:
    """[N, D] as float64.

    Raises:
        ValueError: fewer than 2 samples, another shape, or a value that is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N at least 2, not of shape {features.shape}")
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise ValueError(f"features must be finite, but that of sample {bad} is not")
    return np.asarray(features, dtype=np.float64)


def deviation(features: Features) -> float:
    """The standard deviation over samples, mean over the width: 0 for a constant.

    Source: the variance term of VICReg (Bardes et al. 2022, section 4.1) hinges on it. It has the features' own scale.
    """
    return float(check_features(features).std(axis=0).mean())


def unit_deviation(features: Features) -> float:
    """As ``deviation``, of features of length 1, times sqrt(D): 0 for a constant, near 1 for directions at random.

    Source: SimSiam (Chen and He 2021, section 4.1), which draws it as the sign of collapse, without the factor.
    """
    unit = unit_length(features)
    return float(unit.std(axis=0).mean() * np.sqrt(unit.shape[1]))


def mean_cosine(features: Features) -> float:
    """The cosine between two different samples, mean over all pairs: 1 for a constant, 0 for directions at random."""
    unit = unit_length(features)
    n = len(unit)
    # the sum over all pairs, less each sample with itself
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (n * (n - 1)))


def uniformity(features: Features, t: float = 2.0) -> float:
    """log of the mean over pairs of exp(-t |u - v|^2), of features of length 1: 0 for a constant, else lower.

    Source: Wang and Isola 2020, section 4.1.2, with t = 2; about -4 for directions at random in a large width.
    """
    unit = unit_length(features)
    first, second = np.triu_indices(len(unit), 1)
    cosine = (unit @ unit.T)[first, second]
    exponent = -t * np.maximum(2.0 - 2.0 * cosine, 0.0)  # |u - v|^2 = 2 - 2 u.v
    return float(np.log(np.exp(exponent).mean()))


def unit_length(features: Features) -> FloatArray:
    """[N, D] each divided by its length; a feature of zeros stays one."""
    x = check_features(features)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def rankme(features: Features) -> float:
    """exp of the entropy of the singular values: how many directions the features fill, from 1 to K.

    Source: RankMe (Garrido et al. 2023, equations 1 and 2): p_k = s_k / sum(s) + 1e-7, of the features as they are: the
    mean of all features is one direction, and often the largest.
    """
    values = singular_values(check_features(features))
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum() + RANKME_EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


def effective_rank(features: Features) -> float:
    """exp of the entropy of the covariance's eigenvalues: how many directions the variation fills.

    Source: Roy and Vetterli 2007, section 2, of the covariance matrix (whose singular values are its eigenvalues, the
    squares of those of RankMe): it counts variance, so directions that hold little of it count for little.
    """
    return entropy_rank(covariance_spectrum(features))


def entropy_rank(values: FloatArray) -> float:
    """exp of the entropy of values that are not negative, as shares of their sum; 0 where all are 0."""
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def covariance_spectrum(features: Features) -> FloatArray:
    """[K] eigenvalues of the covariance matrix (1 / N), descending."""
    x = check_features(features)
    return np.square(singular_values(x - x.mean(axis=0))) / len(x)


def singular_values(x: FloatArray) -> FloatArray:
    """[K], descending."""
    with threadpool_limits(1):  # on matrices as small as these, threads wait for one another longer than they work
        return np.asarray(np.linalg.svd(x, compute_uv=False), dtype=np.float64)


def alpha_req(features: Features, first: int = 11) -> float | None:
    """How fast the eigenvalues of the covariance fall: alpha in lambda_j ~ j^-alpha.

    Source: alpha-ReQ (Agrawal et al. 2022), with the fit of Stringer et al. 2019: least squares of log lambda_j on log
    j, each weighted by 1 / j, from the 11th eigenvalue on (from K / 4 where K is smaller). They find features whose
    alpha is near 1 to be the useful ones: far above it, few directions hold all; far below it, noise fills the space.
    The fit ends at K / 2: beyond it, the spectrum of a sample falls for want of samples.

    Returns:
        alpha; None where fewer than 3 eigenvalues above rounding lie in the range.
    """
    values = covariance_spectrum(features)
    k = len(values)
    j = np.arange(1, k + 1)
    # singular values carry rounding of float64, or of the float32 that features were made in
    within = (j >= min(first, max(k // 4, 1))) & (j <= k // 2) & (values > 1e-14 * values[0])
    if within.sum() < 3:
        return None
    x, y, weight = np.log(j[within]), np.log(values[within]), 1.0 / j[within]
    x_mean, y_mean = (np.average(v, weights=weight) for v in (x, y))
    slope = np.sum(weight * (x - x_mean) * (y - y_mean)) / np.sum(weight * np.square(x - x_mean))
    return float(-slope)


def lidar(classes: NDArray[np.floating[Any]], delta: float = LIDAR_DELTA) -> float:
    """exp of the entropy of the eigenvalues of a linear discriminant analysis: directions that tell images apart.

    Source: LiDAR (Thilak et al. 2024, section 4): an image is a class, views of it are its samples, and directions in
    which views of one image differ as much as images do count for little. Sigma_b is the covariance of the means of
    classes, Sigma_w the mean covariance inside a class plus ``delta`` on the diagonal; the eigenvalues are those of
    Sigma_w^-1/2 Sigma_b Sigma_w^-1/2.

    Args:
        classes: [C, q, D], at least 2 of each of the first two.
        delta: in the features' own units, squared.

    Returns:
        from 1 to min(C - 1, D); 0 where all classes have one mean.

    Raises:
        ValueError: fewer than 2 classes or samples of one.
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
        turned = np.linalg.solve(factor, between.T)  # [D, C]
    return entropy_rank(np.square(singular_values(turned)))
