"""Archives of image files: .zip, .tar, .tar.gz, and a tar of tars such as ImageNet-1k's train archive.

Files are read at their place in the archive, those of an inner tar at their place in the outer one. Only a .tar.gz,
which has no random access, is decompressed: to a plain tar that is removed after the run.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import IO, NamedTuple

from jepa_kit.data.shards.tars import BLOCK, HEADER_ERRORS, Link, compression, follow, read_link, sparse_parts
from jepa_kit.data.sources.files import Listing, hidden
from jepa_kit.files import atomic_write

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class Member(NamedTuple):
    """A file in a tar archive.

    Attributes:
        name: its path.
        offset: of its bytes in the archive.
        size: of the file in bytes.
        fault: why it cannot be read, or empty.
        pieces: (offset in the file, size) of the stored parts of a sparse file, one after another; else None.
    """

    name: str
    offset: int
    size: int
    fault: str = ""
    pieces: tuple[tuple[int, int], ...] | None = None


def _read_member(path: str, members: Sequence[Member], i: int) -> bytes:
    """Return the content of a member of an uncompressed tar file."""
    member = members[i]
    if member.fault:
        raise OSError(member.fault)
    data = bytearray(member.size)
    with open(path, "rb") as stream:
        stream.seek(member.offset)
        for offset, count in ((0, member.size),) if member.pieces is None else member.pieces:
            data[offset : offset + count] = stream.read(count)
    return bytes(data)


@lru_cache(maxsize=8)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    """Open a zip file once in each process: forked processes share the position of an open file."""
    return zipfile.ZipFile(path)


def _read_zip(path: str, indices: Sequence[int], i: int) -> bytes:
    """Return the content of a member of a zip file by its index in the file's list, since two may have one name."""
    archive = _open_zip(path, os.getpid())
    try:
        return archive.read(archive.infolist()[indices[i]])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise OSError(str(error)) from error


def zip_files(path: str) -> Listing:
    """List the files in a zip archive.

    Raises:
        ValueError: it is damaged.
    """
    _open_zip.cache_clear()  # the file may be another one now
    try:
        with zipfile.ZipFile(path) as archive:
            # some writers on Windows separate folders by backslashes, which the format does not allow
            named = [(e.filename.replace("\\", "/"), k, e.file_size) for k, e in enumerate(archive.infolist())]
            every = sorted(entry for entry in named if not entry[0].endswith("/"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"source (={path!r}) is not a complete zip archive: {error}") from error
    found = [entry for entry in every if not hidden(entry[0])]
    read = partial(_read_zip, path, [e[1] for e in found])
    return Listing([e[0] for e in found], [e[2] for e in found], read, len(every) - len(found))


def plain_tar(path: str, scratch: str) -> str:
    """Return the path of an uncompressed tar: the given one, or the one that is made from a gzip file.

    Args:
        path: of the archive.
        scratch: folder for the uncompressed tar; one that an earlier run left there is used again.

    Raises:
        ValueError: the archive is damaged.
    """
    with open(path, "rb") as stream:
        how = compression(stream.read(BLOCK))
    if how is None:
        return path
    if how != "gzip":
        raise ValueError(f"source (={path!r}) is compressed by {how}: decompress it first, or use gzip")
    status = os.stat(path)
    plain = os.path.join(scratch, f".unpacked.{status.st_size:x}.{status.st_mtime_ns:x}.tar")
    if not os.path.exists(plain):
        try:
            with atomic_write(plain) as part, gzip.open(path, "rb") as packed, part.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"source (={path!r}) is not a complete tar archive: {error}") from error
    return plain


def tar_files(path: str, scratch: str) -> Listing:
    """List the files of a tar archive, or those of the tars inside it, if it contains nothing else.

    Args:
        path: of the archive.
        scratch: see ``plain_tar``.

    Raises:
        ValueError: the archive, or one inside it, is damaged, or it contains shards.
    """
    plain = plain_tar(path, scratch)
    with open(plain, "rb") as stream:
        try:
            members, num_hidden = _list_members(stream, 0)
        except HEADER_ERRORS as error:
            raise ValueError(f"source (={path!r}) is not a complete tar archive: {error}") from error
        if any(m.name.endswith(".cls") for m in members):
            raise ValueError(f"source (={path!r}) contains .cls files, as WebDataset shards do: give wds:{path}")
        of_tars = bool(members) and all(m.name.endswith(".tar") and not m.fault for m in members)
        if of_tars:
            inside = []
            for outer in members:
                try:
                    found, more = _list_members(stream, outer.offset)
                    stored = [m.size if m.pieces is None else sum(count for _, count in m.pieces) for m in found]
                    if any(m.offset + n > outer.offset + outer.size for m, n in zip(found, stored, strict=True)):
                        raise tarfile.ReadError("it is cut short")
                except HEADER_ERRORS as error:
                    what = f"{outer.name} in source (={path!r})"
                    raise ValueError(f"{what} is not a complete tar archive: {error}") from error
                inside += [m._replace(name=f"{outer.name.removesuffix('.tar')}/{m.name}") for m in found]
                num_hidden += more
            members = inside
    members.sort()
    nameless = [m._replace(name="") for m in members]  # half the memory, and what is sent to workers
    read = partial(_read_member, plain, nameless)
    return Listing([m.name for m in members], [m.size for m in members], read, num_hidden, of_tars)


def _list_members(stream: IO[bytes], start: int) -> tuple[list[Member], int]:
    """Return the files of the tar that begins at ``start``, links resolved, and the number of hidden ones.

    Raises:
        HEADER_ERRORS: the tar is damaged.
    """
    every: list[Member] = []
    links: dict[str, Link] = {}
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            name = re.sub(r"^(\./)+", "", member.name)
            if member.isreg():
                stretches = sparse_parts(member) if member.issparse() else None
                every.append(Member(name, member.offset_data, member.size, pieces=stretches))
            elif member.islnk() or member.issym():
                links[os.path.normpath(name)] = read_link(member, name)
            elif not member.isdir():
                every.append(Member(name, -1, 0, "a device, a pipe or a member of unknown type, not a file"))
            tar.members = []  # type: ignore[attr-defined]  # else every header of a large archive stays in memory
        # tarfile stops silently at anything that is no header
        stream.seek(tar.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark, so it was cut short")
        if end.count(0) < len(end):
            raise tarfile.ReadError(f"bad header at byte {tar.offset - start}")
    files = {os.path.normpath(member.name): member for member in every} if links else {}
    for name, path, written in links.values():
        found = files.get(follow(path, links))
        fault = f"a link to {written!r}, which is no file of the archive"
        every.append(found._replace(name=name) if found else Member(name, -1, 0, fault))
    if not any("/" in member.name for member in every):  # some writers on Windows separate folders by backslashes
        every = [member._replace(name=member.name.replace("\\", "/")) for member in every]
    members = [member for member in every if not hidden(member.name)]
    return members, len(every) - len(members)
