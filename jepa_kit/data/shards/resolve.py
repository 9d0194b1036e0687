"""Find the shards that the user names, on this machine or remote, and their index.

The index is, in this order:

1. the folder's own ``index.json``, also if shards of that folder are named one by one;
2. for a local folder without one: made once and kept in the folder, or, if the folder is not writable, as in 3; made
   again if shards were added or changed;
3. for shards that are named one by one: made once and kept under ``CACHE/indexes``, CACHE being ``data.cache`` or,
   by default, ``~/.cache/jepa_kit``. Remote shards are downloaded once for it.

An index is foreign if it was made here for shards that another tool wrote (``is_foreign``), as in 2 and 3. Only such an
index is made again. The index that make_shards.py wrote has checksums of its shards, so if they differ from it, they
are damaged.
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
from itertools import groupby
from typing import Any

import numpy as np

from jepa_kit.data.listed import image_folder
from jepa_kit.data.remote.cache import RemoteShard, ShardCache, lock
from jepa_kit.data.remote.fetch import Access, expand, is_remote, is_shard, read
from jepa_kit.data.shards.index import CACHED_INDEXES, array_names, is_foreign, read_index
from jepa_kit.data.shards.indexing import INDEXER, Scan, index_files, reported, scan, shards_in, write_foreign_index
from jepa_kit.data.shards.parts import Part, ShardPart
from jepa_kit.data.shards.writing import INDEX
from jepa_kit.errors import StreamError
from jepa_kit.files import atomic_write

FETCHERS = 4
"""Shards that are downloaded at the same time while an index is made."""

log = logging.getLogger(__name__)


def open_parts(path: str | Sequence[str], access: Access, cache: Callable[[], ShardCache]) -> list[Part]:
    """Return the parts of a data set, in the given order.

    Args:
        path: a folder of shards or of images, a shard, a pattern, or a list of these.
        access: options for remote shards.
        cache: returns the cache of remote shards; called only if there are some.

    Raises:
        ValueError: nothing is there, an index is damaged or of another version, or a URL does not answer.
    """
    parts: list[Part] = []
    named = expand(path)
    _check_once(named, path)  # before a download
    for parent, group in groupby(named, key=lambda a: _parent(a) if is_shard(a) else None):
        addresses = list(group)
        if parent is None:
            parts += [_open_folder(address, access) for address in addresses]
        else:
            parts.append(_open_shards(parent, addresses, access, cache))
    _check_once([place for part in parts for place in part.places], path)  # a folder and one of its shards
    return parts


def indexed_samples(path: str | Sequence[str]) -> int | None:
    """Return the number of images in folders, and of samples by the indexes beside shards, without opening the shards.

    Args:
        path: see ``open_parts``.

    Returns:
        None if an index is missing or remote.

    Raises:
        ValueError: nothing is there, or an index is damaged.
    """
    total = 0
    for address in expand(path):
        if is_remote(address):
            return None
        if not os.path.exists(address):
            raise ValueError(f"shards (={address!r}) must be a folder of .tar shards or a shard, but nothing is there")
        index = _own_index(os.path.dirname(address) if is_shard(address) else address) or {"shards": []}
        if not index["shards"] and os.path.isdir(address) and not shards_in(address):
            total += len(image_folder(address).keys)
            continue
        entries = [e for e in index["shards"] if not is_shard(address) or e["file"] == _file(address)]
        if not entries:
            return None
        total += sum(entry["samples"] for entry in entries)
    return total


def _check_once(addresses: Sequence[str], path: str | Sequence[str]) -> None:
    """Raise a ValueError if a folder or a shard occurs twice, also under two names."""
    seen: set[str] = set()
    for address in addresses:
        place = address.rstrip("/") if is_remote(address) else os.path.realpath(address)
        if place in seen:
            raise ValueError(f"shards (={path!r}) name {address} more than once: its samples would be used as often")
        seen.add(place)


def _parent(address: str) -> str:
    """Return the folder or URL of a shard; ``pipe:`` for all pipes, which then share an index."""
    return "pipe:" if address.startswith("pipe:") else address.partition("?")[0].rpartition("/")[0]


def _open_folder(folder: str, access: Access) -> Part:
    """Return the part of all shards of a folder or URL, or of the images of a folder that has no shards.

    A local folder of shards without a valid index is indexed.
    """
    if is_remote(folder):
        found = _remote_index(folder, access)
        if found is None:
            raise ValueError(
                f"shards (={folder!r}) must be a folder with an {INDEX}, but there is none at that URL; shards "
                f"without one are named one by one, as {folder.rstrip('/')}/train-{{000000..000127}}.tar"
            )
        return _all_shards(folder, *found)
    index_folder, index = folder, _own_index(folder)
    if index is not None:
        files = glob.glob(os.path.join(glob.escape(folder), "*.tar"))
        fault = _difference(folder, index, files)
        if fault:
            log.warning("%s: %s", fault, "indexed again" if is_foreign(index) else "run jepa-shards --verify")
        if fault and is_foreign(index):
            index = None
    if index is None:
        files = shards_in(folder)
        if not files:
            return image_folder(folder)
        if os.access(folder, os.W_OK):
            index_files(files, folder, folder)
            index = read_index(os.path.join(folder, INDEX))
        else:
            index_folder, index = _local_index(files, folder, access)
    return _all_shards(folder, index_folder, index)


def _own_index(folder: str) -> dict[str, Any] | None:
    """Return the index in a local folder, or None."""
    path = os.path.join(folder, INDEX)
    return read_index(path) if os.path.isfile(path) else None


def _difference(folder: str, index: dict[str, Any], files: Sequence[str]) -> str | None:
    """Return a message if the index of a folder does not describe the given shards, else None.

    It does not if a shard has another size or is missing in the index, or, for a foreign index, if a shard is newer,
    or the index is of an earlier release and all of its shards are here to index again.

    The times of shards that make_shards.py wrote are not compared: copying may change their order, and they have
    checksums. A time in the future is ignored: the shard comes from a machine whose clock is ahead.
    """
    sizes, foreign = {entry["file"]: entry["bytes"] for entry in index["shards"]}, is_foreign(index)
    made = os.path.getmtime(os.path.join(folder, INDEX)) if foreign else math.inf  # inf: no shard is newer
    there = {os.path.basename(file): os.stat(file) for file in sorted(files) if os.path.isfile(file)}
    if foreign and index["made_by"].get("version") != INDEXER and sizes.keys() <= there.keys():
        return f"{INDEX} in {folder} is of an earlier version, without checksums"
    for name, facts in there.items():
        if sizes.get(name) != facts.st_size or made < facts.st_mtime <= time.time():
            changed = f"was added to {folder}, or changed, since it was indexed"
            return f"{name} {changed}" if foreign else f"{name} in {folder} differs from its {INDEX}"
    return None


def _open_shards(parent: str, addresses: list[str], access: Access, cache: Callable[[], ShardCache]) -> ShardPart:
    """Return the part of shards of one folder, or of pipes, that are named one by one."""
    shown = addresses[0] if len(addresses) == 1 else f"{addresses[0]} ... {addresses[-1]}"
    found: tuple[str, dict[str, Any]] | None = None
    remote = is_remote(parent + "/")
    if remote and parent != "pipe:":
        found = _remote_index(parent, access)
    elif not remote and (index := _own_index(parent)):
        stale = is_foreign(index) and _difference(parent, index, addresses)
        found = None if stale else (parent, index)
    if found and (part := _subset(shown, *found, addresses)):
        return part
    found = _streamed_index(addresses, shown, access, cache) if remote else _local_index(addresses, shown, access)
    if part := _subset(shown, *found, addresses):
        return part
    raise ValueError(f"{found[0]} is the index of other shards: remove it")


def _all_shards(path: str, folder: str, index: dict[str, Any]) -> ShardPart:
    """Return all shards of a folder or URL, whose index is in a local folder."""
    places = [f"{path.rstrip('/')}/{entry['file']}" for entry in index["shards"]]
    return ShardPart(path, folder, index["shards"], places, None, index)


def _subset(path: str, folder: str, index: dict[str, Any], addresses: Sequence[str]) -> ShardPart | None:
    """Return the part of an index for the given shards, or None if it does not list all of them."""
    numbers = {entry["file"]: k for k, entry in enumerate(index["shards"])}
    chosen = [numbers.get(_file(address), -1) for address in addresses]
    if min(chosen) < 0:
        return None
    entries = [index["shards"][k] for k in chosen]
    rows = None
    if chosen != list(range(len(numbers))):
        ends = np.cumsum([entry["samples"] for entry in index["shards"]])
        rows = np.concatenate([np.arange(ends[k] - index["shards"][k]["samples"], ends[k]) for k in chosen])
    return ShardPart(path, folder, entries, list(addresses), rows, index)


def _file(address: str) -> str:
    """Return the name of a shard in an index: its file name, or the whole command of a pipe."""
    return address if address.startswith("pipe:") else address.partition("?")[0].rpartition("/")[2]


def _cached_index(access: Access, identity: Any, make: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Return the folder of a cached index and its content; the first process that needs it makes it."""
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "jepa_kit")
    root = os.path.abspath(os.path.expanduser(access.cache or default))
    folder = os.path.join(root, CACHED_INDEXES, name)
    os.makedirs(folder, exist_ok=True)
    with lock(root, name):
        if not os.path.isfile(os.path.join(folder, INDEX)):
            make(folder)
    return folder, read_index(os.path.join(folder, INDEX))


def _local_index(files: Sequence[str], path: str, access: Access) -> tuple[str, dict[str, Any]]:
    """Return the cached index of local shards; another size or time of change gives another index."""
    facts = [(os.path.abspath(file), os.stat(file) if os.path.exists(file) else None) for file in files]
    versions = [(file, s and s.st_size, s and s.st_mtime_ns) for file, s in facts]
    return _cached_index(access, [INDEXER, versions], lambda folder: index_files(files, folder, path))


def _remote_index(folder: str, access: Access) -> tuple[str, dict[str, Any]] | None:
    """Return a remote index, copied here with its arrays, or None if there is none.

    Raises:
        ValueError: the URL does not answer, or its index is damaged.
    """
    base = folder.rstrip("/")
    try:
        text = read(f"{base}/{INDEX}", access)
    except StreamError as error:
        # object stores may answer 403 for what does not exist
        if str(error).startswith(("HTTP 403", "HTTP 404", "HTTP 410")) or isinstance(
            error.__cause__, FileNotFoundError
        ):
            return None
        raise ValueError(f"{base}/{INDEX} cannot be read: {error}") from error
    index = read_index(f"{base}/{INDEX}", text)

    def make(here: str) -> None:
        for name in [*array_names(index), INDEX]:
            try:
                content = text if name == INDEX else read(f"{base}/{name}", access)
            except StreamError as error:
                raise ValueError(f"{base}/{name} cannot be read, but {INDEX} is there: {error}") from error
            with atomic_write(os.path.join(here, name), shared=True) as temporary:
                temporary.write_bytes(content)

    return _cached_index(access, [base, hashlib.sha256(text).hexdigest()], make)


def _streamed_index(
    addresses: Sequence[str], path: str, access: Access, cache: Callable[[], ShardCache]
) -> tuple[str, dict[str, Any]]:
    """Return the index of remote shards; each is downloaded once, and an interrupted call resumes."""

    def make(folder: str) -> None:
        shards = cache()

        def scan_one(number: int) -> Scan:
            saved = os.path.join(folder, f"part-{number:06d}.json")
            found, shard = Scan.load(saved), RemoteShard(addresses[number])
            if found is None:
                file, fault = shards.get(shard)
                if fault:
                    raise ValueError(
                        f"shards (={path!r}) have no index, and to make it each is read once, but {fault}. "
                        "The next try resumes after the shards that were read"
                    )
                found = scan(file, _file(shard.address), checksum=True)
                shards.rename_by_checksum(shard, found.entry)  # training finds the shard in the cache by its checksum
                found.save(saved)
            return found

        with ThreadPoolExecutor(FETCHERS) as pool:
            done = pool.map(scan_one, range(len(addresses)))
            scans = list(reported(done, f"shards of {path} read for their index", len(addresses)))
        write_foreign_index(folder, scans, path)
        for saved in glob.glob(os.path.join(glob.escape(folder), "part-*")):
            os.remove(saved)

    return _cached_index(access, [INDEXER, *addresses], make)
