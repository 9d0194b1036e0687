"""Reading ``index.json`` and the arrays beside it: whole, and as ``shard_writing.py`` describes them, or an error."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.shard_writing import FORMAT_VERSION, INDEX, KEYS, LABELS, MASKS, OFFSETS

_INDEX = {"samples": int, "shards": list, "labels": dict}
_SHARD = {"file": str, "samples": int, "bytes": int, "sha256": str | None}
_MASKS = {"classes": list}


def read_index(path: str, text: bytes | None = None) -> dict[str, Any]:
    """The content of an index.json, checked.

    Args:
        path: of the file, or what a message calls it.
        text: its bytes, where they are here already.

    Raises:
        ValueError: it is cut, lacks what a data set needs, or is of another version; the text begins with its path.
    """
    if text is None:
        with open(path, "rb") as stream:
            text = stream.read()
    try:
        index = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are two
        raise ValueError(f"{path} is not whole: {error}; make the shards again") from error
    version = index.get("version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has version (={version!r}), but this release reads version {FORMAT_VERSION}: "
            "make the shards again, or use the release that made them"
        )
    if fault := _fault(index):
        raise ValueError(f"{path} is not whole: {fault}; make the shards again")
    listed = sum(entry["samples"] for entry in index["shards"])
    if listed != index["samples"]:
        raise ValueError(f"{path} has {index['samples']} samples, but its shards have {listed}: make the shards again")
    return index


def _fault(index: Mapping[str, Any]) -> str | None:
    """What an index of this version lacks."""
    if fault := _mistyped(index, _INDEX, "it"):
        return fault
    for k, entry in enumerate(index["shards"]):
        if fault := _mistyped(entry, _SHARD, f"shards[{k}]"):
            return fault
    if fault := _mistyped(index["labels"], dict.fromkeys(index["labels"], list), "labels"):
        return fault
    return _mistyped(index["masks"], _MASKS, "masks") if "masks" in index else None


def _mistyped(found: Any, kinds: Mapping[str, Any], what: str) -> str | None:
    if not isinstance(found, dict):
        return f"{what} (={found!r:.80}) must be a mapping"
    for key, kind in kinds.items():
        if key not in found:
            return f"{what} has no {key!r}"
        if not isinstance(found[key], kind):
            return f"{key!r} of {what} (={found[key]!r:.80}) must be of type {getattr(kind, '__name__', kind)}"
    return None


def read_array(folder: str, name: str, index: Mapping[str, Any]) -> NDArray[Any]:
    """An array of an index, memory-mapped.

    Raises:
        ValueError: it is missing or damaged, or not as the index says; the text begins with its path.
    """
    path = os.path.join(folder, name)
    columns = {OFFSETS: (4,), LABELS: (len(index["labels"]),), KEYS: (), MASKS: (2,)}[name]
    shape, kind = (index["samples"], *columns), "S" if name == KEYS else "i"
    try:
        # a plain array over the mapped file: indexing np.memmap itself costs several times as much
        found = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, but {INDEX} is there: make the shards again") from error
    except (OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is not a whole array: {reason}; make the shards again") from error
    if found.shape != shape or found.dtype.kind != kind:
        raise ValueError(
            f"{path} holds {found.dtype} of shape {found.shape}, but {INDEX} has {index['samples']} samples: it must "
            f"be {'bytes' if kind == 'S' else 'int64'} of shape {shape}; make the shards again"
        )
    return found
