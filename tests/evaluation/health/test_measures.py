"""Each measure against scipy or another form of its formula, in float64."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats

from jepa_kit.evaluation.health.measures import (
    alpha_req,
    covariance_spectrum,
    deviation,
    effective_rank,
    lidar,
    mean_cosine,
    rankme,
    singular_values,
    uniformity,
    unit_deviation,
)

RANDOM = np.random.default_rng(0)
SKEWED = RANDOM.normal(size=(60, 24)) * np.geomspace(3, 0.01, 24) + RANDOM.normal(size=24)
"""[60, 24] with a nonzero mean and a decaying spectrum."""
WIDE = RANDOM.normal(size=(15, 40)) + 2.0
CONSTANT = np.tile(RANDOM.normal(size=24), (60, 1))
INPUTS = pytest.mark.parametrize("x", [SKEWED, WIDE, SKEWED.astype(np.float32)], ids=["skewed", "wide", "float32"])


@INPUTS
def test_deviation(x):
    assert deviation(x) == pytest.approx(scipy.stats.tstd(x.astype(np.float64), axis=0, ddof=0).mean())
    by_hand = [row / np.sqrt((row.astype(np.float64) ** 2).sum()) for row in x]
    expected = np.mean([np.std(column) for column in zip(*by_hand, strict=True)]) * x.shape[1] ** 0.5
    assert unit_deviation(x) == pytest.approx(expected)


@INPUTS
def test_cosine_and_uniformity_over_pairs(x):
    x = x.astype(np.float64)
    assert mean_cosine(x) == pytest.approx(np.mean(1.0 - scipy.spatial.distance.pdist(x, "cosine")))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    squared = scipy.spatial.distance.pdist(unit, "sqeuclidean")
    for t in (2.0, 0.5):
        assert uniformity(x, t) == pytest.approx(np.log(np.mean(np.exp(-t * squared))))


@INPUTS
def test_rankme(x):
    values = np.sqrt(np.maximum(scipy.linalg.eigvalsh(x.astype(np.float64) @ x.T.astype(np.float64)), 0))
    shares = np.sort(values)[::-1][: min(x.shape)] / values.sum() + 1e-7
    assert rankme(x) == pytest.approx(np.exp(scipy.special.entr(shares).sum()), rel=1e-6)


@INPUTS
def test_effective_rank(x):
    eigenvalues = np.maximum(scipy.linalg.eigvalsh(np.cov(x.T.astype(np.float64), bias=True)), 0)
    assert effective_rank(x) == pytest.approx(np.exp(scipy.stats.entropy(eigenvalues)), rel=1e-8)
    np.testing.assert_allclose(
        covariance_spectrum(x), np.sort(eigenvalues)[::-1][: min(x.shape)], atol=1e-9 * eigenvalues.max()
    )


def test_ranks_known_by_construction():
    """m directions of equal variance have rank m; RankMe also counts the mean as a direction."""
    basis = scipy.linalg.hadamard(16).astype(float)[:, 1:]  # columns at right angles, of mean 0
    for m in (1, 3, 15):
        x = np.zeros((16, 20))
        x[:, :m] = basis[:, :m]
        assert effective_rank(x) == pytest.approx(m)
        assert rankme(x) == pytest.approx(m, rel=1e-4)
        x[:, -1] = 1.0
        assert effective_rank(x) == pytest.approx(m)
        assert rankme(x) == pytest.approx(m + 1, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_a_power_law(alpha):
    left = scipy.stats.ortho_group.rvs(200, random_state=0)[:, :80]
    left = scipy.linalg.qr(left - left.mean(axis=0), mode="economic")[0]
    x = left * np.arange(1, 81) ** (-alpha / 2)
    assert alpha_req(x) == pytest.approx(alpha, rel=1e-6)


def test_alpha_is_a_weighted_fit():
    values = covariance_spectrum(RANDOM.normal(size=(300, 100)) * np.geomspace(1, 0.01, 100))
    x = np.diag(np.sqrt(values)) @ scipy.stats.ortho_group.rvs(100, random_state=1)
    spectrum = covariance_spectrum(x)
    j = np.arange(11, 51)
    slope = np.polyfit(np.log(j), np.log(spectrum[10:50]), 1, w=np.sqrt(1 / j))[0]
    assert alpha_req(x) == pytest.approx(-slope)


def test_alpha_needs_a_range():
    assert alpha_req(RANDOM.normal(size=(50, 6))) is not None
    assert alpha_req(RANDOM.normal(size=(50, 4))) is None
    assert alpha_req(RANDOM.normal(size=(100, 2)) @ RANDOM.normal(size=(2, 30))) is None


def test_alpha_ignores_rounding():
    """Of 8 eigenvalues the fit uses the second to the fourth, if all three are above 1e-14 of the first."""
    basis = scipy.linalg.hadamard(16).astype(float)[:, 1:9]  # columns at right angles, of mean 0
    for last, expected in ((1.5e-14, True), (0.7e-14, False)):
        x = basis * np.sqrt([1.0, 0.5, 0.1, last, 0, 0, 0, 0])
        assert (alpha_req(x) is not None) is expected


def test_lidar_of_the_fewest_classes_and_samples():
    """Two classes differ in one direction."""
    assert lidar(RANDOM.normal(size=(2, 2, 5))) == pytest.approx(1.0)


def test_lidar():
    classes = RANDOM.normal(size=(40, 1, 6)) * [5, 4, 3, 1, 0.1, 0.1] + RANDOM.normal(size=(40, 5, 6))
    means = classes.mean(axis=1)
    between = np.cov(means.T, bias=True)
    within = sum(np.cov(c.T, bias=True) for c in classes) / 40 + 1e-4 * np.eye(6)
    values = scipy.linalg.eigh(between, within, eigvals_only=True)  # generalised: Sigma_b v = lambda Sigma_w v
    assert lidar(classes) == pytest.approx(np.exp(scipy.stats.entropy(values)))
    root = scipy.linalg.inv(scipy.linalg.sqrtm(within))
    values = scipy.linalg.eigvalsh(root @ between @ root)
    assert lidar(classes) == pytest.approx(np.exp(scipy.stats.entropy(values)))


def test_lidar_counts_discriminative_directions():
    """Noise within classes fills eight directions; classes differ in two."""
    means = np.zeros((400, 1, 8))
    means[:, 0, :2] = 10 * RANDOM.normal(size=(400, 2))
    assert lidar(means + RANDOM.normal(size=(400, 50, 8))) == pytest.approx(2.0, abs=0.05)


def test_constant_features():
    assert deviation(CONSTANT) == pytest.approx(0, abs=1e-15)
    assert unit_deviation(CONSTANT) == pytest.approx(0, abs=1e-15)
    assert mean_cosine(CONSTANT) == pytest.approx(1)
    assert uniformity(CONSTANT) == pytest.approx(0, abs=1e-12)
    assert rankme(CONSTANT) == pytest.approx(1, abs=1e-3)
    zeros = np.zeros((5, 3))
    assert (rankme(zeros), effective_rank(zeros), mean_cosine(zeros)) == (0.0, 0.0, 0.0)
    assert alpha_req(zeros) is None
    assert lidar(np.ones((4, 3, 2))) == 0.0


def test_random_directions():
    x = np.random.default_rng(1).normal(size=(500, 300))
    assert unit_deviation(x) == pytest.approx(1.0, abs=0.01)
    assert mean_cosine(x) == pytest.approx(0.0, abs=0.01)
    assert uniformity(x) == pytest.approx(-4.0, abs=0.05)
    assert singular_values(x).shape == (300,)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((1, 4)), "features must be [N, D] with N at least 2, not of shape (1, 4)"),
        (np.ones(4), "features must be [N, D] with N at least 2, not of shape (4,)"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]]), "features must be finite, but that of sample 1 is not"),
        (np.diag([1.0, 1.0, np.inf])[:, ::-1], "features must be finite, but that of sample 2 is not"),
    ],
)
def test_rejected_features(x, message):
    for measure in (deviation, rankme, effective_rank, alpha_req, mean_cosine, uniformity):
        with pytest.raises(ValueError) as error:
            measure(x)
        assert str(error.value) == message


def test_rejected_classes():
    for shape in ((4, 3), (1, 3, 2), (4, 1, 2)):
        with pytest.raises(ValueError) as error:
            lidar(np.ones(shape))
        assert str(error.value) == f"classes must be [C, q, D] with C and q at least 2, not of shape {shape}"
