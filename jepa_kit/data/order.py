"""The order of an epoch: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa_kit.rng import IntArray, Stream, generator


def permutation(rng: np.random.Generator, n: int) -> IntArray:
    """Return a random permutation of 0 to n - 1, int64 [n].

    It sorts uniform numbers, whose stream is stable over numpy releases; ``Generator.permutation`` gives no such
    guarantee.
    """
    return np.argsort(rng.random(n), kind="stable")


def epoch_order(sizes: Sequence[int] | IntArray, *, seed: int, epoch: int, window: int) -> IntArray:
    """Return the order of an epoch: shards in random order, then samples shuffled within windows.

    Consecutive samples come from few shards, so that each is read in long stretches. A window of all samples is a full
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
    order = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in shards])
    for begin in range(0, total, window):
        part = order[begin : begin + window]
        order[begin : begin + window] = part[permutation(rng, len(part))]
    return order
