"""The bytes of a member of a tar shard, wherever the shard lies.

A local shard is read with ``pread``; one of another machine is fetched whole into the cache first. A member's tar
header comes along and is checked: a shard that was changed or shifted never passes for what the index says.
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jepa_kit.data.remote.cache import RemoteShard, ShardCache
from jepa_kit.data.remote.fetch import is_remote
from jepa_kit.errors import SampleError

OPEN_SHARDS = 128
"""At most so many shards are open at a time in one process."""

HEADER = tarfile.BLOCKSIZE
SHORT_KEY = 80
"""Longer keys may be cut in a tar header."""


class ShardReader:
    """Reads members of shards by shard, offset and size.

    Cheap to pickle and safe in forked or spawned processes: each opens shards as it needs them.

    Args:
        path: of the data set, for messages.
        shards: their entries in the index: ``file``, ``bytes`` and ``sha256``.
        places: path or address of each.
        cache: for shards of other machines; None where there are none.
        links: key -> names that the header of its members may have instead, if these are links.
    """

    def __init__(
        self,
        path: str,
        shards: Sequence[dict[str, Any]],
        places: Sequence[str],
        cache: ShardCache | None,
        links: Mapping[str, Sequence[str]],
    ) -> None:
        self.path, self.shards, self.places, self.cache, self.links = path, shards, places, cache, links
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit `os` may be None already
        for descriptor in self.__dict__.get("_files", {}).values():
            close(descriptor)

    def read(self, shard: int, offset: int, size: int, key: str) -> bytes:
        """A member's bytes.

        Args:
            shard: its number.
            offset, size: of the member's bytes in the shard.
            key: of its sample.

        Raises:
            SampleError: the shard is missing or cannot be read, is cut short before the end of the member, or holds
                something else there.
            CacheError: the cache takes no more.
        """
        what = f"shard {self.shards[shard]['file']} of {self.path}"
        for again in (True, False):  # a file handle may be stale, a cached shard removed to make room
            try:
                block, fault = self._read(shard, offset - HEADER, size + HEADER)
                break
            except OSError as error:
                self._close(shard)
                if again:
                    continue
                if isinstance(error, FileNotFoundError):
                    raise SampleError(f"{what} is missing, but index.json lists it") from error
                raise SampleError(f"{what} cannot be read: {error}") from error
        if len(block) < size + HEADER:
            raise SampleError(fault or self._length_fault(shard, what))
        if wrong := header_fault(block[:HEADER], size, key, self.links.get(key, ())):
            raise SampleError(f"{what} is corrupt at byte {offset - HEADER}, or was changed: {wrong}")
        return block[HEADER:]

    def fetch(self, shard: int) -> None:
        """Brings a shard of another machine here, if it is not; a fault is met, and told, by who reads it."""
        assert self.cache is not None
        self.cache.get(self._remote(shard))

    def _remote(self, shard: int) -> RemoteShard:
        entry = self.shards[shard]
        return RemoteShard(self.places[shard], entry["bytes"], entry["sha256"])

    def _read(self, shard: int, offset: int, size: int) -> tuple[bytes, str | None]:
        """The bytes, fewer where the file ends; and why a shard of another machine is not whole."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return os.pread(self._files[shard], size, offset), None
        path, fault = self.places[shard], None
        if is_remote(path):
            assert self.cache is not None
            self._close_removed()
            fetched = self.cache.get(self._remote(shard))
            path, fault = fetched.path, fetched.fault
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if fault is None:
            self._files[shard] = descriptor
            if len(self._files) > OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            return os.pread(descriptor, size, offset), None
        try:  # what came of it may be replaced by the whole: not kept open
            return os.pread(descriptor, size, offset), fault
        finally:
            os.close(descriptor)

    def _close(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))

    def _close_removed(self) -> None:
        """Closes files that the cache removed: the disk has their room only then."""
        for shard in [s for s, descriptor in self._files.items() if os.fstat(descriptor).st_nlink == 0]:
            self._close(shard)

    def _length_fault(self, shard: int, what: str) -> str:
        size, listed = os.fstat(self._files[shard]).st_size, self.shards[shard]["bytes"]
        return f"{what} holds {size} bytes, but index.json says {listed}: it was cut short or changed"


def header_fault(header: bytes, size: int, key: str, links: Sequence[str] = ()) -> str | None:
    """What is wrong with the 512 bytes before a member, which should be the tar header of ``size`` bytes of ``key``.

    ``links`` are names that it may have instead.
    """
    if header.startswith(f"{key}.".encode()) and header[124:135] == b"%011o" % size and header[257:262] == b"ustar":
        return None  # the usual one, without the 20 microseconds of the rest
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"no tar header is there ({error})"
    if found.size != size:
        return f"its header says {found.size} bytes, but index.json {size}"
    clear = all(name.isascii() and len(name) <= SHORT_KEY for name in (key, *links))
    if clear and found.name not in links and not found.name.startswith(f"{key}."):
        return f"its header is that of {found.name!r}, not of {key!r}"
    return None
