"""From what a user names to shards with an index: folders, patterns and lists, here or on other machines.

Where an index comes from, in this order:

1. a folder's own ``index.json``, also for shards of that folder that are named one by one;
2. for a local folder without one: made once and kept there, or, where nothing can be written there, as in 3;
3. for shards that are named one by one: made once and kept under ``CACHE/indexes``, where CACHE is ``data.cache``, or
   ``~/.cache/jepa_kit`` without one. Shards of other machines are read whole for it, once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.cache import RemoteShard, ShardCache, lock
from jepa_kit.data.foreign import Progress, Scan, index_files, scan, shards_in, write_foreign_index
from jepa_kit.data.shard_writing import FORMAT_VERSION, INDEX, KEYS, LABELS, MASKS, OFFSETS, Rows, Shard, replacing
from jepa_kit.data.streams import Access, StreamError, expand, is_remote, is_shard, read
from jepa_kit.rng import IntArray

FETCHERS = 4
"""Shards that are fetched at the same time while an index is made."""


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

    def array(self, name: str) -> NDArray[Any]:
        """An array of the index, memory-mapped where all of its rows are wanted.

        Raises:
            ValueError: it is missing, or has not as many rows as the index says.
        """
        try:
            # a plain array over the mapped file: indexing np.memmap itself costs several times as much
            found = np.asarray(np.load(os.path.join(self.folder, name), mmap_mode="r"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{name} is missing from {self.folder}, but {INDEX} is there: make the shards again"
            ) from error
        if len(found) != self.index["samples"]:
            raise ValueError(
                f"{self.folder}/{name} lists {len(found)} samples, but {INDEX} has {self.index['samples']}: "
                "make the shards again"
            )
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
    for parent, group in groupby(expand(path), key=lambda a: _parent(a) if is_shard(a) else None):
        addresses = list(group)
        if parent is None:
            parts += [_open_folder(address, access) for address in addresses]
        else:
            parts.append(_open_shards(parent, addresses, access, cache))
    return parts


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
    own = folder
    if not os.path.isfile(os.path.join(folder, INDEX)):
        files = shards_in(folder)
        if os.access(folder, os.W_OK):
            index_files(files, folder, folder)
        else:
            own = _local_index(files, folder, access)
    return _part(folder, own, _parse(os.path.join(own, INDEX)), folder)


def _open_shards(parent: str, addresses: list[str], access: Access, cache: Callable[[], ShardCache]) -> Part:
    """Shards of one folder (or pipes) that are named one by one."""
    shown = addresses[0] if len(addresses) == 1 else f"{addresses[0]} ... {addresses[-1]}"
    if len(set(addresses)) < len(addresses):
        twice = next(a for a in addresses if addresses.count(a) > 1)
        raise ValueError(f"shards (={shown!r}) name {twice} more than once: its samples would be used as often")
    if parent == "pipe:":
        folder = _streamed_index(addresses, shown, access, cache)
    elif is_remote(parent + "/"):
        found = _remote_index(parent, access)
        if found and (part := _subset(shown, *found, addresses)):
            return part
        folder = _streamed_index(addresses, shown, access, cache)
    else:
        if os.path.isfile(os.path.join(parent, INDEX)):
            index = _parse(os.path.join(parent, INDEX))
            if part := _subset(shown, parent, index, addresses):
                return part
        folder = _local_index(addresses, shown, access)
    return _subset(shown, folder, _parse(os.path.join(folder, INDEX)), addresses) or _unreachable(folder)


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


def _parse(path: str, text: bytes | None = None) -> dict[str, Any]:
    """The content of an index.json, checked.

    Raises:
        ValueError: it is cut, or of another version.
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
    listed = sum(entry["samples"] for entry in index["shards"])
    if listed != index["samples"]:
        raise ValueError(f"{path} has {index['samples']} samples, but its shards have {listed}: make the shards again")
    return index


def _index_root(access: Access) -> str:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "jepa_kit")
    return os.path.abspath(os.path.expanduser(access.cache or default))


def _kept(access: Access, identity: Any, make: Callable[[str], None]) -> str:
    """The folder of an index that is made once, by one process."""
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    root = _index_root(access)
    folder = os.path.join(root, "indexes", name)
    os.makedirs(folder, exist_ok=True)
    with lock(root, name):
        if not os.path.isfile(os.path.join(folder, INDEX)):
            make(folder)
    return folder


def _local_index(files: Sequence[str], path: str, access: Access) -> str:
    facts = [os.stat(file) if os.path.exists(file) else None for file in files]
    versions = [(os.path.abspath(f), s and s.st_size, s and s.st_mtime_ns) for f, s in zip(files, facts, strict=True)]
    return _kept(access, versions, lambda folder: index_files(files, folder, path))


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
    index = _parse(f"{base}/{INDEX}", text)

    def make(here: str) -> None:
        for name in [OFFSETS, LABELS, KEYS] + ([MASKS] if "masks" in index else []):
            try:
                content = read(f"{base}/{name}", access)
            except StreamError as error:
                raise ValueError(f"{base}/{name} cannot be read, but {INDEX} is there: {error}") from error
            with replacing(os.path.join(here, name)) as temporary, open(temporary, "wb") as out:
                out.write(content)
        with replacing(os.path.join(here, INDEX)) as temporary, open(temporary, "wb") as out:
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
                found = scan(fetched.path, _file(addresses[number]))
                _save_scan(kept, found)
            progress.step()
            return found

        with ThreadPoolExecutor(FETCHERS) as pool:
            scans = list(pool.map(one, range(len(addresses))))
        write_foreign_index(folder, scans, path)
        for name in os.listdir(folder):
            if name.startswith("part-"):
                os.remove(os.path.join(folder, name))

    return _kept(access, list(addresses), make)


def _save_scan(path: str, found: Scan) -> None:
    rows, names = found.rows, list(found.rows.labels)
    meta = {"entry": [found.entry.file, found.entry.bytes], "keys": rows.keys, "names": names, "refused": found.refused}
    labels = np.array([rows.labels[name] for name in names]).reshape(len(names), len(rows.keys))
    with replacing(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, meta=np.array(json.dumps(meta)), offsets=rows.offsets, labels=labels, masks=rows.masks)


def _load_scan(path: str) -> Scan | None:
    try:
        with np.load(path) as kept:
            meta = json.loads(str(kept["meta"]))
            labels = dict(zip(meta["names"], kept["labels"].astype(np.int64), strict=True))
            rows = Rows(meta["keys"], kept["offsets"], labels, kept["masks"])
    except (FileNotFoundError, BadZipFile, ValueError, KeyError):
        return None
    return Scan(Shard(meta["entry"][0], len(rows.keys), meta["entry"][1], None), rows, meta["refused"])
