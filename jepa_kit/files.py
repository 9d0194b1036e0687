"""Files that are on the disk, and not only said to be, when a call returns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any, cast

import torch


def write_text(path: Path, text: str) -> None:
    """Writes a small file beside its place, and gives it its name when all of it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class _Telling:
    """A file for torch.save, which hides why a write failed; ``error`` tells."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_archive(content: dict[str, Any], path: Path) -> None:
    """``torch.save``, with everything on the disk when this returns.

    Raises:
        OSError: it could not be written: no space, no permission, ...
    """
    with path.open("wb") as file:
        telling = _Telling(file)
        try:
            torch.save(content, cast(IO[bytes], telling))
            file.flush()
        except (RuntimeError, OSError) as error:
            raise (telling.error or error) from error
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Has the names in a folder on the disk; does nothing where folders cannot be opened (Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
