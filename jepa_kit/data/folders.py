"""Files in folders: find, measure and read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def walk_files(path: str) -> Iterator[str]:
    """Yield the paths of all files in a folder and below it, links followed, with forward slashes."""
    for folder, files in _walk(path):
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        yield from (file if inside == "." else f"{inside}/{file}" for file in sorted(files))


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, its files) of a folder and those below.

    Links are followed, except one to a folder above it, which would never end.
    """
    above = {root: [os.path.realpath(root)]}  # folder -> real paths of it and of the folders above it
    for folder, inner, files in os.walk(root, followlinks=True):
        way = above.pop(folder)
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in inner}
        # os.walk descends into what is left in `inner`
        inner[:] = [n for n in inner if not any(os.path.commonpath([p, places[n]]) == places[n] for p in way)]
        above.update((os.path.join(folder, name), [*way, places[name]]) for name in inner)
        yield folder, files


def hidden(name: str) -> bool:
    """Return whether a path has a hidden part, or the folder that macOS adds to archives."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/"))


def file_size(path: str) -> int:
    """Return the size in bytes, or -1 for a broken link or a missing file, which is refused when it is read."""
    return os.path.getsize(path) if os.path.exists(path) else -1


def read_file(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it is missing, is no file, or cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is a folder, a pipe or a device, not a file")  # reading a pipe could block forever
    return Path(path).read_bytes()
