"""Read ``index.json`` and the arrays beside it (format: ``writing.py``); identify a data set by its index.

Arrays are compared with their checksums, if the index has them (those of earlier releases do not). Class numbers and
offsets in them must be in range.

The identity of a data set is that of the contents of its shards in order, whatever their paths and names. A shard is
compared by its number of samples and the SHA-256 in the index. A shard without one, whose index an earlier release
made, is compared by file name, number of samples and size.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.shards.writing import FORMAT_VERSION, INDEX, KEYS, LABELS, MASKS, OFFSETS
from jepa_kit.files import sha256_of

SHARDS = "shards"
"""Key of an identity: the entries of its shards."""
NAMES_AND_SIZES = "names and sizes"
"""Followed by ": " and a digest, the digest of files in no shard, in the place of a SHA-256."""
CACHED_INDEXES = "indexes"
"""Folder of the cache for indexes of shards that have none beside them."""
MOST = 2**62
"""Largest number of samples or bytes; sums of such numbers fit into int64."""
_INCOMPLETE = (OSError, EOFError, ValueError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError)
HEADER_ERRORS = (*_INCOMPLETE, RecursionError, tokenize.TokenError, UserWarning)  # deep nesting; cut inside a bracket
"""What numpy raises on the header of a damaged .npy file."""
_SHA256 = re.compile("[0-9a-f]{64}")

_INDEX = {"samples": int, "shards": list, "labels": dict}
_SHARD = {"file": str, "samples": int, "bytes": int, "sha256": str | None}
_MASKS = {"classes": list}


def read_index(path: str, text: bytes | None = None) -> dict[str, Any]:
    """Return the content of an index.json, validated.

    Args:
        path: of the file, or its name in messages.
        text: its bytes, if they are read already.

    Raises:
        ValueError: it is incomplete or of another version; the message begins with its path.
    """
    if text is None:
        text = Path(path).read_bytes()
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are two
        raise ValueError(f"{path} is incomplete: {error}; make the shards again") from error
    version = index.get("version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has version (={version!r}), but this release reads version {FORMAT_VERSION}: "
            "make the shards again, or use the release that made them"
        )
    if fault := next(_find_faults(index), None):
        raise ValueError(f"{path} is incomplete: {fault}; make the shards again")
    listed = sum(entry["samples"] for entry in index["shards"])
    if listed != index["samples"]:
        raise ValueError(f"{path} has {index['samples']} samples, but its shards have {listed}: make the shards again")
    return index


def _find_faults(index: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is missing, mistyped or out of range in an index; what follows the first fault may be unusable."""
    yield from _check_values(index, _INDEX, "it")
    for k, entry in enumerate(index["shards"]):
        yield from _check_values(entry, _SHARD, f"shards[{k}]")
    for name, kind in (("labels", list), ("arrays", str), ("links", list), ("made_by", object)):
        yield from _check_values(index.get(name, {}), kind, name)  # earlier releases wrote no arrays and links
    yield from _check_values(index.get("masks", {"classes": []}), _MASKS, "masks")
    for name, names in [*index["labels"].items(), ("masks", index.get("masks", {}).get("classes", []))]:
        if not all(isinstance(text, str) for text in names):
            yield f"{name!r} (={names!r:.80}) must be a list of texts"


def _check_values(found: Any, kinds: Mapping[str, Any] | type, what: str) -> Iterator[str]:
    """Yield the faults of a mapping, given the type of each key's value, or one type for all values."""
    if not isinstance(found, dict):
        yield f"{what} (={found!r:.80}) must be a mapping"
        return
    for key, kind in (dict.fromkeys(found, kinds) if isinstance(kinds, type) else kinds).items():
        shown = f"{key!r} of {what} (={found.get(key)!r:.80})"
        if key not in found:
            yield f"{what} has no {key!r}"
        elif not isinstance(found[key], kind) or (isinstance(found[key], bool) and kind is int):
            yield f"{shown} must be of type {getattr(kind, '__name__', kind)}"
        elif kind is int and not 0 <= found[key] <= MOST:
            yield f"{shown} must be 0 to {MOST}"
        elif key == "sha256" and found[key] is not None and not _SHA256.fullmatch(found[key]):
            yield f"{shown} must be 64 hexadecimal digits"


def is_foreign(index: Mapping[str, Any]) -> bool:
    """Return whether an index was made from shards that another tool wrote, so that it can be made again."""
    return index.get("made_by", {}).get("tool") == "index_shards"


def array_names(index: Mapping[str, Any]) -> list[str]:
    """Return the file names of the arrays of an index."""
    return [OFFSETS, LABELS, KEYS] + ([MASKS] if "masks" in index else [])


def read_arrays(folder: str, index: Mapping[str, Any], *, verified: bool = False) -> dict[str, NDArray[Any]]:
    """Return the arrays of an index by name, memory-mapped; see ``read_array``."""
    return {name: read_array(folder, name, index, verified=verified) for name in array_names(index)}


def read_array(folder: str, name: str, index: Mapping[str, Any], *, verified: bool = False) -> NDArray[Any]:
    """Return an array of an index, memory-mapped.

    Args:
        folder: of the index.
        name: of the file.
        index: the content of ``index.json``.
        verified: whether this process, or the one that pickled the data set, verified the array already.

    Raises:
        ValueError: it is missing or damaged, its SHA-256 differs from the index, or a number is out of range; the
            message begins with its path.
    """
    path = os.path.join(folder, name)
    again = _remedy(folder, index)
    columns = {OFFSETS: (4,), LABELS: (len(index["labels"]),), KEYS: (), MASKS: (2,)}[name]
    shape, kind = (index["samples"], *columns), "S" if name == KEYS else "i"
    try:
        # a plain array over the mapped file: indexing np.memmap itself costs several times as much
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of headers from Python 2, which we never write
            found = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, but {INDEX} is there: {again}") from error
    except HEADER_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path} is not a complete array: {reason}; {again}") from error
    if found.shape != shape or found.dtype.kind != kind:
        raise ValueError(
            f"{path} has {found.dtype} of shape {found.shape}, but {INDEX} has {index['samples']} samples: it must "
            f"be {'bytes' if kind == 'S' else 'int64'} of shape {shape}; {again}"
        )
    if verified:
        return found
    listed = index.get("arrays", {}).get(name)
    if listed is not None and sha256_of(path) != listed:
        raise ValueError(f"{path} was changed or damaged: its SHA-256 is not that of {INDEX}; {again}")
    if fault := _out_of_range(name, found, index):
        raise ValueError(f"{path} is damaged: {fault}; {again}")
    return found


def _remedy(folder: str, index: Mapping[str, Any]) -> str:
    """Return what the user can do about a damaged array."""
    cached = os.path.basename(os.path.dirname(folder)) == CACHED_INDEXES
    if cached or is_foreign(index):
        return f"remove {folder if cached else os.path.join(folder, INDEX)}, and it is made again"
    return "make the shards again"


def _out_of_range(name: str, found: NDArray[Any], index: Mapping[str, Any]) -> str | None:
    """Return a message about the first class number, offset or key that is out of range."""
    if name == KEYS:
        try:
            found.tobytes().decode("utf-8")  # all at once is fast, and a key that is cut fails at the next one
        except UnicodeDecodeError as error:
            return f"key {error.start // found.itemsize} is no text in UTF-8"
    elif name == LABELS:
        for column, (label, classes) in enumerate(index["labels"].items()):
            for k in np.flatnonzero((found[:, column] < -1) | (found[:, column] >= len(classes)))[:1]:
                return f"sample {k} has class {found[k, column]} of label {label!r}, which has {len(classes)} classes"
    else:
        ends = np.repeat([entry["bytes"] for entry in index["shards"]], [entry["samples"] for entry in index["shards"]])
        for column, what in enumerate(("image", "label") if name == OFFSETS else ("mask",)):
            start, size = found[:, 2 * column], found[:, 2 * column + 1]
            inside = (start >= BLOCKSIZE) & (start % BLOCKSIZE == 0) & (size >= 0) & (size <= ends - start)
            if what != "image":
                inside |= (start == -1) & (size == 0)  # a sample without one
            for k in np.flatnonzero(~inside)[:1]:
                return f"the {what} of sample {k} has {size[k]} bytes at {start[k]}, in a shard of {ends[k]} bytes"
    return None


def identity(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the identity of a data set: ``samples``, a ``digest`` of all contents, and each of its ``shards``.

    Args:
        shards: their entries in the index.
    """
    entries = [[shard["file"], shard["samples"], shard["bytes"], shard["sha256"]] for shard in shards]
    contents = [[samples, sha256 or [file, size]] for file, samples, size, sha256 in entries]
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "digest": _digest(contents), SHARDS: entries}


def brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without its list of shards."""
    return {key: value for key, value in found.items() if key != SHARDS}


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Compare the data set of a checkpoint with the current one.

    Args:
        then: the identity in the checkpoint; those of earlier releases have no list of shards.
        now: the identity of the current data set.

    Returns:
        The first difference, or None; and a note on what could not be compared, or None.
    """
    if SHARDS not in then:
        names = [[file, samples, size] for file, samples, size, _ in now[SHARDS]]
        if then.get("samples") != now["samples"]:
            return f"it had {then.get('samples')} samples, but here are {now['samples']}", None
        if then.get("digest") != _digest(names)[:16]:
            return "names, sample counts or sizes of its shards differ", None
        return None, (
            "the checkpoint is of an earlier version and has no checksums of its shards: their names, sample counts "
            "and sizes are equal, contents were not compared"
        )
    old, new, unsummed, listed = then[SHARDS], now[SHARDS], 0, list[str]()
    for number, (before, after) in enumerate(zip(old, new, strict=False)):
        kind = "shard"
        (of, _, was_digest), (of_now, _, now_digest) = ((e[3] or "").rpartition(": ") for e in (before, after))
        if of and of == of_now:  # samples in no shard
            listed.append(of)
            kind, what = ("folder", "files") if of == NAMES_AND_SIZES else ("data set", "samples")
            parts = {what: (before[1], after[1]), f"digest of {of}": (was_digest, now_digest)}
        elif before[3] and after[3]:
            parts = {"samples": (before[1], after[1]), "SHA-256": (before[3], after[3])}
        else:
            unsummed += 1
            parts = {what: (before[k], after[k]) for k, what in enumerate(("name", "samples", "bytes"))}
        for what, (was, is_now) in parts.items():
            if was != is_now:
                return f"{kind} {number} differs: {before[0]} had {what} {was}, but here {after[0]} has {is_now}", None
    if len(old) != len(new):
        first = (old[len(new) :] or new[len(old) :])[0][0]
        return f"it had {len(old)} shards, but here are {len(new)}: the first that one side lacks is {first}", None
    if listed:
        kind = "files" if {*listed} == {NAMES_AND_SIZES} else "samples"
        by = " or ".join(dict.fromkeys(listed))
        return None, f"{len(listed)} of {len(new)} data sets are {kind} in no shard: compared by their {by}"
    note = f"{unsummed} of {len(new)} shards have no checksum in their index: compared by name, sample count and size"
    return None, note if unsummed else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
