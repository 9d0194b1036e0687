"""Image files: a folder of them, or a table (.csv, .tsv) of their paths and labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.sources.base import Recode, Refused, fingerprint, unique_keys, whole
from jepa_kit.data.sources.labels import Labels, read_table, table_column, table_labels

READ_ERRORS = (OSError, RuntimeError)
"""Of a file that is gone, locked or damaged; zipfile has RuntimeError for a member with a password."""
Read = Callable[[int], bytes]


class Files:
    """Files by name. JPEG and PNG keep their bytes, if nothing else is asked for; what else Pillow reads becomes a PNG.

    Args:
        names: paths inside the source, with forward slashes; sorted by the caller.
        read: number -> bytes of the file.
        labels: of the files.
        recode: what happens to the images.
        sizes: of the files in bytes, if they are known: a changed file then makes another source.
        notes: what the user should know about what was found.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Read,
        *,
        labels: Labels,
        recode: Recode,
        sizes: Sequence[int] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.names, self.labels, self.recode, self.sizes = names, labels, recode, sizes
        self.read = read
        self._keys = unique_keys(names)
        self.classes = labels.classes
        self.mask_classes: tuple[str, ...] = ()
        self.splits, self.mixed, self.notes = whole(len(names)), False, [*notes, *labels.notes]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i].encode("utf-8", "replace").decode()  # a file name need not be text

    def sample(self, i: int) -> Sample:
        labels = self.labels.of(i)
        if self.labels.missing is not None and len(labels) < len(self.labels.values):
            raise Refused(self.labels.missing)
        try:
            data = self.read(i)
        except READ_ERRORS as error:
            raise Refused(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return self.recode.sample(self._keys[i], data, labels)

    def fingerprint(self) -> str:
        labels = [self.classes, *(numbers.tolist() for numbers in self.labels.values.values())]
        return fingerprint([*self.names, *self.sizes, *labels])


class FolderReader:
    """Files of a folder."""

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __call__(self, i: int) -> bytes:
        path = Path(self.root, self.names[i])
        if path.exists() and not path.is_file():
            raise OSError("it is a folder, a pipe or a device, not a file")  # a pipe would be waited for without end
        return path.read_bytes()


def hidden(name: str) -> bool:
    """Whether a path has a part that systems hide, or the folder that one of them adds to every archive."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/"))


def folder_files(path: str) -> tuple[list[str], list[int], int]:
    """Names, sorted, and sizes of the files under a folder, links followed; and how many hidden ones are passed over.

    Raises:
        ValueError: nothing but tar files, which may be shards, or ImageNet's classes.
    """
    names = sorted(Path(folder, file).relative_to(path).as_posix() for folder, files in _walk(path) for file in files)
    found = [(name, _size(os.path.join(path, name))) for name in names if not hidden(name)]
    if found and all(name.endswith(".tar") for name, _ in found):
        raise ValueError(
            f"source (={path!r}) holds nothing but tar files: if they are WebDataset shards, give wds:{path}; if "
            "each is a class, as in ImageNet's train archive, give that archive"
        )
    return [name for name, _ in found], [size for _, size in found], len(names) - len(found)


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of a folder and those below, links followed but for those to a folder they lie in."""
    above = {root: [os.path.realpath(root)]}  # folder -> where it and those on the way to it really are
    for folder, inner, files in os.walk(root, followlinks=True):
        way = above.pop(folder)
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in inner}
        inner[:] = [n for n in inner if not any(os.path.commonpath([p, places[n]]) == places[n] for p in way)]
        above.update((os.path.join(folder, name), [*way, places[name]]) for name in inner)
        yield folder, files


def _with_slashes(name: str, root: str) -> str:
    """A path of a table that may have been written on Windows; a file whose name has a backslash keeps it."""
    return name if "\\" in name and os.path.exists(os.path.join(root, name)) else name.replace("\\", "/")


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1  # a link to nowhere: it is refused when it is read


def open_table(path: str, *, path_column: str, label_columns: Sequence[str], recode: Recode) -> Files:
    """A table of images: a row for each, in the order of the table. Paths are relative to the table's own folder.

    Raises:
        ValueError: a table that is not readable, or without these columns.
    """
    table = read_table(path)
    root = os.path.dirname(path)
    names = [_with_slashes(name, root) for name in table_column(table, path_column, path)]
    labels = table_labels(table, label_columns, path, without=[path_column])
    sizes = [_size(os.path.join(root, name)) for name in names]
    return Files(names, FolderReader(root, names), labels=labels, recode=recode, sizes=sizes)
