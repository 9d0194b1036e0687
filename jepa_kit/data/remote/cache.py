"""Cache of remote shards in a local folder.

    CACHE/shards/    complete shards; NAME.part during a download; NAME.cut and NAME.why if one failed
    CACHE/locks/     so that processes that share the folder download each shard once
    CACHE/indexes/   indexes of data sets (``data/shards/resolve.py``)

A file is renamed to the shard's name once it is complete and its checksum, if the index has one, is right. A shard may
be deleted while a process reads it: the open file stays readable.
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
from pathlib import Path
from typing import Any, NamedTuple

from iopath.common.file_io import file_lock

from jepa_kit.data.remote.fetch import Access, copy
from jepa_kit.data.shards.writing import Shard
from jepa_kit.errors import CacheError, StreamError
from jepa_kit.files import sha256_of

TEMPORARY_GB = 20.0
FORGIVEN_AFTER = 600.0
"""Seconds after which a failed download is tried again; a run that starts again tries at once."""
ABANDONED_AFTER = 3600.0
"""Seconds without a write after which a partial file counts as left by a process that died."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteShard:
    """A remote shard, with its size and SHA-256 if an index has them."""

    address: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """File name in the cache, which depends on URL and checksum, so that another version has another name."""
        text = json.dumps([self.address, self.sha256])
        base = re.sub(r"[^\w.-]", "_", self.address.partition("?")[0].rpartition("/")[2])[-60:]
        return f"{hashlib.sha256(text.encode()).hexdigest()[:20]}-{base}"


class Fetched(NamedTuple):
    """Path of a downloaded shard, and why it is incomplete (None if it is complete)."""

    path: str
    fault: str | None = None


def lock(folder: str, name: str) -> AbstractContextManager[Any]:
    """Return a lock, shared by all processes that use a cache folder."""
    return file_lock(os.path.join(folder, "locks", name))


class ShardCache:
    """The cache of a process. Cheap to pickle; many processes may share its folder.

    Args:
        access: folder, limit in bytes, retries and timeouts.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self.opened = time.time()
        self.temporary = access.cache is None
        if access.cache is None:
            self.folder = tempfile.mkdtemp(prefix="jepa_kit-")
            # only the process that created it removes it, not its forked workers
            self._removal = weakref.finalize(self, _remove_own, self.folder, os.getpid())
        else:
            self.folder = os.path.abspath(os.path.expanduser(access.cache))
        self.limit = access.cache_gb if access.cache_gb is not None or not self.temporary else TEMPORARY_GB
        """In 10**9 bytes; None for no limit."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_removal"}

    def get(self, shard: RemoteShard) -> Fetched:
        """Return the shard's file, and download it if it is not cached.

        Raises:
            CacheError: the folder cannot be written to.
        """
        path = os.path.join(self._shards(), shard.name)
        if self._is_whole(path, shard):
            return Fetched(path)
        with lock(self.folder, shard.name):
            if self._is_whole(path, shard):
                return Fetched(path)
            return _recent_fault(path, self.opened) or self._fetch(path, shard)

    def rename_by_checksum(self, shard: RemoteShard, entry: Shard) -> None:
        """Rename a downloaded shard to the name that includes its size and SHA-256.

        Args:
            shard: the shard as downloaded.
            entry: its entry in the index made from it.
        """
        known, folder = RemoteShard(shard.address, entry.bytes, entry.sha256), self._shards()
        with lock(self.folder, shard.name), suppress(FileNotFoundError):  # if it was removed to make room
            os.replace(os.path.join(folder, shard.name), os.path.join(folder, known.name))

    def _shards(self) -> str:
        folder = os.path.join(self.folder, "shards")
        os.makedirs(folder, exist_ok=True)
        return folder

    def _is_whole(self, path: str, shard: RemoteShard) -> bool:
        try:
            size = os.stat(path).st_size
            if shard.bytes in (None, size):
                os.utime(path)  # its last use
                return True
            log.warning("%s has %d bytes instead of %s: downloading it again", path, size, shard.bytes)
            os.remove(path)
        except FileNotFoundError:  # not downloaded yet, or just evicted
            pass
        return False

    def _fetch(self, path: str, shard: RemoteShard) -> Fetched:
        part, fault, what = f"{path}.part", None, "does not match its index and is not used"
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
                    log.warning("%s: %s%s", shard.address, fault, "" if attempt else "; downloading it again")
                    out.truncate(0)  # complete, but another version of the shard
        except StreamError as error:
            fault, what = str(error), "was not downloaded completely"
        except OSError as error:
            Path(part).unlink(missing_ok=True)
            raise CacheError(
                f"the cache {self.folder} cannot store {shard.address}: {error}; set data.cache to a folder with "
                "space, or data.cache_gb to a smaller limit"
            ) from error
        if fault is None:
            os.replace(part, path)
            self._make_room(0)
            for end in (".cut", ".why"):
                Path(path + end).unlink(missing_ok=True)
            return Fetched(path)
        os.replace(part, f"{path}.cut")
        fault = f"{shard.address} {what}: {fault}"
        Path(f"{path}.why").write_text(fault, encoding="utf-8")
        log.warning("%s", fault)
        return Fetched(f"{path}.cut", fault)

    def _make_room(self, size: int) -> None:
        """Evict the least recently used shards until ``size`` more bytes fit."""
        if self.limit is None:
            return
        found, now = [], time.time()
        for entry in os.scandir(self._shards()):
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = size + sum(entry[1] for entry in found)
        for used, freed, path in sorted(found):
            if total <= self.limit * 1e9:
                break
            if path.endswith(".part") and now - used < ABANDONED_AFTER:
                continue
            Path(path).unlink(missing_ok=True)
            total -= freed


def _recent_fault(path: str, opened: float) -> Fetched | None:
    """Return the partial file of a download that failed recently and during this run, or None."""
    try:
        given_up = os.stat(f"{path}.cut").st_mtime
        if given_up < opened or time.time() - given_up > FORGIVEN_AFTER:
            return None
        return Fetched(f"{path}.cut", Path(f"{path}.why").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _difference(path: str, shard: RemoteShard) -> str | None:
    """Return how a downloaded file differs from the index, or None."""
    size = os.path.getsize(path)
    if shard.bytes not in (None, size):
        return f"it has {size} bytes, but its index says {shard.bytes}"
    return None if shard.sha256 in (None, sha256_of(path)) else "its SHA-256 is not that of its index"


def _remove_own(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
