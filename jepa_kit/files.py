"""Write files that are complete once they have their name; read JSON Lines; compute SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

PART = ".part"
"""Suffix of the temporary name of a file that is being written."""


def part_path(path: Path) -> Path:
    """Return the temporary name of a file or folder that is being written."""
    return path.with_name(f".{path.name}{PART}")


def delete(path: Path) -> None:
    """Delete a file or a folder, if it exists. A folder is renamed first, so that no reader finds a part of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path if path.name.endswith(PART) else path.rename(part_path(path)))
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk. Folders are skipped if they cannot be opened (Windows)."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name != "posix" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path | str, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` if the block succeeds, and is deleted if it fails.

    Everything is on the disk when the block ends: a crash or a power cut leaves the earlier file or the new one.

    Args:
        path: a file, or a folder that does not exist yet.
        shared: several processes may write `path` at once; each gets a temporary path of its own.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}") if shared else part_path(path)
    try:
        yield part
        for file in [*(f for f in part.rglob("*") if f.is_file()), part]:
            flush(file)
        part.replace(path)
        flush(path.parent)
    finally:
        delete(part)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file by `atomic_write`."""
    with atomic_write(path, shared=shared) as part:
        part.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON Lines file by `atomic_write`."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file, or an empty list if there is none.

    A last line without a line break is left out: a killed process leaves one.

    Raises:
        ValueError: a line is not JSON.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    values = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:  # noqa: PERF203 (the message names the line)
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return values


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file in hex; of a folder, that of the names and digests of its files."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _ErrorKeeper:
    """A file for `torch.save`, which replaces the error of a failed write by one without its cause; `error` is it."""

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
    """Write a mapping by `torch.save`, to the disk.

    Raises:
        OSError: the file cannot be written: no space, no permission, ...
    """
    import torch  # data modules use this file, and do not need torch

    with path.open("wb") as file:
        keeper = _ErrorKeeper(file)
        try:
            torch.save(content, cast(IO[bytes], keeper))
            file.flush()
        except (RuntimeError, OSError) as error:
            raise (keeper.error or error) from error
        os.fsync(file.fileno())
