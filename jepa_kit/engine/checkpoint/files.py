"""Read and verify the files of a checkpoint; one error for whatever is wrong with them."""

from __future__ import annotations

import errno
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jepa_kit.errors import MALFORMED, CheckpointError, first_line
from jepa_kit.run_folder import HEADER

FORMAT = "jepa_kit/1"

_ZIP = b"PK\x03\x04"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or unreadable file raises into one error that names it.

    Raises:
        CheckpointError: for any of ``errors.MALFORMED``.
        FileNotFoundError: as it is.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError):
        raise
    except MALFORMED as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek out of the file
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
        raise CheckpointError(f"{path}{size} is damaged, or not a checkpoint: {first_line(error)}") from error


def verify(path: Path, *, rank: int = 0, size: int = 1) -> None:
    """Read every byte of a checkpoint and compare checksums.

    Args:
        path: a file or a folder of shards.
        rank, size: read only every ``size``-th shard, starting with number ``rank``.

    Raises:
        CheckpointError: a file differs from what was written, or cannot be read; the message names it.
    """
    with reading(path):
        if path.is_dir():
            for name, (length, crc) in list(read_header(path)["files"].items())[rank::size]:
                _verify_shard(path, name, length, crc)
            return
        with path.open("rb") as opened:
            start = opened.read(len(_ZIP))
        if start != _ZIP:  # torch.save writes a zip archive
            what = f"{path} ({path.stat().st_size} bytes)"
            raise CheckpointError(f"{what} is not a checkpoint: it does not start like one")
        check_records(path)


def _verify_shard(folder: Path, name: str, length: int, crc: int) -> None:
    file = folder / name
    if not file.exists():
        raise CheckpointError(f"{folder} is damaged: {name} is missing")
    with reading(file):
        if file.stat().st_size != length:
            raise CheckpointError(f"{file} ({file.stat().st_size} bytes) is cut short: it had {length} bytes")
        if checksum(file) != crc:
            raise CheckpointError(f"{file} ({length} bytes) is damaged: its checksum differs")


def check_records(path: Path, *, checksums: bool = True, hint: str = "") -> None:
    """Check that a zip archive has its end, and compare the CRC-32 of every record.

    Args:
        path: of the archive.
        checksums: compare them; otherwise only the end is checked.
        hint: ends the message about an archive without checksums.

    Raises:
        CheckpointError: the archive is cut short, damaged, or without checksums. Errors of zipfile are left to
            ``reading``.
    """
    what = f"{path} ({path.stat().st_size} bytes)"
    if not zipfile.is_zipfile(path):  # the archive's directory is at its end
        raise CheckpointError(f"{what} is cut short: its end is missing")
    if not checksums:
        return
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size]
        if records and not any(record.CRC for record in records):
            raise CheckpointError(
                f"{what} was written without checksums (torch.serialization.set_crc32_options(False)), so damage "
                f"cannot be detected{hint}"
            )
        broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(f"{what} is damaged: the checksum of its record {broken} differs")


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a sharded checkpoint: all but the state.

    Raises:
        CheckpointError: the header is missing or damaged.
    """
    header = path / HEADER
    if not header.exists():
        raise CheckpointError(f"{path} is not a checkpoint: it has no {HEADER}")
    verify(header)
    with reading(header):
        content = read_archive(header, "cpu")
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CheckpointError(f"{header} is not of a sharded checkpoint: it names no files with sizes and checksums")
    return content


def _is_entry(name: object, entry: object) -> bool:
    """Return whether an item of ``files`` is the name of a file of the folder with its size and CRC-32."""
    if not isinstance(name, str) or Path(name).name != name or not isinstance(entry, list | tuple):
        return False
    return len(entry) == 2 and all(type(number) is int for number in entry)


def read_archive(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """Return the mapping in a checkpoint file or header.

    Raises:
        CheckpointError: the file contains something else. Errors of torch are left to ``reading``.
    """
    try:
        content = torch.load(str(path), map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of jepa_kit: it contains more than tensors and plain values, "
            "which could run code and are not read"
        ) from error
    found_format = content.get("format") if isinstance(content, dict) else None
    if found_format != FORMAT:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint of jepa_kit: its format is {found_format!r}, not {FORMAT!r} "
            f"(it contains: {keys}); jepa-convert reads those of other code"
        )
    return content
