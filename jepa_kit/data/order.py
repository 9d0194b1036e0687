"""The order of an epoch: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa_kit.rng import IntArray, Stream, generator


def permutation(rng: np.random.Generator, n: int) -> IntArray:
    """[n] the numbers 0 to n - 1 in random order.

    By sorting uniform numbers: their stream is the same in every release of numpy so far, that of
    ``Generator.permutation`` is not promised to be.
    """
    return np.argsort(rng.random(n), kind="stable")


def epoch_order(sizes: Sequence[int] | IntArray, *, seed: int, epoch: int, window: int) -> IntArray:
    """Which sample comes when: shards in random order, then samples mixed within windows of them.

    Consecutive samples come from few shards (those of ``window`` neighbours), so that the shards are read in
    long stretches; a window of all samples is a full permutation, and one of 1 leaves shards whole and in order.

    Args:
        sizes: samples of each shard.
        seed: of the run.
        epoch: 0 or more.
        window: samples that are mixed together, at least 1.

    Returns:
        [N] each sample once; samples are numbered through the shards as they are listed.

    Raises:
        ValueError: a window below 1.
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
    order = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in shards])
    for begin in range(0, total, window):
        part = order[begin : begin + window]
        order[begin : begin + window] = part[permutation(rng, len(part))]
    return order
