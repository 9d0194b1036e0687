"""Where shards come from: image files in folders or archives, and synthetic scenes.

A source lists its samples in an order that does not depend on the machine, and makes any of them by number, so that
several processes can write different shards at once.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from jepa_kit.data.images import DECODE_ERRORS, KEPT_FORMATS, encode_png, open_image, to_rgb
from jepa_kit.data.scenes import CLASSES, render
from jepa_kit.data.shard_writing import Sample

LabelFrom = Literal["auto", "parent", "top", "none"]
LABEL_FROM: tuple[LabelFrom, ...] = ("auto", "parent", "top", "none")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class Refused(Exception):
    """A sample that cannot go into a shard; the text is the reason."""


class Source(Protocol):
    """Samples by number, and the classes of their labels."""

    classes: dict[str, tuple[str, ...]]

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a report calls sample i."""

    def sample(self, i: int) -> Sample:
        """Makes sample i.

        Raises:
            Refused: it cannot be made.
        """


class Scenes:
    """``synthetic:scenes``: scenes 0 to num_scenes - 1 of a seed, as PNG, with three labels.

    Args:
        num_scenes: how many.
        size: (height, width) in pixels.
        seed: of the series.
    """

    def __init__(self, *, num_scenes: int, size: tuple[int, int], seed: int) -> None:
        if num_scenes < 1:
            raise ValueError(f"num_scenes (={num_scenes}) must be at least 1")
        render(seed, 0, size)  # so that a wrong size or seed is reported here and not by a worker
        self.num_scenes, self.size, self.seed = num_scenes, size, seed
        self.classes = CLASSES

    def __len__(self) -> int:
        return self.num_scenes

    def name(self, i: int) -> str:
        return f"scene-{self.seed}-{i:08d}"

    def sample(self, i: int) -> Sample:
        scene = render(self.seed, i, self.size)
        return Sample(self.name(i), "png", encode_png(Image.fromarray(scene.image)), scene.labels)


class Files:
    """Image files by name. JPEG and PNG keep their bytes; what else Pillow reads becomes an RGB PNG.

    Args:
        names: paths inside the source, with forward slashes; sorted by the caller.
        read: number -> bytes of the file.
        label_from: ``parent`` takes the folder that holds the file, ``top`` the first folder of its path, ``none``
            leaves out labels; ``auto`` is ``parent`` where files lie in more than one folder, else ``none``.

    Raises:
        ValueError: ``parent`` or ``top`` where every file lies at the top.
    """

    def __init__(self, names: Sequence[str], read: Callable[[int], bytes], label_from: LabelFrom = "auto") -> None:
        self.names, self._read = names, read
        folders = [os.path.dirname(name) for name in names]
        if label_from == "auto":
            label_from = "parent" if len(set(folders)) > 1 else "none"
        wanted: list[str] = []
        if label_from != "none":
            wanted = [folder.split("/")[0 if label_from == "top" else -1] for folder in folders]
        found = sorted(set(wanted) - {""})
        if label_from != "none" and not found:
            raise ValueError(f"label_from (={label_from!r}) must be 'none': every file lies at the top of the source")
        self.classes: dict[str, tuple[str, ...]] = {"class": tuple(found)} if found else {}
        number = {name: k for k, name in enumerate(found)}
        self._labels = [number.get(name, -1) for name in wanted]
        self._keys = unique_keys(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i].encode("utf-8", "replace").decode()  # a file name need not be text

    def sample(self, i: int) -> Sample:
        """Decodes image i, so that one that cannot be read is refused now and not in a training run."""
        if self._labels and self._labels[i] < 0:
            raise Refused("lies outside every class folder")
        try:
            data = self._read(i)
            if not data:
                raise Refused("empty file")
            image = open_image(data)
            pixels = to_rgb(image)  # what reading the shard will do, so that nothing fails then that did not fail now
            extension = KEPT_FORMATS.get(image.format or "")
            if extension is None:
                extension, data = "png", encode_png(pixels)
        except (*DECODE_ERRORS, zipfile.BadZipFile, RuntimeError) as error:  # zipfile: RuntimeError for a password
            raise Refused(f"not a decodable image: {error or type(error).__name__}") from error
        labels = {"class": self._labels[i]} if self._labels else {}
        return Sample(self._keys[i], extension, data, labels)


def unique_keys(names: Sequence[str]) -> list[str]:
    """WebDataset keys: paths without extension, with no dot in the last part, each once."""
    keys, taken = [], set()
    for name in names:
        folder, slash, base = name.encode("utf-8", "replace").decode().rpartition("/")
        stem = os.path.splitext(base)[0].replace(".", "_")
        # members whose path begins with __x__ are metadata to WebDataset
        key = re.sub(r"^__", "_", f"{folder}{slash}{stem}")
        candidate, k = key, 1
        while candidate in taken:
            candidate, k = f"{key}_{k}", k + 1
        taken.add(candidate)
        keys.append(candidate)
    return keys


class _FolderReader:
    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __call__(self, i: int) -> bytes:
        return Path(self.root, self.names[i]).read_bytes()


class _TarReader:
    """Members of an uncompressed tar file, by offset and size."""

    def __init__(self, path: str, places: Sequence[tuple[int, int]]) -> None:
        self.path, self.places = path, places

    def __call__(self, i: int) -> bytes:
        offset, size = self.places[i]
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)


class _ZipReader:
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
        return self._file.read(self.names[i])


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_files(path: str, *, label_from: LabelFrom, scratch: str) -> Files:
    """A folder or an archive of images. Hidden files and folders are passed over.

    Args:
        path: a folder, or a .tar, .tar.gz, .tgz or .zip file.
        label_from: see ``Files``.
        scratch: a path for the plain tar that a compressed one is unpacked to; the caller removes it.

    Raises:
        ValueError: there is nothing there, it is no archive that is known, or it is broken or empty.
    """
    if os.path.isdir(path):
        names = sorted(
            Path(folder, file).relative_to(path).as_posix() for folder, _, files in os.walk(path) for file in files
        )
        names = [name for name in names if not _hidden(name)]
        read: Callable[[int], bytes] = _FolderReader(path, names)
    elif not os.path.exists(path):
        raise ValueError(f"source (={path!r}) does not exist")
    elif path.endswith(".zip"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(e.filename for e in archive.infolist() if not e.is_dir() and not _hidden(e.filename))
        except zipfile.BadZipFile as error:
            raise ValueError(f"source (={path!r}) is not a whole zip archive: {error}") from error
        read = _ZipReader(path, names)
    elif path.endswith(ARCHIVES):
        names, read = _open_tar(path, scratch)
    else:
        raise ValueError(f"source (={path!r}) must be a folder, a {', '.join(ARCHIVES)} archive, or synthetic:scenes")
    if not names:
        raise ValueError(f"source (={path!r}) holds no files")
    return Files(names, read, label_from)


def _open_tar(path: str, scratch: str) -> tuple[list[str], _TarReader]:
    plain = path
    try:
        if not path.endswith(".tar"):
            with gzip.open(path, "rb") as packed, open(scratch, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            plain = scratch
        with tarfile.open(plain, "r:") as tar:
            members = sorted(
                (re.sub(r"^(\./)+", "", m.name), m.offset_data, m.size)
                for m in tar
                if m.isreg() and not _hidden(re.sub(r"^(\./)+", "", m.name))
            )
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"source (={path!r}) is not a whole tar archive: {error}") from error
    return [name for name, _, _ in members], _TarReader(plain, [(offset, size) for _, offset, size in members])
