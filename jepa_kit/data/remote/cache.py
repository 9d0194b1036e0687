"""Shards of other machines, kept in a folder of this one.

    CACHE/shards/    whole shards; NAME.part while one comes; NAME.cut and NAME.why where it did not come whole
    CACHE/locks/     so that the processes that share the folder fetch each shard once
    CACHE/indexes/   what is known of data sets (``parts.py``)

A shard has its name only when all of its bytes came and its checksum, where the index has one, is right. One that is in
use may be removed: who has it open reads on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from iopath.common.file_io import file_lock

from jepa_kit.data.remote.fetch import Access, copy
from jepa_kit.data.shards.writing import Shard
from jepa_kit.errors import CacheError, StreamError
from jepa_kit.files import sha256_of

TEMPORARY_GB = 20.0
FORGIVEN_AFTER = 600.0
"""Seconds after which a shard that did not come is asked for again; a run that is started again asks at once."""
ABANDONED_AFTER = 3600.0
"""Seconds after which a file that nobody writes to any more is taken for that of a process that died."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteShard:
    """A shard of another machine; size and SHA-256 where an index has them."""

    address: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """Of its file in the cache: a version of the shard with another checksum has another one."""
        text = json.dumps([self.address, self.sha256])
        base = re.sub(r"[^\w.-]", "_", self.address.partition("?")[0].rpartition("/")[2])[-60:]
        return f"{hashlib.sha256(text.encode()).hexdigest()[:20]}-{base}"


@dataclass(frozen=True)
class Fetched:
    """Where a shard lies now, and why it is not whole (None where it is)."""

    path: str
    fault: str | None = None


def lock(folder: str, name: str) -> AbstractContextManager[Any]:
    """Held by one process at a time of those that share a cache folder; waits for it."""
    return file_lock(os.path.join(folder, "locks", name))


class ShardCache:
    """See the module. Cheap to pickle; many processes may share its folder.

    Args:
        access: folder, bound and patience.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self.opened = time.time()
        self.temporary = access.cache is None
        if access.cache is None:
            self.folder = tempfile.mkdtemp(prefix="jepa_kit-")
            # by the process that made it alone: a forked worker runs no finalizers of its parent's
            self._removal = weakref.finalize(self, _remove_own, self.folder, os.getpid())
        else:
            self.folder = os.path.abspath(os.path.expanduser(access.cache))
        self.limit = access.cache_gb if access.cache_gb is not None or not self.temporary else TEMPORARY_GB
        """In 10**9 bytes, or None."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_removal"}

    def get(self, shard: RemoteShard) -> Fetched:
        """The shard's file, fetched where it is not here.

        Raises:
            CacheError: the folder takes no more.
        """
        path = os.path.join(self._inside("shards"), shard.name)
        if self._is_whole(path, shard):
            return Fetched(path)
        with lock(self.folder, shard.name):
            if self._is_whole(path, shard):
                return Fetched(path)
            return _recent_fault(path, self.opened) or self._fetch(path, shard)

    def summed(self, shard: RemoteShard, entry: Shard) -> None:
        """Give a fetched shard the name of the version whose size and SHA-256 are known now.

        Args:
            shard: as it was fetched.
            entry: of the index that was made of it.
        """
        known = RemoteShard(shard.address, entry.bytes, entry.sha256)
        folder = self._inside("shards")
        with lock(self.folder, shard.name), suppress(FileNotFoundError):  # if it was removed to make room
            os.replace(os.path.join(folder, shard.name), os.path.join(folder, known.name))

    def _inside(self, *names: str) -> str:
        folder = os.path.join(self.folder, *names)
        os.makedirs(folder, exist_ok=True)
        return folder

    def _is_whole(self, path: str, shard: RemoteShard) -> bool:
        try:
            size = os.stat(path).st_size
            if shard.bytes in (None, size):
                os.utime(path)  # its last use
                return True
            log.warning("%s holds %d bytes where %s were fetched: fetched again", path, size, shard.bytes)
            os.remove(path)
        except FileNotFoundError:  # not yet here, or just removed to make room
            pass
        return False

    def _fetch(self, path: str, shard: RemoteShard) -> Fetched:
        part, fault, what = f"{path}.part", None, "is not what its index is about, and none of it is used"
        self._make_room(shard.bytes or 0)
        try:
            with open(part, "wb") as out:
                for attempt in range(2):
                    out.seek(0)
                    copy(shard.address, out, self.access, shard.bytes)
                    out.flush()
                    fault = _difference(part, shard)
                    if fault is None:
                        break
                    log.warning("%s: %s%s", shard.address, fault, "" if attempt else "; fetched again")
                    out.truncate(0)  # the stream is whole and another one: nothing of it is used
        except StreamError as error:
            fault, what = str(error), "did not come whole"
        except OSError as error:
            with suppress(FileNotFoundError):
                os.remove(part)
            raise CacheError(
                f"the cache {self.folder} cannot take {shard.address}: {error}; name a folder with room in data.cache, "
                "or a bound that it has room for in data.cache_gb"
            ) from error
        if fault is None:
            os.replace(part, path)
            self._make_room(0)
            for end in (".cut", ".why"):
                with suppress(FileNotFoundError):
                    os.remove(path + end)
            return Fetched(path)
        os.replace(part, f"{path}.cut")
        fault = f"{shard.address} {what}: {fault}"
        with open(f"{path}.why", "w", encoding="utf-8") as text:
            text.write(fault)
        log.warning("%s", fault)
        return Fetched(f"{path}.cut", fault)

    def _make_room(self, size: int) -> None:
        """Removes the shards that were used longest ago, until ``size`` bytes more fit."""
        if self.limit is None:
            return
        found, now = [], time.time()
        with os.scandir(self._inside("shards")) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    found.append((facts.st_mtime, facts.st_size, entry.path))
        total = size + sum(entry[1] for entry in found)
        for used, freed, path in sorted(found):
            if total <= self.limit * 1e9:
                break
            if path.endswith(".part") and now - used < ABANDONED_AFTER:
                continue
            with suppress(FileNotFoundError):
                os.remove(path)
            total -= freed


def _recent_fault(path: str, opened: float) -> Fetched | None:
    """What came of a shard that was given up a short time ago, and not before this run."""
    try:
        given_up = os.stat(f"{path}.cut").st_mtime
        if given_up < opened or time.time() - given_up > FORGIVEN_AFTER:
            return None
        with open(f"{path}.why", encoding="utf-8") as text:
            return Fetched(f"{path}.cut", text.read())
    except FileNotFoundError:
        return None


def _difference(path: str, shard: RemoteShard) -> str | None:
    """How the bytes that came differ from those of the index."""
    size = os.path.getsize(path)
    if shard.bytes not in (None, size):
        return f"{size} bytes came, but its index says {shard.bytes}"
    return None if shard.sha256 in (None, sha256_of(path)) else "its SHA-256 is not that of its index"


def _remove_own(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
