"""Labels of image files: from their folders, from a table, or from ImageNet's lists."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jepa_kit.data.shards.tars import STREAM_ERRORS, read_files
from jepa_kit.data.shards.writing import MAX_CLASSES
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray

LabelFrom = Literal["auto", "parent", "top", "none"]
LABEL_FROM: tuple[LabelFrom, ...] = ("auto", "parent", "top", "none")
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
NO_CLASS_NAME = "ILSVRC2012_ID"
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
_INTEGER = re.compile(r"-?\d+(\.0*)?")
Table = dict[str, list[str]]
"""Column -> its cells, one for each row."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of n samples.

    Args:
        classes: label name -> names of its classes.
        values: label name -> [n] class numbers, -1 for no label.
        missing: the reason to refuse samples without a label; None keeps them.
        notes: messages about the classes, for the user.
    """

    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: dict[str, IntArray] = field(default_factory=dict)
    missing: str | None = None
    notes: tuple[str, ...] = ()

    def of(self, i: int) -> dict[str, int]:
        """Return the labels of sample i, without those that it lacks."""
        return {name: int(numbers[i]) for name, numbers in self.values.items() if numbers[i] >= 0}

    def renumbered(self, classes: Mapping[str, Sequence[str]]) -> Labels:
        """Return the same labels with the class numbers of ``classes``.

        Raises:
            ValueError: a label or a class is not in ``classes``.
        """
        values = {}
        for name, own in self.classes.items():
            if name not in classes:
                raise ValueError(f"label (={name!r}) is not among the labels of --classes-from: {', '.join(classes)}")
            known = set(classes[name])
            unknown = [own[k] for k in np.unique(self.values[name]) if k >= 0 and own[k] not in known]
            if unknown:
                raise ValueError(
                    f"class (={unknown[0]!r}) of label {name!r} is not among the classes of --classes-from"
                    f"{did_you_mean(unknown[0], classes[name])} Unknown are: {', '.join(unknown[:10])}"
                )
            table = np.append(_encode(own, classes[name]), -1)  # the last one for -1, no label
            values[name] = table[self.values[name]]
        return Labels({name: tuple(classes[name]) for name in self.classes}, values, self.missing, self.notes)


def _encode(texts: Iterable[str], classes: Iterable[str]) -> IntArray:
    """Return [n] the class numbers of texts, -1 for other texts."""
    number = {text: k for k, text in enumerate(classes)}
    return np.array([number.get(text, -1) for text in texts], dtype=np.int64)


def named_labels(columns: Mapping[str, Sequence[str]], missing: str | None) -> Labels:
    """Return labels that are given as texts.

    If all texts are integers (2.0 too, which pandas writes in a column with empty cells), they are the class numbers;
    but if one is negative, classes are numbered in the order of the integers. Otherwise the texts are class names,
    sorted as texts.

    Args:
        columns: label name -> texts; an empty one for no label.
        missing: see ``Labels``.

    Raises:
        ValueError: a class number is too high.
    """
    classes, values, notes = {}, {}, []
    for name, texts in columns.items():
        found = set(texts) - {""}
        integers = {text: int(text.partition(".")[0]) for text in found if _INTEGER.fullmatch(text)}
        if found and len(integers) == len(found):
            least, most = min(integers.values()), max(integers.values())
            if least >= 0 and most >= MAX_CLASSES:
                raise ValueError(f"label {name!r} has class number (={most}), which must be below {MAX_CLASSES}")
            numbers = range(most + 1) if least >= 0 else sorted(set(integers.values()))
            classes[name] = tuple(str(k) for k in numbers)
            values[name] = _encode((str(integers[text]) if text else "" for text in texts), classes[name])
            if least < 0:
                notes.append(
                    f"label {name!r} has numbers below 0: its classes are numbered in their order, {least} as 0; if "
                    f"{least} means no label, leave those cells empty"
                )
        else:
            classes[name] = tuple(sorted(found))
            values[name] = _encode(texts, classes[name])
    return Labels(classes, values, missing, tuple(notes))


def folder_labels(names: Sequence[str], label_from: LabelFrom) -> Labels:
    """Return the labels of files by their folders.

    Args:
        names: paths with forward slashes.
        label_from: ``parent`` for the folder of the file, ``top`` for the first folder of its path, ``none`` for no
            labels; ``auto`` is ``parent`` if files are in more than one folder, else ``none``.

    Raises:
        ValueError: ``parent`` or ``top``, but no file is in a folder.
    """
    folders = [os.path.dirname(name) for name in names]
    if label_from == "auto":
        label_from = "parent" if len(set(folders)) > 1 else "none"
    if label_from == "none":
        return Labels()
    wanted = [folder.split("/")[0 if label_from == "top" else -1] for folder in folders]
    found = sorted(set(wanted) - {""})
    if not found:
        raise ValueError(f"label_from (={label_from!r}) must be 'none': no file of the source is in a folder")
    return Labels({"class": tuple(found)}, {"class": _encode(wanted, found)}, "is not in a class folder")


def split_notes(names: Sequence[str], path: str) -> list[str]:
    """Return a note if files are in folders with the names of splits, such as train and val.

    Args:
        names: paths with forward slashes.
        path: of the source.
    """
    parts = split_folders(names)
    if not parts:
        return []
    inside = f" (unpack {os.path.basename(path)} first)" if os.path.isfile(path) else ""
    return [
        f"{' and '.join(parts)} in {path} become one data set: to keep them apart, make shards of each folder"
        f"{inside}, and of those after the first with --classes-from the first one's shards"
    ]


def split_folders(names: Sequence[str]) -> list[str]:
    """Return the folders with the names of splits, below the folder of all files; none if there are less than two."""
    shared = os.path.commonprefix(names).rpartition("/")[0]  # noqa: RUF071 (cut at a slash)
    below = {name[len(shared) :].lstrip("/").partition("/")[0] for name in names}
    parts = sorted(part for part in below if part.lower() in SPLITS)
    return parts if len(parts) > 1 else []


def read_lines(path: str, option: str) -> list[str]:
    """Return the stripped lines of a text file that are not blank.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return [line.strip() for line in stream if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} (={path!r}) must be a text in UTF-8, but {error}: save it as UTF-8") from error


def read_table(path: str) -> Table:
    """Return the columns of a .csv or .tsv file, whose first line names them.

    Raises:
        ValueError: it is no text, has no rows, a row of another length, or two columns of one name.
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
    """Return a column by name.

    Raises:
        ValueError: the table has no such column.
    """
    if name not in table:
        hint = did_you_mean(name, table)
        raise ValueError(f"table (={path!r}) has no column {name!r}{hint} Its columns are: {', '.join(table)}")
    return table[name]


def table_labels(table: Table, columns: Sequence[str], path: str, *, without: Sequence[str] = ()) -> Labels:
    """Return the labels of the rows; a single label is called ``class``.

    Args:
        table: the columns.
        columns: names of the label columns; if empty, ``label`` or ``class``, if the table has one of them.
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
    """Return the labels of files from a list.

    Args:
        path: a .csv or .tsv table; a .txt file with the name and the class of a file on each line, or with the classes
            of the files in the order of their names; or ImageNet's development kit (.tar.gz), for validation images.
        names: the files; the list may name them by path, by file name, or by file name without extension.
        columns: the label columns of a table.
        path_column: the column of a table with the files.

    Returns:
        The labels, and messages for the user.

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
        if {*map(len, lines)} not in ({1}, {2}):
            raise ValueError(f"--labels (={path!r}) must have a file's name and its class, or a class, on each line")
        texts = [line[-1] for line in lines]
        files = [line[0] for line in lines] if len(lines[0]) == 2 else _in_order(names, texts, path)
    labels = named_labels({"class": texts}, f"no label in {os.path.basename(path)}")
    return _matched(names, files, labels, path)


def _in_order(names: Sequence[str], texts: Sequence[str], path: str) -> list[str]:
    """Return the files of a list of classes only: those of the source, sorted."""
    if all(map(_INTEGER.fullmatch, texts)):
        raise ValueError(
            f"--labels (={path!r}) must not be only numbers: those of {GROUND_TRUTH} differ from the usual ones, which "
            "follow the class names; give the development kit instead (ILSVRC2012_devkit_t12.tar.gz)"
        )
    if len(texts) != len(names):
        raise ValueError(
            f"--labels (={path!r}) has {len(texts)} lines, but must have one for each of {len(names)} files"
        )
    return sorted(names)


def _matched(names: Sequence[str], files: Sequence[str], labels: Labels, path: str) -> tuple[Labels, list[str]]:
    """Return the labels of a list for the files of the source, and messages for the user."""
    if not labels.values:
        raise ValueError(f"--labels (={path!r}) must have a column of labels: name it with --label-column")
    known = set(names)
    files = [file if file in known else file.replace("\\", "/") for file in files]  # a list from Windows
    if len(set(files)) < len(files):
        twice = next(file for k, file in enumerate(files) if file in files[:k])
        raise ValueError(f"--labels (={path!r}) must name each file once, but names {twice!r} twice")
    for short in (str, os.path.basename, lambda name: os.path.splitext(os.path.basename(name))[0]):
        row = _encode(map(short, names), map(short, files))
        # a shorter name that several files have cannot be used
        unique = len(set(map(short, files))) == len(files) and len(set(map(short, names))) == len(names)
        if unique and (row >= 0).any():
            break
    else:
        raise ValueError(f"--labels (={path!r}) names none of the {len(names)} files; its first is {files[0]!r}")
    values = {name: np.where(row >= 0, numbers[row], -1) for name, numbers in labels.values.items()}
    unused = len(files) - len(np.unique(row[row >= 0]))
    notes = [f"{path} names {unused} files that are not in the source"] if unused else []
    return replace(labels, values=values), notes


def _development_kit(path: str) -> list[str]:
    """Return the WordNet ID (n01440764) of each validation image of ImageNet-1k, from the development kit."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        found = read_files(path, "r:gz", (GROUND_TRUTH, META))
        synsets = loadmat(io.BytesIO(found[META]), squeeze_me=True)["synsets"]
        wordnet = {int(row[NO_CLASS_NAME]): str(row["WNID"]) for row in synsets}
        return [wordnet[int(number)] for number in found[GROUND_TRUTH].split()]
    except (*STREAM_ERRORS, OSError, KeyError, ValueError, MatReadError) as error:
        raise ValueError(
            f"--labels (={path!r}) must be ImageNet's development kit, with {GROUND_TRUTH} and {META}: {error!r}"
        ) from error
