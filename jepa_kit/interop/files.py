"""Fetch files of weights, detect their format by content, and open them without running code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import torch

from jepa_kit.data.remote.fetch import path_manager
from jepa_kit.engine.checkpoint.files import FORMAT, check_records, reading
from jepa_kit.engine.checkpoint.format import checkpoints
from jepa_kit.engine.checkpoint.locate import to_read
from jepa_kit.errors import CheckpointError, reason_of
from jepa_kit.files import sha256_of
from jepa_kit.interop.digest import UNCHECKED_HINT
from jepa_kit.interop.tensor_files import read_header
from jepa_kit.run_folder import HEADER

Format = Literal["official", "jepa_kit", "hf", "timm", "safetensors", "onnx"]

FORMATS = "official, jepa_kit, hf (a folder), timm, safetensors, onnx"

FORMAT_NAME = "jepa_kit.encoder/1"
"""Metadata ``format_name`` of our safetensors files."""

OTHERS = {
    b"<": "is a web page, not weights: the URL is that of a page (a login, an error, a file browser)",
    b"version https://git-lfs": "is a git-lfs pointer, not the weights: run `git lfs pull`",
    b"\x80": "is a bare pickle, which can run code when it is read, and is rejected. Checkpoints of torch before "
    "1.6 are pickles: if you trust this one, load it with torch and save it again",
}
"""First bytes of files that are no weights -> what they are."""

DOWNLOADED = ("http://", "https://", "ftp://")
"""URLs whose files iopath caches."""


def fetch(path_or_url: str | os.PathLike[str], sha256: str | None = None) -> Path:
    """Return the local path of a file or folder; download it if it is remote.

    Args:
        path_or_url: a path; an http URL of one file, which iopath caches; ``reference:NAME``, or another URL, see
            ``jepa_kit.engine.checkpoint.locate.to_read``.
        sha256: expected SHA-256 of the file in hex; None for no check.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the checksum differs (a download is deleted then), or the download failed.
    """
    text = os.fspath(path_or_url)
    try:
        path = Path(text).expanduser()
        if text.startswith(DOWNLOADED):
            path = Path(path_manager.get_local_path(text))
        elif not checkpoints(path):  # the checkpoints of a run folder may be elsewhere
            path = to_read(text)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{text} could not be downloaded: {error}") from error
    if not path.exists():
        raise FileNotFoundError(f"there is no file {text}")
    if sha256 is None:
        return path
    if path.is_dir():
        raise CheckpointError(f"{text} is a folder, but sha256 is the checksum of one file")
    found = sha256_of(path)
    if found != sha256.lower():
        if "://" in text:
            path.unlink()  # else the cache returns the same file again
        raise CheckpointError(f"{text} has SHA-256 {found}, not {sha256.lower()}: it is damaged, or another file")
    return path


def recognise(path: Path, *, allow_unchecked: bool = False) -> Format:
    """Return the format of a file or folder, by its contents.

    Args:
        path: file or folder.
        allow_unchecked: see ``open_archive``.

    Raises:
        CheckpointError: the format is unknown; the message says what the file looks like.
    """
    if path.is_dir():
        return _recognise_folder(path)
    with path.open("rb") as file:
        start = file.read(512)
    what = f"{path} ({path.stat().st_size} bytes)"
    if start.startswith(b"PK\x03\x04"):  # a zip file, as torch.save writes
        content = open_archive(path, allow_unchecked=allow_unchecked)
        if content.get("format") == FORMAT:
            return "jepa_kit"
        encoders = [isinstance(content.get(part), dict) for part in ("encoder", "target_encoder")]
        return "official" if any(encoders) else "timm"
    # safetensors: the length of the header, at most 100 MB, and the header, which is JSON
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        name = read_header(path)["__metadata__"].get("format_name")
        return "jepa_kit" if name == FORMAT else "safetensors" if name == FORMAT_NAME else "timm"
    if start[:1] == b"\x08":  # field ir_version of a protobuf
        return "onnx"
    if not start:
        raise CheckpointError(f"{what} is empty")
    other = next((text for begin, text in OTHERS.items() if start.lstrip().startswith(begin)), None)
    raise CheckpointError(f"{what} {other or f'has none of the formats {FORMATS}: it begins with {start[:8]!r}'}")


def _recognise_folder(path: Path) -> Format:
    if checkpoints(path) or (path / HEADER).exists():  # a run folder, or a sharded checkpoint
        return "jepa_kit"
    config = path / "config.json"
    if config.is_file():
        content = read_json(config)
        return "timm" if "architecture" in content and "model_type" not in content else "hf"
    raise CheckpointError(
        f"the folder {path} is neither a run folder (checkpoint_<step>.pt) nor one of transformers (config.json)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        CheckpointError: it is not JSON, or not a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must contain a mapping, not a {type(content).__name__}")
    return content


def open_archive(path: Path, *, allow_unchecked: bool = False) -> dict[str, Any]:
    """Load what ``torch.save`` wrote: tensors are memory-mapped, all bytes are verified, no code is run.

    Args:
        path: the file.
        allow_unchecked: whether to read a file whose records have no CRC-32, or a wrong one.

    Raises:
        CheckpointError: the file is truncated, damaged, written without CRCs, has objects that could run code, or is
            not a mapping.
    """
    what = f"{path} ({path.stat().st_size} bytes)"
    with reading(path):
        check_records(path, checksums=not allow_unchecked, hint=f"; {UNCHECKED_HINT}")
        try:
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{what} contains more than tensors and plain values, which could run code, and is rejected: "
                f"{reason_of(error)}"
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must contain a mapping of names to tensors, not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}
