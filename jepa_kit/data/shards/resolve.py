"""From what a user names to shards with an index: folders, patterns and lists, here or on other machines.

Where an index comes from, in this order:

1. a folder's own ``index.json``, also for shards of that folder that are named one by one;
2. for a local folder without one: made once and kept there, or, where nothing can be written there, as in 3; made
   again where shards came or changed since;
3. for shards that are named one by one: made once and kept under ``CACHE/indexes``, where CACHE is ``data.cache``, or
   ``~/.cache/jepa_kit`` without one. Shards of other machines are read whole for it, once.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.remote.cache import RemoteShard, ShardCache, lock
from jepa_kit.data.remote.fetch import Access, expand, is_remote, is_shard, read
from jepa_kit.data.shards.index import KEPT_INDEXES, is_foreign, read_array, read_index
from jepa_kit.data.shards.indexing import INDEXER, Progress, Scan, index_files, scan, shards_in, write_foreign_index
from jepa_kit.data.shards.writing import INDEX, KEYS, LABELS, MASKS, OFFSETS, Rows, Shard
from jepa_kit.errors import StreamError
from jepa_kit.files import atomic_write
from jepa_kit.rng import IntArray

FETCHERS = 4
"""Shards that are fetched at the same time while an index is made."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Part:
    """Shards that share an index.

    Args:
        path: as the user named them, for messages.
        folder: of the index, on this machine.
        shards: their entries in the index.
        places: path or address of each.
        rows: [N] their rows in the arrays of the index; None for all rows.
        index: the content of ``index.json``.
    """

    path: str
    folder: str
    shards: list[dict[str, Any]]
    places: list[str]
    rows: IntArray | None
    index: dict[str, Any]

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Label name -> the names of its classes."""
        return {k: tuple(v) for k, v in self.index["labels"].items()}

    @property
    def has_masks(self) -> bool:
        """Whether there are masks of pixels."""
        return "masks" in self.index

    def array(self, name: str, *, verified: bool = False) -> NDArray[Any]:
        """Return an array of the index, memory-mapped if all of its rows are wanted; see ``read_array``."""
        found = read_array(self.folder, name, self.index, verified=verified)
        return found if self.rows is None else found[self.rows]


def open_parts(path: str | Sequence[str], access: Access, cache: Callable[[], ShardCache]) -> list[Part]:
    """The parts of a data set, in the order in which they are named.

    Args:
        path: a folder, a shard, a pattern of them, or a list.
        access: to other machines.
        cache: gives the folder for their shards; called only where there are some.

    Raises:
        ValueError: nothing is there, an index that is broken or of another version, an address that does not answer.
    """
    parts: list[Part] = []
    named = expand(path)
    _check_once(named, path)  # before anything is fetched
    for parent, group in groupby(named, key=lambda a: _parent(a) if is_shard(a) else None):
        addresses = list(group)
        if parent is None:
            parts += [_open_folder(address, access) for address in addresses]
        else:
            parts.append(_open_shards(parent, addresses, access, cache))
    _check_once([place for part in parts for place in part.places], path)
    return parts


def indexed_samples(path: str | Sequence[str]) -> int | None:
    """Return how many samples shards have by the indices that lie beside them here; opens no data and runs nothing.

    Args:
        path: as for ``open_parts``.

    Returns:
        None if an index is missing or on another machine: a data set would have to be opened for it.

    Raises:
        ValueError: nothing is there, or an index is broken.
    """
    total = 0
    for address in expand(path):
        if is_remote(address):
            return None
        if not os.path.exists(address):
            raise ValueError(f"shards (={address!r}) must be a folder of .tar shards or a shard, but nothing is there")
        index = _own_index(os.path.dirname(address) if is_shard(address) else address)
        entries = [
            e for e in (index or {"shards": []})["shards"] if not is_shard(address) or e["file"] == _file(address)
        ]
        if not entries:
            return None
        total += sum(entry["samples"] for entry in entries)
    return total


def _check_once(addresses: Sequence[str], path: str | Sequence[str]) -> None:
    """Raises ValueError for a folder or a shard that is named twice, by whatever names."""
    seen: set[str] = set()
    for address in addresses:
        place = address.rstrip("/") if is_remote(address) else os.path.realpath(address)
        if place in seen:
            raise ValueError(f"shards (={path!r}) name {address} more than once: its samples would be used as often")
        seen.add(place)


def _parent(address: str) -> str:
    return "pipe:" if address.startswith("pipe:") else address.partition("?")[0].rpartition("/")[0]


def _open_folder(folder: str, access: Access) -> Part:
    if is_remote(folder):
        found = _remote_index(folder, access)
        if found is None:
            raise ValueError(
                f"shards (={folder!r}) must be a folder with an {INDEX}, but there is none at that address; shards "
                f"without one are named one by one, as {folder.rstrip('/')}/train-{{000000..000127}}.tar"
            )
        return _part(folder, found[0], found[1], folder)
    own, index = folder, _own_index(folder)
    if index is not None:
        files = glob.glob(os.path.join(glob.escape(folder), "*.tar"))
        changed = _changed(folder, index, files)
        if _outdated(index, files):
            log.warning("%s in %s is of an earlier version, without checksums: indexed again", INDEX, folder)
            index = None
        elif changed and is_foreign(index):
            log.warning("%s was added to %s, or changed, since it was indexed: indexed again", changed[0], folder)
            index = None
        elif changed:
            log.warning("%s in %s is not as its %s says: see make_shards.py --verify", changed[0], folder, INDEX)
    if index is None:
        files = shards_in(folder)
        if os.access(folder, os.W_OK):
            index_files(files, folder, folder)
        else:
            own = _local_index(files, folder, access)
        index = read_index(os.path.join(own, INDEX))
    return _part(folder, own, index, folder)


def _own_index(folder: str) -> dict[str, Any] | None:
    """The index that lies in a folder of this machine, if one does."""
    path = os.path.join(folder, INDEX)
    return read_index(path) if os.path.isfile(path) else None


def _outdated(index: dict[str, Any], files: Sequence[str]) -> bool:
    """Whether an earlier release made the index of foreign shards, all of which are here to be indexed again."""
    listed = {entry["file"] for entry in index["shards"]}
    here = {os.path.basename(file) for file in files if os.path.isfile(file)}
    return is_foreign(index) and index["made_by"].get("version") != INDEXER and listed <= here


def _changed(folder: str, index: dict[str, Any], files: Sequence[str]) -> list[str]:
    """Names of those shards that are there and are not as the folder's own index says, as far as that costs nothing.

    A foreign index is older than a shard that was replaced; ours has checksums, and may have been copied in any order.
    A time to come tells nothing: the shard is from a machine whose clock is ahead.
    """
    sizes = {entry["file"]: entry["bytes"] for entry in index["shards"]}
    made = os.path.getmtime(os.path.join(folder, INDEX)) if is_foreign(index) else math.inf
    there = [(os.path.basename(file), os.stat(file)) for file in sorted(files) if os.path.isfile(file)]
    return [name for name, facts in there if sizes.get(name) != facts.st_size or made < facts.st_mtime <= time.time()]


def _open_shards(parent: str, addresses: list[str], access: Access, cache: Callable[[], ShardCache]) -> Part:
    """Shards of one folder (or pipes) that are named one by one."""
    shown = addresses[0] if len(addresses) == 1 else f"{addresses[0]} ... {addresses[-1]}"
    if parent == "pipe:":
        folder = _streamed_index(addresses, shown, access, cache)
    elif is_remote(parent + "/"):
        found = _remote_index(parent, access)
        if found and (part := _subset(shown, *found, addresses)):
            return part
        folder = _streamed_index(addresses, shown, access, cache)
    else:
        index = _own_index(parent)
        if (
            index is not None
            and is_foreign(index)
            and (_changed(parent, index, addresses) or _outdated(index, addresses))
        ):
            index = None
        if index is not None and (part := _subset(shown, parent, index, addresses)):
            return part
        folder = _local_index(addresses, shown, access)
    return _subset(shown, folder, read_index(os.path.join(folder, INDEX)), addresses) or _unreachable(folder)


def _unreachable(folder: str) -> Part:
    raise ValueError(f"{folder} is the index of other shards: remove it")


def _part(path: str, folder: str, index: dict[str, Any], base: str) -> Part:
    places = [f"{base.rstrip('/')}/{entry['file']}" for entry in index["shards"]]
    return Part(path, folder, index["shards"], places, None, index)


def _subset(path: str, folder: str, index: dict[str, Any], addresses: Sequence[str]) -> Part | None:
    """The part of an index that is about these shards; None where it does not list all of them."""
    numbers = {entry["file"]: k for k, entry in enumerate(index["shards"])}
    chosen = [numbers.get(_file(address), -1) for address in addresses]
    if min(chosen) < 0:
        return None
    entries = [index["shards"][k] for k in chosen]
    rows = None
    if chosen != list(range(len(numbers))):
        ends = np.cumsum([entry["samples"] for entry in index["shards"]])
        rows = np.concatenate([np.arange(ends[k] - index["shards"][k]["samples"], ends[k]) for k in chosen])
    return Part(path, folder, entries, list(addresses), rows, index)


def _file(address: str) -> str:
    """What a shard is called in an index: its file's name; of a pipe, the whole command."""
    return address if address.startswith("pipe:") else address.partition("?")[0].rpartition("/")[2]


def _index_root(access: Access) -> str:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "jepa_kit")
    return os.path.abspath(os.path.expanduser(access.cache or default))


def _kept(access: Access, identity: Any, make: Callable[[str], None]) -> str:
    """The folder of an index that is made once, by one process."""
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    root = _index_root(access)
    folder = os.path.join(root, KEPT_INDEXES, name)
    os.makedirs(folder, exist_ok=True)
    with lock(root, name):
        if not os.path.isfile(os.path.join(folder, INDEX)):
            make(folder)
    return folder


def _local_index(files: Sequence[str], path: str, access: Access) -> str:
    facts = [os.stat(file) if os.path.exists(file) else None for file in files]
    versions = [(os.path.abspath(f), s and s.st_size, s and s.st_mtime_ns) for f, s in zip(files, facts, strict=True)]
    return _kept(access, [INDEXER, versions], lambda folder: index_files(files, folder, path))


def _remote_index(folder: str, access: Access) -> tuple[str, dict[str, Any]] | None:
    """An index of another machine, copied here with its arrays; None where there is none.

    Raises:
        ValueError: the machine does not answer, or its index is broken.
    """
    base = folder.rstrip("/")
    try:
        text = read(f"{base}/{INDEX}", access)
    except StreamError as error:
        if _is_absent(error):
            return None
        raise ValueError(f"{base}/{INDEX} cannot be read: {error}") from error
    index = read_index(f"{base}/{INDEX}", text)

    def make(here: str) -> None:
        for name in [OFFSETS, LABELS, KEYS] + ([MASKS] if "masks" in index else []):
            try:
                content = read(f"{base}/{name}", access)
            except StreamError as error:
                raise ValueError(f"{base}/{name} cannot be read, but {INDEX} is there: {error}") from error
            with atomic_write(os.path.join(here, name), shared=True) as temporary, open(temporary, "wb") as out:
                out.write(content)
        with atomic_write(os.path.join(here, INDEX), shared=True) as temporary, open(temporary, "wb") as out:
            out.write(text)

    return _kept(access, [base, hashlib.sha256(text).hexdigest()], make), index


def _is_absent(error: StreamError) -> bool:
    """Whether an address answered that it holds nothing, or, as object stores do then, that it does not tell."""
    return str(error).startswith(("HTTP 403", "HTTP 404", "HTTP 410")) or isinstance(error.__cause__, FileNotFoundError)


def _streamed_index(addresses: Sequence[str], path: str, access: Access, cache: Callable[[], ShardCache]) -> str:
    """The index of shards of other machines, each of which is fetched once for it; goes on where it was stopped."""

    def make(folder: str) -> None:
        shelf, progress = cache(), Progress(f"shards of {path} read for their index", len(addresses))

        def one(number: int) -> Scan:
            kept = os.path.join(folder, f"part-{number:06d}.npz")
            found = _load_scan(kept)
            if found is None:
                fetched = shelf.get(RemoteShard(addresses[number]))
                if fetched.fault:
                    raise ValueError(
                        f"shards (={path!r}) have no index, and to make it each is read once, but {fetched.fault}. "
                        "What was read is not read again"
                    )
                found = scan(fetched.path, _file(addresses[number]), checksum=True)
                shelf.summed(RemoteShard(addresses[number]), found.entry)
                _save_scan(kept, found)
            progress.step()
            return found

        with ThreadPoolExecutor(FETCHERS) as pool:
            scans = list(pool.map(one, range(len(addresses))))
        write_foreign_index(folder, scans, path)
        for name in os.listdir(folder):
            if name.startswith("part-"):
                os.remove(os.path.join(folder, name))

    return _kept(access, [INDEXER, *addresses], make)


def _save_scan(path: str, found: Scan) -> None:
    rows, names = found.rows, list(found.rows.labels)
    entry = [found.entry.file, found.entry.bytes, found.entry.sha256]
    meta = {"entry": entry, "keys": rows.keys, "names": names, "refused": found.refused}
    meta |= {"links": rows.links, "outside": found.outside}
    labels = np.array([rows.labels[name] for name in names]).reshape(len(names), len(rows.keys))
    with atomic_write(path, shared=True) as temporary, open(temporary, "wb") as out:
        np.savez(out, meta=np.array(json.dumps(meta)), offsets=rows.offsets, labels=labels, masks=rows.masks)


def _load_scan(path: str) -> Scan | None:
    try:
        with np.load(path) as kept:
            meta = json.loads(str(kept["meta"]))
            labels = dict(zip(meta["names"], kept["labels"].astype(np.int64), strict=True))
            rows = Rows(meta["keys"], kept["offsets"], labels, kept["masks"], meta["links"])
    except (FileNotFoundError, BadZipFile, ValueError, KeyError):
        return None
    name, size, sha256 = meta["entry"]
    return Scan(Shard(name, len(rows.keys), size, sha256), rows, meta["refused"], meta["outside"])
