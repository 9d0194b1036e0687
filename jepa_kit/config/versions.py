"""What a resolved config says about the code that wrote it."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import jepa_kit

_DISTRIBUTIONS = ("numpy", "xformers")


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"jepa_kit": jepa_kit.__version__, "git_commit": _git_commit(), "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    found |= {name: _installed(name) for name in _DISTRIBUTIONS}
    return tuple((k, v) for k, v in found.items() if v is not None)


def versions() -> dict[str, str]:
    """Versions of jepa_kit, Python and what decides numbers; of those that are there.

    ``git_commit`` is the checkout's, with ``-dirty`` where tracked files differ from it.
    """
    return dict(_versions())


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    folder = Path(__file__).parent
    # An environment inside somebody's repository: the commit there is not this package's.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
