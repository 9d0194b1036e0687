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
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

from jepa_kit.data.sources.files import hidden

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class Member(NamedTuple):
    """A file in a tar archive: its path, and where its bytes are."""

    name: str
    offset: int
    size: int


class TarReader:
    """Members of an uncompressed tar file, by offset and size."""

    def __init__(self, path: str, members: Sequence[Member]) -> None:
        self.path, self.places = path, [(m.offset, m.size) for m in members]

    def __call__(self, i: int) -> bytes:
        offset, size = self.places[i]
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)


class ZipReader:
    """Members of a zip file; each process opens it once."""

    def __init__(self, path: str, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self._owner = -1
        self._file: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "names": self.names, "_owner": -1, "_file": None}

    def __call__(self, i: int) -> bytes:
        # a file position is shared by forked processes, so a handle serves its own process alone
        if self._file is None or self._owner != os.getpid():
            self._owner, self._file = os.getpid(), zipfile.ZipFile(self.path)
        try:
            return self._file.read(self.names[i])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise OSError(str(error)) from error


def zip_files(path: str) -> tuple[list[str], list[int]]:
    """Names, sorted, and sizes of the files in a zip archive.

    Raises:
        ValueError: it is broken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted((e.filename, e.file_size) for e in archive.infolist() if not e.is_dir())
    except zipfile.BadZipFile as error:
        raise ValueError(f"source (={path!r}) is not a whole zip archive: {error}") from error
    found = [(name, size) for name, size in found if not hidden(name)]
    return [name for name, _ in found], [size for _, size in found]


def plain_tar(path: str, scratch: str) -> str:
    """The path itself, or of a .tar.gz the plain tar in ``scratch``, which is made, or is there from a run before.

    Raises:
        ValueError: the archive is broken.
    """
    if path.endswith(".tar"):
        return path
    status = os.stat(path)
    plain = os.path.join(scratch, f".unpacked.{status.st_size:x}.{status.st_mtime_ns:x}.tar")
    if not os.path.exists(plain):
        partial = f"{plain}.partial"
        try:
            with gzip.open(path, "rb") as packed, open(partial, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"source (={path!r}) is not a whole tar archive: {error}") from error
        os.replace(partial, plain)
    return plain


def tar_files(plain: str, path: str) -> tuple[list[Member], bool]:
    """The files of a plain tar, sorted by name; those of tars inside it, if it holds nothing else.

    Args:
        plain: the tar to read.
        path: what a message calls it.

    Returns:
        The members, and whether they are those of inner tars: the first folder of their names is then the tar's name.

    Raises:
        ValueError: the archive, or one inside it, is broken, or it holds shards or classes beside images.
    """
    with open(plain, "rb") as stream:
        try:
            members = list(_members(stream, 0))
        except tarfile.TarError as error:
            raise ValueError(f"source (={path!r}) is not a whole tar archive: {error}") from error
        if any(m.name.endswith(".cls") for m in members):
            raise ValueError(f"source (={path!r}) holds .cls files, as WebDataset shards do: give wds:{path}")
        if not members or not all(m.name.endswith(".tar") for m in members):
            return sorted(members), False
        inside = []
        for outer in members:
            folder = outer.name.removesuffix(".tar")
            try:
                found = list(_members(stream, outer.offset))
            except tarfile.TarError as error:
                raise ValueError(f"{outer.name} in source (={path!r}) is not a whole tar archive: {error}") from error
            if any(m.offset + m.size > outer.offset + outer.size for m in found):
                raise ValueError(f"{outer.name} in source (={path!r}) is not a whole tar archive: it is cut short")
            inside += [Member(f"{folder}/{m.name}", m.offset, m.size) for m in found]
    return sorted(inside), True


def _members(stream: IO[bytes], start: int) -> Iterator[Member]:
    """Files of the tar that begins at ``start``; hidden ones are passed over."""
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            name = re.sub(r"^(\./)+", "", member.name)
            if member.isreg() and not hidden(name):
                yield Member(name, member.offset_data, member.size)
            tar.members = []  # type: ignore[attr-defined]  # else every header of a large archive stays in memory
        # tarfile takes whatever is no header for the end
        stream.seek(tar.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark, so it was cut short")
        if end.count(0) < len(end):
            raise tarfile.ReadError(f"bad header at byte {tar.offset - start}")
