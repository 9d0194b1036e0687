"""Every error class that more than one package raises or catches."""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence

PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError)
"""Errors of a pickle that is cut short or altered."""

MALFORMED = (*PICKLE_ERRORS, ArithmeticError, MemoryError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Errors of zipfile, pickle and torch for a file that is cut short or altered."""


class ConfigError(ValueError):
    """A config has mistakes; all are listed, one line each.

    Args:
        problems: one line per mistake.
        source: the file, if known.
    """

    def __init__(self, problems: Sequence[str], source: str | None = None) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        self.source = source
        if source is None:
            text = "\n".join(self.problems)
        else:
            count = f"{len(self.problems)} mistake{'s' if len(self.problems) > 1 else ''}"
            text = f"{source}: {count}\n" + "\n".join(f"  {line}" for line in self.problems)
        super().__init__(text)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str | None]]:
        return type(self), (self.problems, self.source)


class ContractError(ValueError):
    """A part violates the contract of its slot; the message names slot, part and the correct form."""


class SampleError(ValueError):
    """A sample cannot be read; the message is the reason."""


class ImageError(ValueError):
    """A file is not a usable image; the message is the reason."""


class CacheError(ValueError):
    """The cache folder cannot be written to, or is full."""


class StreamError(OSError):
    """A download failed or was cut short; the message is the reason."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class SaveError(OSError):
    """A checkpoint could not be written; the message names it, the reason, and the last good one."""


class RemoteError(OSError):
    """An operation on remote storage failed; the message names the URL and the cause."""


class UnableError(RemoteError, ValueError):
    """A handler lacks an operation that checkpoints need."""


class RunError(RuntimeError):
    """A run failed after its first step began; the original error, if any, is its cause."""


class TooManySkippedError(RunError):
    """More samples of an epoch were skipped than ``data.max_skipped`` allows."""


class StartError(RuntimeError):
    """The processes of a run could not form a group."""


class PeerError(RuntimeError):
    """Another process failed; its own log has the error."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def cause_of(error: BaseException) -> str:
    """Return the cause of an error without the path of its file, or the name of its class if it has no message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return the first line of an error of torch.load, without its advice to load the file unsafely."""
    if found := re.search(r"(?:GLOBAL|[Uu]nsupported (?:class|operand|type)) +(\S+)", str(error)):
        return f"it names {found[1]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith("Weights only load failed")]
    return (reasons or [type(error).__name__])[0].partition(" Please ")[0][:200]
