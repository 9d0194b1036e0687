"""Files of safetensors: their header, and reading and writing them with a digest of all that they contain."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jepa_kit.errors import CheckpointError
from jepa_kit.interop.digest import DIGEST, check_digest, digest, raw

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: names, shapes, and ``__metadata__``.

    Raises:
        CheckpointError: it is not a safetensors file, or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(f"{path} is cut short: it has {size} bytes, but its header has {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        metadata = header.setdefault("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map names to text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} begins like a safetensors file, but its header is damaged: {error}") from error
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise CheckpointError(f"{path} is cut short: it has {size} bytes of {needed}")
    return header


def read_file(path: Path, *, allow_unchecked: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, memory-mapped, and its metadata; verify its digest if it has one.

    Raises:
        CheckpointError: it is truncated or damaged.
    """
    read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged, or not a safetensors file: {error}") from error
    check_digest(metadata, lambda: digest(tensors, metadata), str(path), allow_unchecked=allow_unchecked)
    return tensors, metadata


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file one tensor at a time, with a digest of all in its metadata.

    The library's own writer copies all tensors before it writes the first, which doubles the memory of mapped files.
    """
    header: dict[str, Any] = {"__metadata__": {**metadata, DIGEST: digest(tensors, metadata)}}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(raw(value))
        file.flush()
        os.fsync(file.fileno())
