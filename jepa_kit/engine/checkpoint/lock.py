"""One run at a time in a run folder: two would delete each other's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepa_kit.lock import LockedError, lock_file
from jepa_kit.run_folder import LOCK

TIMEOUT = 120.0
"""Seconds that a start waits for the run before it. An NFS server takes 90 s to notice that a machine has crashed."""


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock a run folder. It is created if it is missing, and deleted at the end if it stayed empty.

    If the file system has no locks, a note is printed and the run starts without one.

    Raises:
        ValueError: another process has a run there, or the folder cannot be written to.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = lock_file(
        folder / LOCK,
        timeout=TIMEOUT,
        on_wait=lambda holder: print(
            f"waiting up to {TIMEOUT:.0f} s for {holder}, which has a run in {folder}", flush=True
        ),
        on_unsupported=lambda error: print(
            f"note: {folder} has no locks ({error.strerror}); make sure that no other run is started there"
        ),
    )
    try:
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
