"""Show the progress of long work: a bar on a terminal, else lines with the rate and the time left."""

from __future__ import annotations

import sys
import time

SECONDS = 60.0
"""Longest time between two lines without a terminal; there is also one at each tenth of the work."""


class Progress:
    """Show how much of a total is done; the rate excludes what an earlier run did.

    Args:
        total: amount of work.
        unit: name of the unit that is shown.
        scale: amount of work in one unit.
    """

    def __init__(self, total: int, unit: str, *, scale: int = 1) -> None:
        self._total, self._unit, self._scale = total, unit, scale
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._tenth = 0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total / scale, unit=f" {unit}", desc="shards")

    def show(self, done: int, total: int | None = None) -> None:
        """Show that `done` of the total is done; `total` replaces the total, if it was unknown before."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total / self._scale
        if self._first is None:
            self._first = done
            self._tenth = done * 10 // max(self._total, 1)
        if self._bar is not None:
            if not self._bar.n:
                self._bar.initial = self._first / self._scale
            self._bar.update(done / self._scale - self._bar.n)
            return
        now, tenth = time.monotonic(), done * 10 // max(self._total, 1)
        if tenth > self._tenth or now - self._last > SECONDS:
            self._tenth, self._last = tenth, now
            print(self._line(done, now - self._start), flush=True)

    def _line(self, done: int, seconds: float) -> str:
        rate = (done - (self._first or 0)) / max(seconds, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        shown, total = done // self._scale, self._total // self._scale
        tail = f", {clock(left)} left" if done < self._total else f", {clock(seconds)} in all"
        return f"{shown} of {total} {self._unit}, {rate / self._scale:.0f}/s{tail}"

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def number_of(thing: str, count: int) -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration with its unit, such as ``7 s``, ``12 min`` or ``3.1 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def clock(seconds: float) -> str:
    """Return a duration such as ``0:07``, ``12:30`` or ``3:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
