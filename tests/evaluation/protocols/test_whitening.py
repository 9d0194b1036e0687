"""Standardised and whitened features against scikit-learn, for few samples, which show the divisor N or N - 1."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.preprocessing import StandardScaler

from jepa_kit.evaluation.protocols.whitening import Standardising, Whitening


@pytest.mark.parametrize("samples", [2, 5, 40])
def test_standardising_is_scikit_learns(samples):
    random = np.random.default_rng(samples)
    train, test = (random.normal(3, [1, 50, 1e-3], size=(n, 3)).astype(np.float32) for n in (samples, 7))
    wide = test.astype(np.float64)
    theirs = StandardScaler().fit(train.astype(np.float64))
    np.testing.assert_allclose(Standardising(train)(test), theirs.transform(wide), rtol=2e-6, atol=1e-6)


def test_a_cut_is_a_fraction_of_the_largest_variance():
    """Three columns that correlate by 1/2 each have components of variance 2, 1/2 and 1/2, whatever their scales."""
    columns = scipy.linalg.hadamard(8).astype(float)[:, 1:4]  # at right angles, mean 0, variance 1
    mixed = columns @ np.linalg.cholesky(np.full((3, 3), 0.5) + 0.5 * np.eye(3)).T
    for scales in (1.0, [1.0, 100.0, 1e-3]):
        whitening = Whitening(mixed * scales + 7.0)
        np.testing.assert_allclose(whitening.variances, [2.0, 0.5, 0.5], rtol=1e-9)
        assert [whitening.above(cut) for cut in (0.24, 0.26, 0.4, 0.99)] == [3, 1, 1, 1]
