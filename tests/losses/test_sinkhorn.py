"""Sinkhorn-Knopp against plain float64 maths in numpy, and over two processes."""

from __future__ import annotations

import numpy as np
import pytest
import sinkhorn_cases
import torch
from scipy.special import softmax

from jepa_kit.losses.sinkhorn import sinkhorn


def scores(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("iterations", [1, 3])
def test_classes_and_rows_are_divided_by_their_sums_in_turn(iterations):
    x = scores(7, 4)
    wanted = np.exp(x.numpy())
    for _ in range(iterations):
        wanted = wanted / wanted.sum(0, keepdims=True)
        wanted = wanted / wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(sinkhorn(x, iterations), wanted, rtol=1e-13)
    np.testing.assert_allclose(sinkhorn(x - 50, iterations), wanted, rtol=1e-12)


def test_eps_is_added_to_sums():
    """As in CAPI's code, where 50 minus the maximum of each class is added before exp."""
    x, eps = scores(7, 4), 1e-3
    wanted = np.exp(x.numpy() + 50 - x.numpy().max(0))
    for _ in range(3):
        wanted = wanted / (wanted.sum(0, keepdims=True) + eps)
        wanted = wanted / (wanted.sum(1, keepdims=True) + eps)
    np.testing.assert_allclose(sinkhorn(x, 3, eps=eps), wanted, rtol=1e-13)
    assert 1e-4 < (1 - sinkhorn(x, 3, eps=eps).sum(1)).min() < 0.01
    np.testing.assert_allclose(sinkhorn(x, 3, eps=1e-30), sinkhorn(x, 3), rtol=1e-14)


def test_many_iterations_balance_the_classes():
    found = sinkhorn(scores(8, 4), 200)
    np.testing.assert_allclose(found.sum(0), np.full(4, 2.0), rtol=1e-9)
    np.testing.assert_allclose(found.sum(1), np.ones(8), rtol=1e-13)


def test_each_leading_index_is_balanced_alone():
    x = scores(3, 6, 4)
    torch.testing.assert_close(sinkhorn(x, 3), torch.stack([sinkhorn(part, 3) for part in x]))


def test_no_iteration_is_a_softmax():
    x = scores(6, 4)
    np.testing.assert_allclose(sinkhorn(x, 0), softmax(x.numpy(), axis=1), rtol=1e-13)


def test_weights_that_would_underflow():
    assert sinkhorn(torch.tensor([[0.0, -500.0], [0.0, -500.0]]), 3).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_half_precision_is_computed_in_float32():
    x = scores(6, 4).bfloat16()
    torch.testing.assert_close(sinkhorn(x, 3), sinkhorn(x.float(), 3), rtol=0, atol=0)


@pytest.mark.integration
def test_the_classes_of_two_processes_are_balanced_together(ranks):
    ranks(2, sinkhorn_cases.__file__)


def test_negative_iterations():
    with pytest.raises(ValueError, match=r"iterations \(=-1\) must be 0 or more"):
        sinkhorn(scores(2, 2), -1)


@pytest.mark.parametrize("eps", [-1e-8, float("nan")])
def test_eps_out_of_range(eps):
    with pytest.raises(ValueError, match=rf"eps \(={eps}\) must be 0 or more"):
        sinkhorn(scores(2, 2), 1, eps=eps)
