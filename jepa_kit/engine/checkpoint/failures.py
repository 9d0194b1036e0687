"""Errors of a run under way: what failed, and which checkpoint the run can be resumed from."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jepa_kit.engine.checkpoint.manager import Store, store_in
from jepa_kit.errors import RunError, SaveError, cause_of

FULL_OR_BROKEN = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
"""Errors after which nothing more can be written to a folder."""


@contextmanager
def under_way(folder: Path) -> Iterator[None]:
    """Wrap the errors of the steps of a run in ``folder``.

    Raises:
        RunError: for a ValueError, OSError or RuntimeError, with the same message.
        SaveError: as it is; also for an OSError after which nothing more can be written to the folder.
    """
    try:
        yield
    except (RunError, SaveError):
        raise
    except OSError as error:
        if error.errno not in FULL_OR_BROKEN:
            raise RunError(str(error)) from error
        left = _resumable(store_in(folder), "checkpoint", "there is no checkpoint")
        raise SaveError(f"{folder} cannot be written to: {error.strerror}; {left}") from error
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error


def save_error(store: Store, step: int, error: BaseException) -> SaveError:
    """Return the error of a checkpoint that could not be written."""
    return SaveError(
        f"the checkpoint of step {step} could not be written to {store.folder}: {cause_of(error)}; "
        f"{_resumable(store, 'one', 'there is no earlier one')}"
    )


def upload_error(store: Store, error: BaseException) -> SaveError:
    """Return the error of checkpoints that could not be uploaded, or of old ones that could not be deleted."""
    if not store.remote:
        return SaveError(
            f"old checkpoints could not be deleted from {store}: {cause_of(error)}; "
            f"{_resumable(store, 'checkpoint', 'there is no checkpoint')}"
        )
    left = ", ".join(map(str, store.pending_uploads())) or "none"
    return SaveError(
        f"checkpoints could not be uploaded to {store}: {cause_of(error)}; still in the run folder: {left}; "
        "--resume continues from the latest of all, and uploads them"
    )


def _resumable(store: Store, what: str, none: str) -> str:
    """Say which checkpoint the run can be resumed from. Remote ones are not downloaded to verify them."""
    if not store.remote:
        good = store.last_good()
        return f"the last good {what} is {good.name}" if good else none
    try:
        latest = store.newest()
    except OSError as error:
        return cause_of(error)
    return f"the latest {what} is {latest}" if latest else none
