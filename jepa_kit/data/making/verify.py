"""Compare shards with their index."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.making.write_log import folders_with_shards
from jepa_kit.data.shards.index import is_foreign, read_arrays, read_index
from jepa_kit.data.shards.indexing import scan
from jepa_kit.data.shards.writing import INDEX, KEYS, LABELS, MASKS, OFFSETS, UNFINISHED
from jepa_kit.files import sha256_of


def verify(out: str, *, workers: int, show: Callable[[int, int], None]) -> tuple[int, list[str]]:
    """Compare the shards of a folder and its subfolders with their indexes: bytes, checksums, offsets of all members.

    Args:
        out: the folder.
        workers: threads.
        show: called with the bytes that were read, and their total.

    Returns:
        The number of shards that were compared, and a line for each difference, with the path of its file.

    Raises:
        ValueError: there is no such folder, or no index in it.
    """
    if not os.path.isdir(out):
        raise ValueError(f"--verify (={out!r}) must be a folder of shards, but there is no such folder")
    folders = [f for f in folders_with_shards(out) if _has(f, INDEX) or _has(f, UNFINISHED)]
    if not folders:
        raise ValueError(f"--verify (={out!r}) has no {INDEX}, nor does a folder in it: there is nothing to compare")
    problems: list[str] = []
    tasks = []
    for folder in folders:
        try:
            found = _read_tasks(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        tasks += found
        extra = set(glob.glob(os.path.join(glob.escape(folder), "*.tar"))) - {path for path, *_ in found}
        problems += [f"{path}: {INDEX} does not list it" for path in sorted(extra)]
    total, done = sum(entry["bytes"] for _, entry, *_ in tasks), 0
    with ThreadPoolExecutor(workers) as pool:
        for (path, entry, *_), differences in zip(tasks, pool.map(lambda task: _compare(*task), tasks), strict=True):
            problems += [f"{path}: {text}" for text in differences]
            done += entry["bytes"]
            show(done, total)
    return len(tasks), problems


def _has(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def _read_tasks(folder: str) -> list[tuple[str, dict[str, Any], dict[str, NDArray[Any]], dict[str, Any]]]:
    """Return the arguments of ``_compare`` for each shard of an index.

    Raises:
        ValueError: the index or an array cannot be used; the message begins with its path.
    """
    if _has(folder, UNFINISHED):
        raise ValueError(f"{os.path.join(folder, UNFINISHED)}: a run was interrupted: run its command again")
    index = read_index(os.path.join(folder, INDEX))
    arrays = read_arrays(folder, index)
    tasks, start = [], 0
    for entry in index["shards"]:
        rows = {name: array[start : start + entry["samples"]] for name, array in arrays.items()}
        tasks.append((os.path.join(folder, entry["file"]), entry, rows, index))
        start += entry["samples"]
    return tasks


def _compare(path: str, entry: dict[str, Any], arrays: dict[str, NDArray[Any]], index: dict[str, Any]) -> list[str]:
    """Return the differences of a shard from its index.

    Args:
        path: of the shard.
        entry: of the shard in the index.
        arrays: file name of an array -> the rows of the shard.
        index: the content of ``index.json``.
    """
    if not os.path.isfile(path):
        return ["it is missing"]
    size = os.path.getsize(path)
    if size != entry["bytes"]:
        return [f"it has {size} bytes, but {INDEX} says {entry['bytes']}"]
    if entry["sha256"] is not None and sha256_of(path) != entry["sha256"]:
        return [f"its bytes have changed: their SHA-256 is not that of {INDEX}"]
    seen = scan(path, entry["file"])
    rows, none = seen.rows, np.full(entry["samples"], -1)
    found = [f"{name}: {reason}" for name, reason in seen.refused if not is_foreign(index)]
    if len(rows.keys) != entry["samples"]:
        return [*found, f"it has {len(rows.keys)} samples, but {INDEX} says {entry['samples']}"]
    if [key.encode("utf-8") for key in rows.keys] != arrays[KEYS].tolist():
        found.append(f"its keys are not those of {KEYS}")
    if not np.array_equal(rows.offsets, arrays[OFFSETS]):
        found.append(f"its members are not at the offsets of {OFFSETS}")
    if MASKS in arrays and not np.array_equal(rows.masks, arrays[MASKS]):
        found.append(f"its masks are not at the offsets of {MASKS}")
    for name, numbers in zip(index["labels"], arrays[LABELS].T, strict=True):
        if not np.array_equal(rows.labels.get(name, none), numbers):
            found.append(f"its labels {name!r} are not those of {LABELS}")
    return found
