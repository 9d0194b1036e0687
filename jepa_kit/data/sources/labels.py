"""Labels of image files: from their folders, from a table, or from ImageNet's own lists."""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jepa_kit.data.shards.writing import MAX_CLASSES
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray

LabelFrom = Literal["auto", "parent", "top", "none"]
LABEL_FROM: tuple[LabelFrom, ...] = ("auto", "parent", "top", "none")
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
NO_CLASS_NAME = "ILSVRC2012_ID"
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
_WHOLE = re.compile(r"-?\d+(\.0*)?")
Table = dict[str, list[str]]
"""Column -> its cells, one for each row."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of n samples.

    Args:
        classes: label name -> names of its classes.
        values: label name -> [n] class numbers, -1 where a sample has none.
        missing: why a sample without its label is refused; None keeps such samples.
        notes: what the user should know about the classes.
    """

    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: dict[str, IntArray] = field(default_factory=dict)
    missing: str | None = None
    notes: tuple[str, ...] = ()

    def of(self, i: int) -> dict[str, int]:
        """The labels that sample i has."""
        return {name: int(numbers[i]) for name, numbers in self.values.items() if numbers[i] >= 0}

    def renumbered(self, classes: Mapping[str, Sequence[str]]) -> Labels:
        """The same labels, with the numbers that these classes have.

        Raises:
            ValueError: a label or a class that ``classes`` does not know.
        """
        values = {}
        for name, own in self.classes.items():
            if name not in classes:
                raise ValueError(f"label (={name!r}) is not among the labels of --classes-from: {', '.join(classes)}")
            number = {text: k for k, text in enumerate(classes[name])}
            used = [own[k] for k in np.unique(self.values[name]) if k >= 0]
            unknown = [text for text in used if text not in number]
            if unknown:
                raise ValueError(
                    f"class (={unknown[0]!r}) of label {name!r} is not among the classes of --classes-from"
                    f"{did_you_mean(unknown[0], number)} Unknown are: {', '.join(unknown[:10])}"
                )
            table = np.array([number.get(text, -1) for text in own] + [-1], dtype=np.int64)
            values[name] = table[self.values[name]]
        return Labels({name: tuple(classes[name]) for name in self.classes}, values, self.missing)


def named_labels(columns: Mapping[str, Sequence[str]], missing: str | None) -> Labels:
    """Labels from texts.

    Where all are whole numbers (also written 2.0, as pandas does where a cell is empty) they stay those numbers; with
    one below 0 among them, they are classes in the order of the numbers. Other texts, numbers with a fraction among
    them, are names of classes, sorted as texts.

    Args:
        columns: label name -> texts, empty where a sample has none.
        missing: see ``Labels``.

    Raises:
        ValueError: a number that no class can have.
    """
    classes, values, notes = {}, {}, []
    for name, texts in columns.items():
        found = set(texts) - {""}
        whole = {text: int(text.partition(".")[0]) for text in found if _WHOLE.fullmatch(text)}
        if found and len(whole) == len(found):
            least, most = min(whole.values()), max(whole.values())
            if least >= 0 and most >= MAX_CLASSES:
                raise ValueError(f"label {name!r} has class number (={most}), which must be below {MAX_CLASSES}")
            numbers = range(most + 1) if least >= 0 else sorted(set(whole.values()))
            classes[name] = tuple(str(k) for k in numbers)
            place = {k: place for place, k in enumerate(numbers)}
            number = {text: place[k] for text, k in whole.items()}
            if least < 0:
                notes.append(
                    f"label {name!r} has numbers below 0: its classes are numbered in their order, {least} as 0; where "
                    f"{least} stands for no label, leave those cells empty"
                )
        else:
            classes[name] = tuple(sorted(found))
            number = {text: k for k, text in enumerate(classes[name])}
        values[name] = np.array([number.get(text, -1) for text in texts], dtype=np.int64)
    return Labels(classes, values, missing, tuple(notes))


def folder_labels(names: Sequence[str], label_from: LabelFrom) -> Labels:
    """Classes from folders.

    Args:
        names: paths with forward slashes.
        label_from: ``parent`` takes the folder that holds the file, ``top`` the first folder of its path, ``none``
            leaves out labels; ``auto`` is ``parent`` where files lie in more than one folder, else ``none``.

    Raises:
        ValueError: ``parent`` or ``top`` where every file lies at the top.
    """
    folders = [os.path.dirname(name) for name in names]
    if label_from == "auto":
        label_from = "parent" if len(set(folders)) > 1 else "none"
    if label_from == "none":
        return Labels()
    wanted = [folder.split("/")[0 if label_from == "top" else -1] for folder in folders]
    found = sorted(set(wanted) - {""})
    if not found:
        raise ValueError(f"label_from (={label_from!r}) must be 'none': every file lies at the top of the source")
    number = {name: k for k, name in enumerate(found)}
    values = np.array([number.get(name, -1) for name in wanted], dtype=np.int64)
    return Labels({"class": tuple(found)}, {"class": values}, "lies outside every class folder")


def split_notes(names: Sequence[str], path: str) -> list[str]:
    """What the user should know of files that lie in folders named as parts of a data set.

    Args:
        names: paths with forward slashes.
        path: of the source.
    """
    shared = os.path.commonprefix(names).rpartition("/")[0]  # noqa: RUF071 (cut at a slash)
    below = {name[len(shared) :].lstrip("/").partition("/")[0] for name in names}
    parts = sorted(part for part in below if part.lower() in SPLITS)
    if len(parts) < 2:
        return []
    inside = f" (unpack {os.path.basename(path)} first)" if os.path.isfile(path) else ""
    return [
        f"{' and '.join(parts)} in {path} are mixed into one data set: to keep them apart, give each folder by itself"
        f"{inside}, and those after the first with --classes-from the first one's shards"
    ]


def read_lines(path: str, option: str) -> list[str]:
    """The lines of a text that are not blank, stripped.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return [line.strip() for line in stream if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} (={path!r}) must be a text in UTF-8, but {error}: save it as UTF-8") from error


def read_table(path: str) -> Table:
    """The columns of a .csv or .tsv file with a line of names at its top.

    Raises:
        ValueError: no text, no rows, a row of another length, or two columns of one name.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream, delimiter="\t" if path.endswith(".tsv") else ",") if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"table (={path!r}) is not readable: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"table (={path!r}) must have a line of column names and at least one row")
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        raise ValueError(f"table (={path!r}) must name each column once, but its first line is: {', '.join(names)}")
    for k, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise ValueError(f"table (={path!r}) must have {len(names)} cells in row {k}, but it has {len(row)}")
    return {name: [row[j].strip() for row in rows[1:]] for j, name in enumerate(names)}


def table_column(table: Table, name: str, path: str) -> list[str]:
    """A column by name.

    Raises:
        ValueError: the table has no such column.
    """
    if name not in table:
        hint = did_you_mean(name, table)
        raise ValueError(f"table (={path!r}) has no column {name!r}{hint} Its columns are: {', '.join(table)}")
    return table[name]


def table_labels(table: Table, columns: Sequence[str], path: str, *, without: Sequence[str] = ()) -> Labels:
    """Labels of the rows; a single column's label is called ``class``.

    Args:
        table: the columns.
        columns: those that are labels; none named: ``label`` or ``class``, if the table has one of them.
        path: of the table, for messages.
        without: columns that are no labels.

    Raises:
        ValueError: no such column.
    """
    if not columns:
        columns = [name for name in ("label", "class") if name in table and name not in without][:1]
    texts = {name: table_column(table, name, path) for name in columns}
    if len(columns) == 1:
        texts = {"class": texts[columns[0]]}
    return named_labels(texts, f"no label in {os.path.basename(path)}" if texts else None)


def label_file(path: str, names: Sequence[str], columns: Sequence[str], path_column: str) -> tuple[Labels, list[str]]:
    """Labels of files from a list of them.

    Args:
        path: a .csv or .tsv table; a .txt file with a file's name and its class on each line, or a class alone, for
            the files in the order of their names; or ImageNet's development kit (.tar.gz), for its validation images.
        names: the files; a list may name them by path, by the last part of it, or by that without its extension.
        columns: of a table, those that are labels.
        path_column: of a table, that of the files.

    Returns:
        The labels, and what the user should know.

    Raises:
        ValueError: the list is not readable, or names none of the files.
    """
    if not os.path.isfile(path):
        raise ValueError(f"--labels (={path!r}) does not exist, or is not a file")
    if path.endswith((".csv", ".tsv")):
        table = read_table(path)
        if {"ImageId", "PredictionString"} <= table.keys() and not columns:  # Kaggle's list of ImageNet's validation
            columns, path_column = ["PredictionString"], "ImageId"
            table["PredictionString"] = [text.split(" ")[0] for text in table["PredictionString"]]
        files = table_column(table, path_column, path)
        return _matched(names, files, table_labels(table, columns, path, without=[path_column]), path)
    if path.endswith((".tar.gz", ".tgz")):
        texts = _development_kit(path)
        files = [f"ILSVRC2012_val_{k:08d}" for k in range(1, len(texts) + 1)]
    else:
        lines = [line.split() for line in read_lines(path, "--labels")]
        if lines and all(len(line) == 1 for line in lines):
            files, texts = _in_order(names, [line[0] for line in lines], path)
        elif lines and all(len(line) == 2 for line in lines):
            files, texts = [line[0] for line in lines], [line[1] for line in lines]
        else:
            raise ValueError(f"--labels (={path!r}) must have a file's name and its class, or a class, on each line")
    labels = named_labels({"class": texts}, f"no label in {os.path.basename(path)}")
    return _matched(names, files, labels, path)


def _in_order(names: Sequence[str], texts: list[str], path: str) -> tuple[list[str], list[str]]:
    if all(map(_WHOLE.fullmatch, texts)):
        raise ValueError(
            f"--labels (={path!r}) must not be numbers alone: those of {GROUND_TRUTH} are not the usual ones, in the "
            "order of the classes' names; give the development kit it comes from (ILSVRC2012_devkit_t12.tar.gz)"
        )
    if len(texts) != len(names):
        raise ValueError(
            f"--labels (={path!r}) has {len(texts)} lines, but must have one for each of {len(names)} files"
        )
    return sorted(names), texts


def _matched(names: Sequence[str], files: Sequence[str], labels: Labels, path: str) -> tuple[Labels, list[str]]:
    """The labels of a list's files, for the files of the source."""
    if not labels.values:
        raise ValueError(f"--labels (={path!r}) must have a column of labels: name it with --label-column")
    known = set(names)
    files = [file if file in known else file.replace("\\", "/") for file in files]  # a list from Windows
    if len(set(files)) < len(files):
        twice = next(file for k, file in enumerate(files) if file in files[:k])
        raise ValueError(f"--labels (={path!r}) must name each file once, but names {twice!r} twice")
    for short in (str, os.path.basename, _stem):
        place = {short(file): k for k, file in enumerate(files)}
        row = np.array([place.get(short(name), -1) for name in names], dtype=np.int64)
        # a shorter name may stand for several files, and then tells nothing
        clear = len(place) == len(files) and len(set(map(short, names))) == len(names)
        if clear and (row >= 0).any():
            break
    else:
        raise ValueError(f"--labels (={path!r}) names none of the {len(names)} files; its first is {files[0]!r}")
    values = {name: np.where(row >= 0, numbers[row], -1) for name, numbers in labels.values.items()}
    unused = len(files) - len(np.unique(row[row >= 0]))
    notes = [f"{path} names {unused} files that are not in the source"] if unused else []
    return replace(labels, values=values), notes


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _development_kit(path: str) -> list[str]:
    """The class of each validation image of ImageNet-1k, by its WordNet name (n01440764), from the development kit."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as kit:
            for member in kit:
                stream = kit.extractfile(member) if os.path.basename(member.name) in (GROUND_TRUTH, META) else None
                if stream is not None:
                    found[os.path.basename(member.name)] = stream.read()
        synsets = loadmat(io.BytesIO(found[META]), squeeze_me=True)["synsets"]
        wordnet = {int(row[NO_CLASS_NAME]): str(row["WNID"]) for row in synsets}
        return [wordnet[int(number)] for number in found[GROUND_TRUTH].split()]
    except (tarfile.TarError, EOFError, OSError, zlib.error, KeyError, ValueError, MatReadError) as error:
        raise ValueError(
            f"--labels (={path!r}) must be ImageNet's development kit, with {GROUND_TRUTH} and {META}: {error!r}"
        ) from error
