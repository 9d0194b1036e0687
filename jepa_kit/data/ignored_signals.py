"""Signals that reach a whole process group, and that a worker process leaves to the process that started it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def blocked(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Block signals, here and in processes that start inside, which may die of them until they ``ignore`` them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(numbers: Sequence[signal.Signals]) -> None:
    """Ignore signals in this process, also those that were blocked."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
