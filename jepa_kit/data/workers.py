"""Loader workers: processes that make batches, how they end, and what to do when they cannot send one."""

from __future__ import annotations

import atexit
import multiprocessing.queues
import os
import shutil
import signal
from collections.abc import Generator, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

FILES = 40
"""Files of a worker that may be open at a time, in it and in the main process: of its batches under way, and pipes."""
SHARED_MEMORY = "/dev/shm"
_workers: WeakSet[Any] = WeakSet()


def load(batches: Dataset, requests: Iterable[Any], num_workers: int, pin_memory: bool) -> Generator[Any, None, None]:
    """Yield one batch for each request, in their order.

    Args:
        batches: request -> batch.
        requests: in order; also without end.
        num_workers: processes; 0 makes batches in this one.
        pin_memory: whether batches arrive in page-locked memory.

    Raises:
        RuntimeError: a worker died, or cannot send a batch: shared memory is full, or too many files are open.
    """
    if num_workers:
        allow_files(num_workers)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the run's own numbers
        worker_init_fn=_start,
    )
    made = iter(loader)
    _workers.update(getattr(made, "_workers", ()))
    try:
        yield from made
    except (RuntimeError, EOFError, OSError) as error:
        advice = _advice(error, num_workers) if num_workers else None
        if advice is None:
            raise
        raise RuntimeError(advice) from error
    finally:
        _end(made)


def allow_files(num_workers: int) -> None:
    """Raise this process's soft limit of open files, which workers inherit, to what they may need or the hard limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    here = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    needed = here + FILES * num_workers
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _advice(error: Exception, num_workers: int) -> str | None:
    """What to do about an error of DataLoader; None for one that a batch raised itself."""
    text = str(error)
    if "Too many open files" in text:  # torch's text then has "shared memory" in it too
        return (
            f"too many files are open: loader workers send each tensor of a batch as a file, and {_limit()}. Raise it "
            f"(ulimit -n 4096), or use fewer data.num_workers than {num_workers}; 0 needs none"
        )
    if "No space left on device" in text or "shared memory" in text:
        room = shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else 0
        return (
            f"{SHARED_MEMORY} ({room / 1e6:.0f} MB) is full: loader workers send batches through it. Give it more "
            "room (docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory; mount -o remount,size=8g), a "
            f"smaller train.batch_size, or fewer data.num_workers than {num_workers}; 0 does without it"
        )
    if not _is_death(error):
        return None
    return (
        f"a loader worker died ({text or type(error).__name__}). Often memory ran out: fewer num_workers than "
        f"{num_workers} or a smaller batch_size help; or {SHARED_MEMORY} is too small for the batches in flight; or "
        f"too few open files are allowed: {_limit()}"
    )


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "the system bounds them"
    return f"`ulimit -n` is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"


def _end(made: Any) -> None:
    """Ends the workers: a traceback may keep their iterator, and with it them, to the end of the process."""
    end = getattr(made, "_shutdown_workers", None)
    if end is None:
        return
    try:
        end()
    except RuntimeError as error:  # torch's handler raises wherever the main process is when it learns of a death
        if not _is_death(error):
            raise
    for worker in made._workers:
        if worker.is_alive():  # it did not answer, and SIGTERM it ignores
            worker.kill()


def _start(worker: int) -> None:
    """In a worker: what it does on signals and failures."""
    _ignore_signals()
    # else a batch that cannot be sent is a traceback in a thread, and the main process waits for it without end
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_reason  # type: ignore[attr-defined]


def _send_reason(queue: Any, error: BaseException, sent: Any) -> None:
    """In a worker, called by the thread that sends batches: send the reason instead of the batch."""
    where = "in a loader worker, as a batch was sent"
    queue.put((sent[0], ExceptionWrapper((type(error), error, error.__traceback__), where)))


def _kill_workers() -> None:
    """At exit: kill workers that an error left over. multiprocessing would send SIGTERM, and wait for them."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


atexit.register(_kill_workers)  # after multiprocessing's own, so that it runs before it


def _ignore_signals() -> None:
    """In a worker: signals that ask a run to end reach the whole process group, and are for the main process alone.

    The main process may need longer than any grace period: for a long step, and for its checkpoint. It ends its
    workers itself; if it is killed, they notice (torch's watchdog).
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _is_death(error: Exception) -> bool:
    """Whether an error of DataLoader means that a worker is gone, and not that it raised the error itself.

    It is found dead by its process (RuntimeError), or by its end of the connection over which a finished batch was
    being fetched. What a worker raises is raised again with a text that begins "Caught".
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return isinstance(error, EOFError | ConnectionError | FileNotFoundError) and not str(error).startswith("Caught")
