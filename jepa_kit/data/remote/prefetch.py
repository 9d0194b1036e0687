"""Shards of other machines are fetched before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from jepa_kit.errors import CacheError

FETCHERS = 4
"""Shards that a rank fetches at the same time."""


class Ahead:
    """Threads that fetch what steps to come will need.

    They only ever do earlier what a reader would do: what they cannot fetch, the reader meets and tells.

    Args:
        plan: (step, shard) in the order of the steps, without end; for a step that needs none, None in place of one, so
            that a thread never searches the plan for longer than it may look ahead.
        fetch: brings a shard.
        steps: how far ahead of the current step they go.
    """

    def __init__(self, plan: Iterator[tuple[int, int | None]], fetch: Callable[[int], None], steps: int) -> None:
        self.plan, self.fetch, self.steps = plan, fetch, steps
        self._step: float | None = None
        self._stopped = False
        self._moved = threading.Condition()
        self._planning = threading.Lock()  # not held by ``advance``: an epoch's order takes a moment
        # daemons, so that a program can end while a stream stalls
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(FETCHERS)]

    def advance(self, step: int) -> None:
        """The run is at this step; the first call starts the threads."""
        with self._moved:
            started, self._step = self._step is not None, step
            self._moved.notify_all()
        if not started:
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """Ends the threads, each after the shard that it is fetching."""
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
            except CacheError:  # the reader that needs the shard tells
                return
