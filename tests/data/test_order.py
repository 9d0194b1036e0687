"""The order of an epoch: a pure function, each sample once, shuffled within its window."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_kit.rng import Stream, epoch_order, generator, permutation

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(sizes=SIZES, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**32 - 1), window=st.integers(1, 400))
def test_each_sample_once_and_the_same_again(sizes, seed, epoch, window):
    order = epoch_order(sizes, seed=seed, epoch=epoch, window=window)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    np.testing.assert_array_equal(order, epoch_order(sizes, seed=seed, epoch=epoch, window=window))


def test_epochs_and_seeds_differ():
    orders = [epoch_order([50, 50], seed=s, epoch=e, window=30) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_window_of_one_leaves_shards_whole():
    order = epoch_order([10, 20, 30, 40], seed=0, epoch=0, window=1)
    assert (np.diff(order) == 1).sum() == 100 - 4
    assert not np.array_equal(order, np.arange(100))


def test_a_window_mixes_neighbours_only():
    window, size = 40, 20
    order = epoch_order([size] * 30, seed=1, epoch=2, window=window)
    for begin in range(0, 600, window):
        part = order[begin : begin + window]
        assert len(set(part // size)) == window // size
        assert (np.diff(part) == 1).mean() < 0.5


def test_the_last_partial_window_is_mixed_too():
    """150 samples in windows of 60: the last 30 places are in another order in every epoch."""
    lasts = [epoch_order([30] * 5, seed=3, epoch=e, window=60)[120:] for e in range(20)]
    assert all((np.diff(last) == 1).mean() < 0.3 for last in lasts)
    starts = np.mean([last[0] == last.min() for last in lasts])
    assert starts < 0.3, "the first place is not that of the first sample"


def test_a_window_of_everything_is_a_full_permutation():
    """Each sample is equally likely at each place: chi-square over 4,000 epochs."""
    from scipy.stats import chisquare

    counts = np.zeros((6, 6))
    for epoch in range(4000):
        counts[np.arange(6), epoch_order([2, 4], seed=5, epoch=epoch, window=6)] += 1
    assert chisquare(counts.ravel(), ddof=10).pvalue > 1e-3


def test_permutation_sorts_its_numbers():
    numbers = generator(Stream.ORDER, seed=9).random(100)
    np.testing.assert_array_equal(permutation(generator(Stream.ORDER, seed=9), 100), np.argsort(numbers))


def test_equal_numbers_stay_in_order_on_every_machine():
    class Equal:
        def random(self, n):
            return np.arange(n) % 2 / 2

    expected = [*range(0, 1000, 2), *range(1, 1000, 2)]
    np.testing.assert_array_equal(permutation(Equal(), 1000), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint64])
def test_sizes_of_any_type_of_integer(dtype):
    sizes = [500, 0, 700]
    order = epoch_order(np.array(sizes, dtype=dtype), seed=3, epoch=1, window=50)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order, epoch_order(sizes, seed=3, epoch=1, window=50))


def test_window_below_one():
    with pytest.raises(ValueError, match=r"shuffle_window \(=0\) must be at least 1"):
        epoch_order([3], seed=0, epoch=0, window=0)
