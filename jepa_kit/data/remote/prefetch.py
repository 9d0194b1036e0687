"""Fetch remote shards before a reader needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from jepa_kit.errors import CacheError

FETCHERS = 4
"""Concurrent downloads of a rank."""


class Prefetcher:
    """Threads that fetch the shards of coming steps.

    They only do earlier what a reader would do; a download that fails is reported by the reader that needs it.

    Args:
        plan: infinite (step, shard) in the order of the steps; the shard is None for a step without one, so that a
            thread never searches the plan beyond ``steps``.
        fetch: downloads a shard.
        steps: how many steps ahead of the current one to fetch.
    """

    def __init__(self, plan: Iterator[tuple[int, int | None]], fetch: Callable[[int], None], steps: int) -> None:
        self.plan, self.fetch, self.steps = plan, fetch, steps
        self._step: float | None = None
        self._stopped = False
        self._moved = threading.Condition()
        self._planning = threading.Lock()  # separate from _moved: computing an epoch's order must not block ``advance``
        # daemons: a stalled download must not keep the program from exiting
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(FETCHERS)]

    def advance(self, step: int) -> None:
        """Set the current step; the first call starts the threads."""
        with self._moved:
            started, self._step = self._step is not None, step
            self._moved.notify_all()
        if not started:
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """Stop each thread after its current download."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def _work(self) -> None:
        while True:
            with self._planning:
                if self._stopped:
                    return
                step, shard = next(self.plan)
                with self._moved:
                    while not self._stopped and step > (self._step or 0) + self.steps:
                        self._moved.wait()
            if self._stopped:
                return
            try:
                if shard is not None:
                    self.fetch(shard)
            except CacheError:  # the reader that needs the shard reports it
                return
