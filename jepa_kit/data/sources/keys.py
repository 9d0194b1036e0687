"""Keys of samples, as WebDataset has them, from the names of files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence


def unique_keys(names: Sequence[str]) -> list[str]:
    """Return unique WebDataset keys of files: paths without extension.

    Dots in the last part of a path become underscores, because WebDataset ends a key at the first of them.
    """
    stems = []
    for name in names:
        folder, slash, base = name.encode("utf-8", "replace").decode().rpartition("/")
        stems.append(f"{folder}{slash}{os.path.splitext(base)[0].replace('.', '_')}")
    return safe_keys(stems)


def safe_keys(keys: Iterable[str]) -> list[str]:
    """Make keys unique by a number after repeated ones; remove what makes them absolute, or begin with ``__``."""
    unique: list[str] = []
    taken: set[str] = set()
    following: dict[str, int] = {}  # key -> the next number to try
    for text in keys:
        # an absolute path, or one with .., is not safe to unpack; WebDataset reserves __x__ for metadata
        key = re.sub(r"^__", "_", re.sub(r"^(?:\.{0,2}/+)+", "", text))
        candidate, k = key, following.get(key, 1)
        while candidate in taken:
            candidate, k = f"{key}_{k}", k + 1
        following[key] = k
        taken.add(candidate)
        unique.append(candidate)
    return unique
