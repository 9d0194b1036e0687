"""Rows of all processes, and their batch norm, in two gloo processes and in one."""

import pytest
import rows_cases
import torch
from torch import nn

from jepa_kit.distributed.batch_norm import SyncedBatchNorm
from jepa_kit.distributed.collectives import first_row, gather_with_grad, rank_and_size, row_counts


@pytest.mark.integration
def test_two_processes_have_the_rows_of_one(ranks):
    ranks(2, rows_cases.__file__)


def test_alone_nothing_is_gathered():
    x = torch.randn(3, 2)
    assert gather_with_grad(x) is x
    assert row_counts(3) == [3]
    assert first_row(3) == 0
    assert rank_and_size() == (0, 1)


@pytest.mark.parametrize("affine", [True, False])
def test_alone_it_is_torchs(affine):
    ours, theirs = SyncedBatchNorm(4, affine=affine), nn.BatchNorm1d(4, affine=affine)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    x = torch.randn(6, 4)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (4,)])
def test_rows_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"batch norm needs rows \[N, 4\], not \(" + str(shape[0])):
        SyncedBatchNorm(4)(torch.zeros(shape))


def test_one_row_has_no_variance():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        SyncedBatchNorm(4)(torch.zeros(1, 4))
