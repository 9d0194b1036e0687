"""Random numbers and orders as pure functions of (seed, epoch, sample): no state, so every draw is reproducible.

``uniforms`` is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over
samples in numpy; numpy's own Philox makes one stream at a time, which costs more than the masks themselves.
``generator`` is numpy's, for draws that belong to an epoch and not to a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, unique
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@unique
class Stream(IntEnum):
    """Purpose of a draw; two purposes never use the same numbers."""

    MASK = 1
    MASK_SIZE = 2
    CROP = 3
    ORDER = 4
    FLIP = 5
    SCENE = 6
    EVALUATION = 7
    STEP = 8
    MASK_DROP = 9
    TRANSFORM = 10
    COMMON = 11
    VIEW = 12
    MASK_SHOW = 13
    MASK_SUBSET = 14


_MULTIPLIERS = np.array([0xCD9E8D57, 0xD2511F53], dtype=np.uint64)
"""Multipliers of words 2 and 0 of the counter."""
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
"""Increments of the two words of the key per round."""
_ROUND = np.arange(10, dtype=np.uint64)[:, None]
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Return the output of Philox4x32-10 for each counter.

    Args:
        counter: [4, ...] words below 2**32.
        key: below 2**64.

    Returns:
        [4, ...] words below 2**32, in uint64.
    """
    ones = (1,) * (counter.ndim - 1)
    multipliers = _MULTIPLIERS.reshape(2, *ones)
    keys = _round_keys(key).reshape(10, 2, *ones)
    # Two words at a time, paired as in a round: the even ones as (2, 0), the odd ones as (1, 3).
    even, odd = counter[2::-2], counter[1::2]
    for k in keys:
        product = even * multipliers
        high = product >> _32
        high ^= odd
        high ^= k
        product &= _LOW
        even, odd = high[::-1], product
    out = np.empty_like(counter)
    out[2::-2], out[1::2] = even, odd
    return out


@lru_cache(maxsize=64)
def _round_keys(key: int) -> NDArray[np.uint64]:
    """Return [10, 2], the two words of the key in each round."""
    words = np.array([key & 0xFFFFFFFF, key >> 32], dtype=np.uint64)
    keys: NDArray[np.uint64] = (words + _ROUND * _WEYL) & _LOW
    return keys


def uniforms(stream: Stream, samples: IntArray, count: int, *, seed: int, epoch: int, attempt: int = 0) -> FloatArray:
    """Return independent uniform numbers for each sample.

    Args:
        stream: purpose of the numbers.
        samples: [B] index of each sample in its data set, 0 to 2**40 - 1.
        count: numbers per sample, 1 to 2**18.
        seed: of the run, 0 to 2**63 - 1.
        epoch: 0 to 2**32 - 1.
        attempt: counts redraws, 0 to 2**16 - 1.

    Returns:
        [B, count] float64 in [0, 1), multiples of 2**-32. Row b depends on samples[b] alone, not on its neighbours,
        and its first numbers do not depend on ``count``.

    Raises:
        ValueError: an argument is outside its range, so that its draws would repeat those of another.
    """
    samples = np.asarray(samples, dtype=np.int64)
    _check_range("count", count, 1, 18)
    _check_range("seed", seed, 0, 63)
    _check_range("epoch", epoch, 0, 32)
    _check_range("attempt", attempt, 0, 16)
    for sample in (samples.min(initial=0), samples.max(initial=0)):
        _check_range("samples", int(sample), 0, 40)
    blocks = -(-count // 4)
    sample_words = samples.view(np.uint64)[:, None]  # [B, 1]
    counter = np.empty((4, len(samples), blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64) | np.uint64(attempt << 16)
    counter[1] = sample_words & _LOW
    counter[2] = epoch
    counter[3] = (sample_words >> _32) | np.uint64(int(stream) << 8)
    words = philox4x32(counter, seed)  # [4, B, blocks]
    numbers = np.empty((len(samples), blocks, 4))
    np.multiply(words.transpose(1, 2, 0), 2.0**-32, out=numbers)
    return numbers.reshape(len(samples), blocks * 4)[:, :count]


def view_seed(seed: int, view: int) -> int:
    """Return the seed of view ``view`` (from 0) of each sample, 0 to 2**63 - 1: the run's ``seed`` for the first."""
    if view == 0:
        return seed
    high, low = uniforms(Stream.VIEW, np.array([view]), 2, seed=seed, epoch=0)[0].tolist()
    return int(high * 2**31) << 32 | int(low * 2**32)


def _check_range(name: str, value: int, least: int, bits: int) -> None:
    top = 2**bits if least else 2**bits - 1
    if not least <= value <= top:
        raise ValueError(f"{name} (={value}) must be {least} to {top}")


def generator(stream: Stream, *, seed: int, epoch: int = 0, lane: int = 0) -> np.random.Generator:
    """Return numpy's Philox generator for draws that belong to (seed, epoch), such as the order of an epoch.

    Args:
        stream: purpose of the draws.
        seed, epoch: as for ``uniforms``.
        lane: number of one of several independent uses of a stream.
    """
    return np.random.Generator(np.random.Philox(key=[seed, int(stream)], counter=[0, lane, epoch, 0]))


def permutation(rng: np.random.Generator, n: int) -> IntArray:
    """Return a random permutation of 0 to n - 1, int64 [n].

    It sorts uniform numbers, whose stream is stable over numpy releases; ``Generator.permutation`` gives no such
    guarantee.
    """
    return np.argsort(rng.random(n), kind="stable")


def epoch_order(sizes: Sequence[int] | IntArray, *, seed: int, epoch: int, window: int) -> IntArray:
    """Return the order of an epoch: shards in random order, then samples shuffled within windows.

    Consecutive samples come from few shards, so that reads are nearly sequential. A window of all samples is a full
    permutation; a window of 1 keeps the samples of a shard in order.

    Args:
        sizes: number of samples of each shard.
        seed: seed of the run.
        epoch: at least 0.
        window: number of samples shuffled together, at least 1.

    Returns:
        int64 [N], each sample once; samples are numbered through the shards in their listed order.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"shuffle_window (={window}) must be at least 1")
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    rng = generator(Stream.ORDER, seed=seed, epoch=epoch)
    if window >= total:
        return permutation(rng, total)
    starts = np.cumsum(sizes) - sizes
    shards = permutation(rng, len(sizes))
    lengths = sizes[shards]
    order = np.arange(total) + np.repeat(starts[shards] - (np.cumsum(lengths) - lengths), lengths)
    for begin in range(0, total, window):
        part = order[begin : begin + window]
        order[begin : begin + window] = part[permutation(rng, len(part))]
    return order
