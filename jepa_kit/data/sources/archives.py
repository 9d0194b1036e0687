"""Archives of image files: .zip, .tar, .tar.gz, and a tar of tars, as ImageNet-1k's train archive is one.

Nothing is unpacked, but for a .tar.gz, which cannot be read from its middle: it becomes a plain tar for the time of the
run. A file is read from its place in the archive; those of an inner tar have theirs in the outer one.
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
from typing import IO, NamedTuple

from jepa_kit.data.shards.tars import BLOCK, TAR_ERRORS, compression, follow, pieces, target_of
from jepa_kit.data.sources.files import hidden
from jepa_kit.files import atomic_write

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class Member(NamedTuple):
    """A file in a tar archive: its path, and where its bytes are; or why it cannot be read.

    ``pieces`` are (place, size) of the stretches of a sparse file that are stored, one behind another; else None.
    """

    name: str
    offset: int
    size: int
    lost: str = ""
    pieces: tuple[tuple[int, int], ...] | None = None

    @property
    def stored(self) -> int:
        """Bytes in the archive."""
        return self.size if self.pieces is None else sum(count for _, count in self.pieces)


class _Link(NamedTuple):
    """A link in a tar archive: the path that it leads to, and that as it is written."""

    name: str
    path: str
    written: str


class TarReader:
    """Members of an uncompressed tar file, by offset and size."""

    def __init__(self, path: str, members: Sequence[Member]) -> None:
        self.path, self.places = path, [m._replace(name="") for m in members]

    def __call__(self, i: int) -> bytes:
        member = self.places[i]
        if member.lost:
            raise OSError(member.lost)
        with open(self.path, "rb") as stream:
            stream.seek(member.offset)
            if member.pieces is None:
                return stream.read(member.size)
            data = bytearray(member.size)
            for place, count in member.pieces:
                data[place : place + count] = stream.read(count)
            return bytes(data)


class ZipReader:
    """Members of a zip file, by their places in its list (two may have one name); each process opens it once."""

    def __init__(self, path: str, places: Sequence[int]) -> None:
        self.path, self.places = path, places
        self._owner = -1
        self._file: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "places": self.places, "_owner": -1, "_file": None}

    def __call__(self, i: int) -> bytes:
        # a file position is shared by forked processes, so a handle serves its own process alone
        if self._file is None or self._owner != os.getpid():
            self._owner, self._file = os.getpid(), zipfile.ZipFile(self.path)
        try:
            return self._file.read(self._file.infolist()[self.places[i]])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise OSError(str(error)) from error


def zip_files(path: str) -> tuple[list[str], list[int], list[int], int]:
    """Of the files in a zip archive, sorted by name: names, sizes, places in its list; and how many hidden there are.

    Raises:
        ValueError: it is broken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # some writers on Windows separate folders by backslashes, which the format does not allow
            named = [(e.filename.replace("\\", "/"), k, e.file_size) for k, e in enumerate(archive.infolist())]
            every = sorted(entry for entry in named if not entry[0].endswith("/"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"source (={path!r}) is not a whole zip archive: {error}") from error
    found = [entry for entry in every if not hidden(entry[0])]
    return [e[0] for e in found], [e[2] for e in found], [e[1] for e in found], len(every) - len(found)


def plain_tar(path: str, scratch: str) -> str:
    """The path itself, or of a gzip file the plain tar in ``scratch``, which is made, or is there from a run before.

    Raises:
        ValueError: the archive is broken.
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
            raise ValueError(f"source (={path!r}) is not a whole tar archive: {error}") from error
    return plain


def tar_files(plain: str, path: str) -> tuple[list[Member], int, bool]:
    """The files of a plain tar, sorted by name; those of tars inside it, if it holds nothing else.

    Args:
        plain: the tar to read.
        path: what a message calls it.

    Returns:
        The members; how many hidden ones are passed over; and whether they are those of inner tars: the first folder of
        their names is then the tar's name.

    Raises:
        ValueError: the archive, or one inside it, is broken, or it holds shards or classes beside images.
    """
    with open(plain, "rb") as stream:
        try:
            members, passed = _members(stream, 0)
        except TAR_ERRORS as error:
            raise ValueError(f"source (={path!r}) is not a whole tar archive: {error}") from error
        if any(m.name.endswith(".cls") for m in members):
            raise ValueError(f"source (={path!r}) holds .cls files, as WebDataset shards do: give wds:{path}")
        if not members or not all(m.name.endswith(".tar") and not m.lost for m in members):
            return sorted(members), passed, False
        inside = []
        for outer in members:
            folder = outer.name.removesuffix(".tar")
            try:
                found, more = _members(stream, outer.offset)
            except TAR_ERRORS as error:
                raise ValueError(f"{outer.name} in source (={path!r}) is not a whole tar archive: {error}") from error
            if any(m.offset + m.stored > outer.offset + outer.size for m in found):
                raise ValueError(f"{outer.name} in source (={path!r}) is not a whole tar archive: it is cut short")
            inside += [m._replace(name=f"{folder}/{m.name}") for m in found]
            passed += more
    return sorted(inside), passed, True


def _members(stream: IO[bytes], start: int) -> tuple[list[Member], int]:
    """Files of the tar that begins at ``start``, and what links in it lead to; and how many hidden ones are left out.

    A second name of a file is stored as a hard link to the first.
    """
    every: list[Member] = []
    links: dict[str, _Link] = {}
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            name = re.sub(r"^(\./)+", "", member.name)
            if member.isreg():
                stretches = pieces(member) if member.issparse() else None
                every.append(Member(name, member.offset_data, member.size, pieces=stretches))
            elif member.islnk() or member.issym():
                links[os.path.normpath(name)] = _Link(name, target_of(member), member.linkname)
            elif not member.isdir():
                every.append(Member(name, -1, 0, "a device, a pipe or a member of unknown type, not a file"))
            tar.members = []  # type: ignore[attr-defined]  # else every header of a large archive stays in memory
        # tarfile takes whatever is no header for the end
        stream.seek(tar.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark, so it was cut short")
        if end.count(0) < len(end):
            raise tarfile.ReadError(f"bad header at byte {tar.offset - start}")
    files = {os.path.normpath(member.name): member for member in every} if links else {}
    for name, path, written in links.values():
        found = files.get(follow(path, links))
        lost = f"a link to {written!r}, which is no file of the archive"
        every.append(found._replace(name=name) if found else Member(name, -1, 0, lost))
    if not any("/" in member.name for member in every):  # as some writers on Windows leave their paths
        every = [member._replace(name=member.name.replace("\\", "/")) for member in every]
    members = [member for member in every if not hidden(member.name)]
    return members, len(every) - len(members)
