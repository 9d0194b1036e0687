"""Compare shards with their index."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.making.write_log import folders_with_shards
from jepa_kit.data.shards.index import array_names, is_foreign, read_array, read_index
from jepa_kit.data.shards.indexing import scan
from jepa_kit.data.shards.writing import INDEX, KEYS, LABELS, MASKS, OFFSETS, UNFINISHED
from jepa_kit.files import sha256_of


@dataclass(frozen=True)
class Report:
    """The result of a verification.

    Args:
        shards: number of shards that were compared.
        problems: one line for each difference from the index, with the path of its file.
    """

    shards: int
    problems: list[str]


def verify(out: str, *, workers: int, show: Callable[[int, int], None]) -> Report:
    """Compare the shards of a folder and its subfolders with their indexes: bytes, checksums, offsets of all members.

    Args:
        out: the folder.
        workers: threads.
        show: called with the bytes that were read, and their total.

    Raises:
        ValueError: there is no such folder, or no index in it.
    """
    if not os.path.isdir(out):
        raise ValueError(f"--verify (={out!r}) must be a folder of shards, but there is no such folder")
    folders = [f for f in folders_with_shards(out) if _has(f, INDEX) or _has(f, UNFINISHED)]
    if not folders:
        raise ValueError(f"--verify (={out!r}) has no {INDEX}, nor does a folder in it: there is nothing to compare")
    problems: list[str] = []
    tasks: list[tuple[str, dict[str, Any], dict[str, NDArray[Any]], bool]] = []
    for folder in folders:
        try:
            entries, foreign = _entries(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        tasks += [(folder, entry, part, foreign) for entry, part in entries]
        listed = {entry["file"] for entry, _ in entries}
        extra = {os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(folder), "*.tar"))} - listed
        problems += [f"{os.path.join(folder, name)}: {INDEX} does not list it" for name in sorted(extra)]
    total, done = sum(entry["bytes"] for _, entry, *_ in tasks), 0
    with ThreadPoolExecutor(workers) as pool:
        for (folder, entry, *_), found in zip(tasks, pool.map(lambda task: _check(*task), tasks), strict=True):
            problems += [f"{os.path.join(folder, entry['file'])}: {text}" for text in found]
            done += entry["bytes"]
            show(done, total)
    return Report(len(tasks), problems)


def _has(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def _entries(folder: str) -> tuple[list[tuple[dict[str, Any], dict[str, NDArray[Any]]]], bool]:
    """Return each shard of the index with its rows of the arrays, and whether the shards are foreign.

    Raises:
        ValueError: the index or an array cannot be used; the message begins with its path.
    """
    if _has(folder, UNFINISHED):
        raise ValueError(f"{os.path.join(folder, UNFINISHED)}: a run was interrupted: run its command again")
    index = read_index(os.path.join(folder, INDEX))
    arrays = {name: read_array(folder, name, index) for name in array_names(index)}
    entries, start = [], 0
    for entry in index["shards"]:
        part = {name: array[start : start + entry["samples"]] for name, array in arrays.items()}
        part |= {f"label {name}": part[LABELS][:, k] for k, name in enumerate(index["labels"])}
        entries.append((entry, part))
        start += entry["samples"]
    return entries, is_foreign(index)


def _check(folder: str, entry: dict[str, Any], part: dict[str, NDArray[Any]], foreign: bool) -> list[str]:
    """Return the differences of a shard from its index."""
    path = os.path.join(folder, entry["file"])
    if not os.path.isfile(path):
        return ["it is missing"]
    size = os.path.getsize(path)
    if size != entry["bytes"]:
        return [f"it has {size} bytes, but {INDEX} says {entry['bytes']}"]
    if entry["sha256"] is not None and sha256_of(path) != entry["sha256"]:
        return [f"its bytes have changed: their SHA-256 is not that of {INDEX}"]
    seen = scan(path, entry["file"])
    rows = seen.rows
    found = [f"{name}: {reason}" for name, reason in seen.refused if not foreign]
    if len(rows.keys) != entry["samples"]:
        return [*found, f"it has {len(rows.keys)} samples, but {INDEX} says {entry['samples']}"]
    if [key.encode("utf-8") for key in rows.keys] != part[KEYS].tolist():
        found.append(f"its keys are not those of {KEYS}")
    if not np.array_equal(rows.offsets, part[OFFSETS]):
        found.append(f"its members are not where {OFFSETS} says")
    if MASKS in part and not np.array_equal(rows.masks, part[MASKS]):
        found.append(f"its masks are not where {MASKS} says")
    labels = {key.removeprefix("label "): numbers for key, numbers in part.items() if key.startswith("label ")}
    none = np.full(len(rows.keys), -1)
    wrong = [name for name, numbers in labels.items() if not np.array_equal(rows.labels.get(name, none), numbers)]
    return found + [f"its labels {name!r} are not those of {LABELS}" for name in wrong]
