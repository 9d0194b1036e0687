"""What tar files may contain besides plain files: links, sparse files, compression, headers for the whole archive."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Mapping
from typing import IO, Any, Protocol

BLOCK = tarfile.BLOCKSIZE
MOST_LINKS = 40
"""Links that lead on to links, at most: what Linux allows."""
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on damaged headers: the last three on those of pax, also where thousands follow one another."""
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
"""Names of compressed tar files."""
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Target(Protocol):
    """A link: ``path`` is the normalised path that it leads to."""

    @property
    def path(self) -> str: ...


def compression(start: bytes) -> str | None:
    """Return the name of the compression that a file's first 512 bytes are of, or None, as for a tar header."""
    if start[257:262] == b"ustar":  # whatever its first member is called
        return None
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def compressed_shard(path: str, how: str) -> ValueError:
    """Return the error for a shard that is compressed."""
    return ValueError(
        f"shard {path} is compressed ({how}), but samples are read at their offsets: decompress it first, as "
        "`gunzip FILE.tar.gz` does, or let a command do it: data.shards='pipe:gunzip -c FILE.tar.gz'"
    )


def target_of(link: tarfile.TarInfo) -> str:
    """Return the normalised path that a link leads to: a symbolic one from its own folder, a hard one from the root."""
    folder = os.path.dirname(link.name) if link.issym() else ""
    return os.path.normpath(os.path.join(folder, link.linkname))


def follow(path: str, links: Mapping[str, Target]) -> str:
    """Return where a path leads through links, by normalised paths; of a loop of links, one of them."""
    for _ in range(MOST_LINKS):
        if path not in links:
            break
        path = links[path].path
    return path


def stored_size(member: tarfile.TarInfo) -> int:
    """Return the bytes of a member's data in the archive: none for links, fewer than its size for a sparse file."""
    if member.issparse():
        return sum(count for _, count in pieces(member))
    return member.size if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES else 0


def pieces(member: tarfile.TarInfo) -> tuple[tuple[int, int], ...]:
    """Return (place, size) of the stretches of a sparse file that are in the archive, one behind another."""
    found: Any = member.sparse
    return tuple((int(place), int(count)) for place, count in found or ())


def is_filler(stream: IO[bytes], begin: int, end: int) -> bool:
    """Return whether a stretch of a tar file has only zeros and pax headers that are for the whole archive."""
    stream.seek(begin)
    while begin < end:
        block = stream.read(min(BLOCK, end - begin))
        if not block:
            return False
        begin += len(block)
        if block.count(0) == len(block):
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        if header.type != tarfile.XGLTYPE:
            return False
        begin += -(-header.size // BLOCK) * BLOCK
        stream.seek(begin)
    return True
