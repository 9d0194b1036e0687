"""Read members of local and remote tar shards.

A local shard is read with ``pread``; a remote one is downloaded to the cache first. The tar header of a member is read
and checked with it, so that a changed or shifted shard is an error.
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jepa_kit.data.remote.cache import RemoteShard, ShardCache
from jepa_kit.data.remote.fetch import is_remote
from jepa_kit.data.shards.parts import Part
from jepa_kit.errors import SampleError

OPEN_SHARDS = 128
"""Open shards per process, at most."""

HEADER = tarfile.BLOCKSIZE
SHORT_KEY = 80
"""Characters; a longer key may be cut in a tar header."""


class ShardFile(NamedTuple):
    """Where a file of a sample is in the shards; ``key`` is that of the sample, the others as ``ShardReader.read``."""

    reader: ShardReader
    shard: int
    offset: int
    size: int
    key: str

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
            SampleError: they are unavailable; see ``ShardReader.read``.
        """
        return self.reader.read(self.shard, self.offset, self.size, self.key)


class ShardReader:
    """Read members of shards by shard, offset and size.

    Cheap to pickle, and safe in forked or spawned processes: each opens shards when it reads them.

    Args:
        path: of the data set, for messages.
        parts: of the data set.
        cache: for remote shards; None if there are none.

    Attributes:
        shards: their entries in the index.
        places: path or URL of each.
        links: key -> other names that the headers of its members may have, if these are links.
        listed: for each, the function that reads samples by number, if these are in no shard; else None.
    """

    def __init__(self, path: str, parts: Sequence[Part], cache: ShardCache | None) -> None:
        self.path, self.cache = path, cache
        self.shards = [entry for part in parts for entry in part.shards]
        self.places = [place for part in parts for place in part.places]
        self.links = {key: names for part in parts for key, names in part.links.items()}
        self.listed = [part.read for part in parts for _ in part.shards]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python exits, `os` may be None
        for descriptor in self.__dict__.get("_files", {}).values():
            close(descriptor)

    def read(self, shard: int, offset: int, size: int, key: str) -> bytes:
        """Return the bytes of a member.

        Args:
            shard: its number.
            offset, size: of the member's bytes in the shard; for samples in no shard, their number and size.
            key: of its sample.

        Raises:
            SampleError: the shard is missing, cannot be read, is cut short, or has another member there.
            CacheError: the cache cannot be written to.
        """
        if read := self.listed[shard]:
            return read(offset)
        what = f"shard {self.shards[shard]['file']} of {self.path}"
        for again in (True, False):  # a second try for a stale file handle, or a cached shard that was just removed
            try:
                block, fault = self._read(shard, offset - HEADER, size + HEADER)
                break
            except OSError as error:
                self._close(shard)
                if not again:
                    missing = isinstance(error, FileNotFoundError)
                    reason = "is missing, but index.json lists it" if missing else f"cannot be read: {error}"
                    raise SampleError(f"{what} {reason}") from error
        if len(block) < size + HEADER:
            if fault is None:
                found, listed = os.fstat(self._files[shard]).st_size, self.shards[shard]["bytes"]
                fault = f"{what} has {found} bytes, but index.json says {listed}: it was cut short or changed"
            raise SampleError(fault)
        if wrong := header_fault(block[:HEADER], size, key, self.links.get(key, ())):
            raise SampleError(f"{what} is corrupt at byte {offset - HEADER}, or was changed: {wrong}")
        return block[HEADER:]

    def fetch(self, shard: int) -> None:
        """Download a remote shard, unless it is cached; a failed download is reported when the shard is read."""
        assert self.cache is not None
        self.cache.get(self._remote(shard))

    def _remote(self, shard: int) -> RemoteShard:
        entry = self.shards[shard]
        return RemoteShard(self.places[shard], entry["bytes"], entry["sha256"])

    def _read(self, shard: int, offset: int, size: int) -> tuple[bytes, str | None]:
        """Return bytes of a shard, fewer at its end; and why a remote shard is incomplete, or None."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return os.pread(self._files[shard], size, offset), None
        path, fault = self.places[shard], None
        if is_remote(path):
            assert self.cache is not None
            # close files that the cache removed, which frees their disk space
            for removed in [s for s, descriptor in self._files.items() if os.fstat(descriptor).st_nlink == 0]:
                self._close(removed)
            path, fault = self.cache.get(self._remote(shard))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        if len(self._files) > OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        try:
            return os.pread(descriptor, size, offset), fault
        finally:
            if fault is not None:  # an incomplete shard is not kept open: a complete one may replace it
                self._close(shard)

    def _close(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))


def header_fault(header: bytes, size: int, key: str, links: Sequence[str] = ()) -> str | None:
    """Return what is wrong with the tar header of a member, or None.

    Args:
        header: the 512 bytes before the member.
        size: of the member in bytes.
        key: of its sample.
        links: other names that it may have.
    """
    if header.startswith(f"{key}.".encode()) and header[124:135] == b"%011o" % size and header[257:262] == b"ustar":
        return None  # the usual case; parsing the header would take 20 microseconds
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
