"""safetensors: one encoder under our names, with its description in the metadata, and our own writer.

The file also contains a fixed position table as ``pos_embed`` [N, D], for readers that do not compute it.
"""

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
from jepa_kit.interop.digest import ABOUT, DIGEST, check_digest, digest, raw
from jepa_kit.interop.files import FORMAT_NAME, read_header
from jepa_kit.interop.weight_checks import checked_weights
from jepa_kit.interop.weights import AS_IT_IS, EncoderWeights, Reading, read_about

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def write(weights: EncoderWeights, path: Path) -> None:
    """Write the encoder with its metadata."""
    table = {"pos_embed": weights.table} if weights.architecture.positions == "sincos" else {}
    write_file(path, weights.state | table, {"format_name": FORMAT_NAME, ABOUT: weights.about()})


def read(path: Path, reading: Reading = AS_IT_IS) -> EncoderWeights:
    """Read what ``write`` wrote.

    Raises:
        CheckpointError: the file is damaged or lacks our metadata, or weights do not fit them.
    """
    state, metadata = read_file(path, allow_unchecked=reading.allow_unchecked)
    about = read_about(metadata.get(ABOUT))
    if about is None:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of jepa_kit: it has no note {ABOUT!r}. "
            "With the names of timm it is read as timm"
        )
    return checked_weights(state, *about, str(path), reading.positions)


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
