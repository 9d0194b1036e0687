"""What fails once a run is under way: no mistake in its config or command, and told apart from those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jepa_kit.engine.checkpoint.async_save import folder_error
from jepa_kit.errors import RunError, SaveError


@contextmanager
def under_way(folder: Path) -> Iterator[None]:
    """Around the steps of a run in ``folder``.

    Raises:
        RunError: in place of a ValueError, OSError or RuntimeError, with the same words.
        SaveError: as it is; also in place of an OSError because of which the folder takes no more.
    """
    try:
        yield
    except (RunError, SaveError):
        raise
    except OSError as error:
        told = folder_error(folder, error)
        raise (RunError(str(error)) if told is error else told) from error
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error
