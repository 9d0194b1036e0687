"""Loader workers: number, start, shutdown and errors of the processes that make batches; threads of torch."""

from __future__ import annotations

import atexit
import multiprocessing.queues
import os
import shutil
import signal
from collections.abc import Generator, Iterable
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from jepa_kit.compat import worker_error
from jepa_kit.data.ignored_signals import blocked, ignore
from jepa_kit.machine import cores_of_rank

FILES = 40
"""Open files per worker and view, in it and in the main process: batches in flight and pipes."""
SHARED_MEMORY = "/dev/shm"
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a run: they reach the whole process group, but only the main process handles them.

It finishes its step and writes a checkpoint, and needs its workers until then. It stops them itself; if it is killed,
torch's watchdog in each worker ends it.
"""

Workers = int | Literal["auto"]

MOST = 16
"""Most workers on CUDA: enough for 6,000 photos per second and GPU (2.4 ms each). Each one costs memory."""
CPU_PART = 4
"""On a CPU one core in so many loads images; the others run the training step."""
QUICK = {"cuda": 50e-6, "cpu": 1e-3}
"""If loading an image takes fewer seconds, the training process loads: workers would cost more than they save."""

_workers: WeakSet[Any] = WeakSet()


def load(
    batches: Dataset, requests: Iterable[Any], num_workers: int, pin_memory: bool, *, views: int = 1
) -> Generator[Any, None, None]:
    """Yield one batch per request, in order.

    Args:
        batches: maps a request to a batch.
        requests: in order; may be infinite.
        num_workers: number of processes; 0 makes batches in this one.
        pin_memory: whether to return batches in page-locked memory.
        views: of a batch, each of which has tensors of its own.

    Raises:
        RuntimeError: a worker died, or cannot send a batch because shared memory is full or too many files are open.
    """
    if num_workers:
        allow_files(num_workers * views)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # for the seed of the workers, so that it does not advance the run's generator
        worker_init_fn=_start,
    )
    with blocked(IGNORED):  # a worker that has just started does not ignore them yet
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


def allow_files(senders: int) -> None:
    """Raise the soft limit of open files, which workers inherit, to what they need or the hard limit.

    Args:
        senders: workers times views.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    here = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    needed = here + FILES * senders
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _advice(error: Exception, num_workers: int) -> str | None:
    """Return advice on an error of DataLoader; None if a batch raised the error."""
    text = str(error)
    if "Too many open files" in text:  # check first: torch's message then contains "shared memory" too
        return (
            f"too many files are open: loader workers send each tensor of a batch as a file, and {_limit()}. Raise it "
            f"(ulimit -n 4096), or use fewer data.num_workers than {num_workers}; 0 needs none"
        )
    if "No space left on device" in text or "shared memory" in text:
        room = shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else 0
        return (
            f"{SHARED_MEMORY} ({room / 1e6:.0f} MB) is full: loader workers send batches through it. Increase "
            "it (docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory; mount -o remount,size=8g), a "
            f"smaller train.batch_size, or fewer data.num_workers than {num_workers}; 0 needs none"
        )
    if not _is_death(error):
        return None
    return (
        f"a loader worker died ({text or type(error).__name__}). Often memory is exhausted: try fewer num_workers than "
        f"{num_workers} or a smaller batch_size; or {SHARED_MEMORY} is too small for the batches in flight; or "
        f"too few open files are allowed: {_limit()}"
    )


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "the system limits them"
    return f"`ulimit -n` is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"


def _end(made: Any) -> None:
    """Stop the workers now: a traceback may keep their iterator alive until the process ends."""
    end = getattr(made, "_shutdown_workers", None)
    if end is None:
        return
    try:
        end()
    except RuntimeError as error:  # torch's signal handler may raise here if a worker died
        if not _is_death(error):
            raise
    for worker in made._workers:
        if worker.is_alive():  # it does not respond, and ignores SIGTERM
            worker.kill()


def _start(worker: int) -> None:
    """Set up signals and error handling of a worker."""
    ignore(IGNORED)
    # by default, failing to send a batch prints a traceback in a thread, and the main process waits forever
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_reason  # type: ignore[attr-defined]


def _send_reason(queue: Any, error: BaseException, sent: Any) -> None:
    """Send the error instead of the batch; called by the worker's sending thread."""
    where = "in a loader worker, while sending a batch"
    queue.put((sent[0], worker_error(error, where)))


def _kill_workers() -> None:
    """Kill workers that an error left over; at exit, multiprocessing would send SIGTERM and wait for them."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


atexit.register(_kill_workers)  # registered after multiprocessing's handler, so it runs before that one


def _is_death(error: Exception) -> bool:
    """Whether an error of DataLoader means that a worker died, rather than raised an error.

    A dead process is a RuntimeError; a closed connection during the transfer of a batch is one of the others. Errors
    that a worker raises have a message that begins with "Caught".
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return isinstance(error, EOFError | ConnectionError | FileNotFoundError) and not str(error).startswith("Caught")


def choose_workers(wanted: Workers, device: torch.device, seconds: float | None = None) -> int:
    """Return the number of loader processes of a rank: ``wanted``, or what "auto" means here.

    Args:
        wanted: ``data.num_workers``.
        device: on CUDA every usable core of a rank gets a worker, up to ``MOST``; on a CPU one core in ``CPU_PART``.
        seconds: of one core, to load one image; None if unknown. Below ``QUICK`` there are no workers.
    """
    if wanted != "auto":
        return wanted
    if seconds is not None and seconds < QUICK[device.type]:
        return 0
    cores = cores_of_rank()
    if device.type == "cuda":
        return 0 if cores == 1 else min(cores, MOST)
    return min(cores // CPU_PART, MOST)


def limit_threads() -> None:
    """Limit torch's threads to the usable cores of this rank, unless OMP_NUM_THREADS is set.

    The tools set it (machine.py); this is for callers from Python.
    """
    if "OMP_NUM_THREADS" not in os.environ and cores_of_rank() < torch.get_num_threads():
        torch.set_num_threads(cores_of_rank())
