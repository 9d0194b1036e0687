"""Image files: a folder of them, or a table (.csv, .tsv) of their paths and labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jepa_kit.data.folders import file_size, hidden, read_file, walk_files
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.sources.base import Recode, Refused, Source, fingerprint, single_split
from jepa_kit.data.sources.keys import unique_keys
from jepa_kit.data.sources.labels import Labels, read_table, table_column, table_labels
from jepa_kit.errors import cause_of

READ_ERRORS = (OSError, RuntimeError)
"""Errors of a file that is missing, locked or damaged; zipfile raises RuntimeError for a member with a password."""
Read = Callable[[int], bytes]


class Listing(NamedTuple):
    """The files of a folder, an archive or a table.

    Attributes:
        names: paths inside the source, with forward slashes; sorted, except those of a table.
        sizes: in bytes; -1 for a missing file.
        read: number -> bytes of the file; can be pickled.
        num_hidden: hidden files, which are left out.
        of_tars: whether they are files of tars inside a tar; the first folder of a name is then the name of its tar.
    """

    names: list[str]
    sizes: list[int]
    read: Read
    num_hidden: int
    of_tars: bool = False


class Files(Source):
    """A source of image files.

    Args:
        listing: the files.
        labels: of the files.
        recode: whether and how images are encoded again.
        notes: messages for the user.
    """

    def __init__(self, listing: Listing, labels: Labels, recode: Recode, notes: Sequence[str] = ()) -> None:
        self.names, self.sizes, self.read = listing.names, listing.sizes, listing.read
        self.labels, self.classes, self.recode = labels, labels.classes, recode
        self._keys = unique_keys(self.names)
        self.splits, self.notes = single_split(len(self.names)), [*notes, *labels.notes]

    def name(self, i: int) -> str:
        return self.names[i].encode("utf-8", "replace").decode()  # a file name may not be valid UTF-8

    def sample(self, i: int) -> Sample:
        labels = self.labels.of(i)
        if self.labels.missing is not None and len(labels) < len(self.labels.values):
            raise Refused(self.labels.missing)
        try:
            data = self.read(i)
        except READ_ERRORS as error:
            raise Refused(f"cannot be read: {cause_of(error)}") from error
        return self.recode.sample(self._keys[i], data, labels)

    def fingerprint(self) -> str:
        labels = [self.classes, *(numbers.tolist() for numbers in self.labels.values.values())]
        return fingerprint([*self.names, *self.sizes, *labels])


def _read_named(root: str, names: Sequence[str], i: int) -> bytes:
    """Return the content of a file in a folder."""
    return read_file(os.path.join(root, names[i]))


def folder_files(path: str) -> Listing:
    """List the files in a folder and below it, links followed.

    Raises:
        ValueError: all are tar files: shards, or ImageNet's classes.
    """
    every = sorted(walk_files(path))
    names = [name for name in every if not hidden(name)]
    if names and all(name.endswith(".tar") for name in names):
        raise ValueError(
            f"source (={path!r}) contains only tar files: if they are WebDataset shards, give wds:{path}; if "
            "each is a class, as in ImageNet's train archive, give that archive"
        )
    sizes = [file_size(os.path.join(path, name)) for name in names]
    return Listing(names, sizes, partial(_read_named, path, names), len(every) - len(names))


def _with_slashes(name: str, root: str) -> str:
    """Return a path of a table with forward slashes if there is no file of that very name, backslashes included."""
    return name if "\\" in name and os.path.exists(os.path.join(root, name)) else name.replace("\\", "/")


def table_files(path: str, path_column: str, label_columns: Sequence[str]) -> tuple[Listing, Labels]:
    """List the images of a table, one for each row, in the order of the table.

    Args:
        path: of the table; paths in it are relative to its folder.
        path_column: column of the paths.
        label_columns: see ``table_labels``.

    Raises:
        ValueError: the table is not readable, or lacks one of these columns.
    """
    table = read_table(path)
    root = os.path.dirname(path)
    names = [_with_slashes(name, root) for name in table_column(table, path_column, path)]
    labels = table_labels(table, label_columns, path, without=[path_column])
    sizes = [file_size(os.path.join(root, name)) for name in names]
    return Listing(names, sizes, partial(_read_named, root, names), 0), labels
