"""One run at a time in a run folder.

Two runs in one folder, of a job that was handed in twice, say, would delete each other's checkpoints. So the process
that writes (rank 0) holds a lock of the operating system on ``.lock`` in the folder. It goes with the process, however
that ends; where a machine on a network file system crashes, when the server notices.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

PATIENCE = 120.0
"""Seconds that a start waits for a run before it to let go: it may be on its way out, or on a machine that crashed,
which an NFS server takes 90 s to notice."""


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps others out of a run folder, which is made where there is none, and goes again if it stayed empty.

    A lock of ``fcntl``'s is the process' own: loader workers that outlive it do not keep it, and a second one inside
    the same process is let through. Where the file system has no locks, a line says so and the run goes on.

    Raises:
        ValueError: another process has a run there, or nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / LOCK
    try:
        held = _locked(file)
    except OSError as error:
        raise ValueError(f"train.output_dir (={str(folder)!r}) cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_at(held, file):
                file.unlink()  # before it is let go: who waits for it looks whether it is still there
        os.close(held)
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _locked(file: Path) -> int:
    """The descriptor of the locked file."""
    end, waiting = time.monotonic() + PATIENCE, False
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"note: {file.parent} has no locks ({error.strerror}); see that no other run is started there")
                return descriptor
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            if time.monotonic() > end:
                raise ValueError(
                    f"train.output_dir (={str(file.parent)!r}) is in use by {holder}: wait for that run, end it, or "
                    f"give another --output-dir (where its machine has crashed, delete {file})"
                ) from error
            if not waiting:
                print(f"waiting up to {PATIENCE:.0f} s for {holder}, which has a run in {file.parent}", flush=True)
            waiting = True
            time.sleep(0.1)
            continue
        if _is_at(descriptor, file):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file still has its name: the process that held it before took that away."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
