"""Worker processes that make the samples of a source, in a given order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager

from jepa_kit.data.ignored_signals import blocked, ignore
from jepa_kit.data.shards.tars import Refusal
from jepa_kit.data.shards.writing import Packed, pack
from jepa_kit.data.sources.base import Refused, Source
from jepa_kit.rng import IntArray

CHUNK_BYTES = 1 << 20
"""Approximate size of the samples that a worker returns at a time."""
MAX_CHUNK = 128
AHEAD = 3
"""Chunks per worker that are requested in advance."""

IGNORED = (signal.SIGINT,)
"""Ctrl-C reaches all processes of a terminal; a worker that died of it would look like a crash."""

_source: Source


class Workers(AbstractContextManager["Workers"]):
    """A pool of processes, which end with the ``with`` block.

    Args:
        source: of the samples.
        workers: number of processes.
    """

    def __init__(self, source: Source, workers: int) -> None:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, context, _start, (source, os.getpid()))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def samples(self, numbers: IntArray) -> Iterator[Packed | Refusal]:
        """Yield the samples of the given numbers in order; a bounded number of them is made in advance.

        Raises:
            BrokenProcessPool: a worker died.
        """
        pending: deque[Future[list[Packed | Refusal]]] = deque()
        start, chunk = 0, 1
        while pending or start < len(numbers):
            while start < len(numbers) and len(pending) < AHEAD * self._workers:
                with blocked(IGNORED):  # the first chunk starts the workers
                    pending.append(self._pool.submit(_make, numbers[start : start + chunk].tolist()))
                start += chunk
            made = pending.popleft().result()
            size = sum(len(sample.data) for sample in made if isinstance(sample, Packed))
            # fewer samples in a chunk if they are large; the order does not depend on it
            chunk = max(1, min(MAX_CHUNK, 2 * chunk, CHUNK_BYTES * len(made) // max(size, 1)))
            yield from made


def _start(source: Source, parent: int) -> None:
    global _source
    _source = source
    ignore(IGNORED)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """End this process when its parent is gone: a parent that is killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make(numbers: list[int]) -> list[Packed | Refusal]:
    made: list[Packed | Refusal] = []
    for i in numbers:
        try:
            made.append(pack(_source.sample(i)))
        except Refused as reason:  # noqa: PERF203 (the others are made)
            made.append(Refusal(_source.name(i), str(reason)))
    return made
