"""Lock files, which the operating system releases when their process ends, however it ends; the lock of a run folder.

`fcntl` locks belong to one process: loader workers that outlive it do not keep them, and a second lock inside the same
process succeeds. If a machine on a network file system crashes, the server releases its locks after a while.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepa_kit.run_folder import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


TIMEOUT = 120.0
"""Seconds that a new run waits for an earlier one. An NFS server takes 90 s to notice that a machine has crashed."""


class LockedError(OSError):
    """Another process has the lock; `holder` names it."""

    def __init__(self, file: Path, holder: str) -> None:
        super().__init__(f"{file} is locked by {holder}")
        self.holder = holder


@contextmanager
def lock_file(file: Path, *, timeout: float = 0.0, work: str = "") -> Iterator[None]:
    """Lock a file, which is created, and delete it at the end of the block.

    Args:
        file: its folder is created if it is missing.
        timeout: seconds to wait for the process that has the lock.
        work: what the lock is for, such as ``run``, in two notes that are printed: that this process waits, and that
            the file system has no locks. If it is empty, nothing is printed.

    If the file system has no locks, the block runs without one.

    Raises:
        LockedError: another process has the lock.
        OSError: the file cannot be written.
    """
    descriptor = _acquire(file, timeout, work)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_open_at(descriptor, file):
                file.unlink()  # before the release: a process that waits checks that the file still exists
        os.close(descriptor)


def _acquire(file: Path, timeout: float, work: str) -> int:
    """Return the descriptor of the locked file."""
    end, waiting = time.monotonic() + timeout, False
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                if work:
                    what = f"{file.parent} has no locks ({error.strerror})"
                    print(f"note: {what}; make sure that no other {work} is started there")
                return descriptor
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            if time.monotonic() >= end:
                raise LockedError(file, holder) from error
            if work and not waiting:
                print(f"waiting up to {timeout:.0f} s for {holder}, which has a {work} in {file.parent}", flush=True)
            waiting = True
            time.sleep(0.1)
            continue
        if _is_open_at(descriptor, file):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
            return descriptor
        os.close(descriptor)  # the process before deleted this file: lock the one that has its name now


def _is_open_at(descriptor: int, file: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def holder_of(file: Path) -> str | None:
    """Return the process that has the lock of a file, as ``process 17 on host``; None without one, or without locks.

    Call it in another process: closing the file would release a lock of this one.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return os.read(descriptor, 1000).decode(errors="replace") or "another process"
    finally:
        os.close(descriptor)
    return None


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock a run folder, because two runs in it would delete each other's checkpoints.

    The folder is created if it is missing, and deleted at the end if it stayed empty. If the file system has no locks,
    a note is printed and the run starts without one.

    Raises:
        ValueError: another process has a run there, or the folder cannot be written to.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = lock_file(folder / LOCK, timeout=TIMEOUT, work="run")
    try:  # no `with`: errors of locking are converted here, and not those of the block
        lock.__enter__()
    except LockedError as error:
        raise ValueError(
            f"train.output_dir (={str(folder)!r}) is in use by {error.holder}: wait for that run, end it, or give "
            f"another --output-dir (if its machine has crashed, delete {folder / LOCK})"
        ) from error
    except OSError as error:
        raise ValueError(f"train.output_dir (={str(folder)!r}) cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()
