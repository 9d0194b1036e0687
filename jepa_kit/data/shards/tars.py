"""Tar files: compression, links, sparse files, and headers that are for the whole archive."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_LINKS = 40
"""Links that are followed from one to the next, as in Linux."""
HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on damaged headers; the last three are of pax headers (RecursionError: thousands in a row)."""
STREAM_ERRORS = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)
"""What tarfile raises on a damaged archive that may be compressed."""
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
"""Names of compressed tar files."""
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Refusal(NamedTuple):
    """Something that does not become part of a shard or of its index: its name and the reason."""

    name: str
    reason: str


class Link(NamedTuple):
    """A link in a tar file: its own name, the normalised path of its target, and the target as written."""

    name: str
    path: str
    written: str


def read_link(member: tarfile.TarInfo, name: str) -> Link:
    """Return a link; the target of a symbolic link is relative to its folder, that of a hard link to the root."""
    folder = os.path.dirname(member.name) if member.issym() else ""
    return Link(name, os.path.normpath(os.path.join(folder, member.linkname)), member.linkname)


def follow(path: str, links: Mapping[str, Link]) -> str:
    """Return the path at the end of a chain of links (normalised path -> link); of a loop, one of its links."""
    for _ in range(MAX_LINKS):
        if path not in links:
            break
        path = links[path].path
    return path


def compression(start: bytes) -> str | None:
    """Return the compression of a file, given its first 512 bytes; None for a tar header or anything unknown."""
    if start[257:262] == b"ustar":  # a tar header, even if the name of its first member looks like a magic number
        return None
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def compressed_shard(path: str, how: str) -> ValueError:
    """Return the error for a compressed shard."""
    return ValueError(
        f"shard {path} is compressed ({how}), but samples are read at their offsets: decompress it first with "
        "`gunzip FILE.tar.gz`, or while reading with data.shards='pipe:gunzip -c FILE.tar.gz'"
    )


def stored_size(member: tarfile.TarInfo) -> int:
    """Return the bytes of a member's data in the archive: 0 for links, less than its size for a sparse file."""
    if member.issparse():
        return sum(count for _, count in sparse_parts(member))
    # tarfile takes a member of an unknown type for a regular file
    return member.size if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES else 0


def sparse_parts(member: tarfile.TarInfo) -> tuple[tuple[int, int], ...]:
    """Return (offset in the file, size) of the parts of a sparse file that the archive stores, one after another."""
    found: Any = member.sparse
    return tuple((int(offset), int(count)) for offset, count in found or ())


def is_filler(stream: IO[bytes], begin: int, end: int) -> bool:
    """Return whether a range of a tar file has only zeros and pax headers for the whole archive.

    These may come between members and at the end; any other byte that tarfile skips is damage.
    """
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
        begin += -(-header.size // BLOCK) * BLOCK  # its content, in whole blocks
        stream.seek(begin)
    return True


def read_files(path: str, mode: str, names: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """Return base name -> content of the files in a tar archive, of all or of those with the given base names.

    Args:
        path: of the archive.
        mode: of `tarfile.open`.
        names: base names; None for all files.

    Raises:
        STREAM_ERRORS: the archive is damaged.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for member in tar:
            base = os.path.basename(member.name)
            stream = tar.extractfile(member) if member.isreg() and (names is None or base in names) else None
            if stream is not None:
                found[base] = stream.read()
    return found
