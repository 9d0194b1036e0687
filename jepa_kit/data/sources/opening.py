"""Open the source that the user names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jepa_kit.data.shards.index import read_index
from jepa_kit.data.shards.writing import INDEX
from jepa_kit.data.sources.archives import ARCHIVES, tar_files, zip_files
from jepa_kit.data.sources.base import Recode, Source
from jepa_kit.data.sources.cifar import Cifar, cifar_folder
from jepa_kit.data.sources.files import Files, Listing, folder_files, table_files
from jepa_kit.data.sources.labels import LabelFrom, Labels, folder_labels, label_file, read_lines, split_notes
from jepa_kit.data.sources.scenes import Scenes
from jepa_kit.registry import did_you_mean

SYNTHETIC = ("scenes",)
TABLES = (".csv", ".tsv")


def _only_for(sources: str) -> Any:
    """Return a field that is None by default, and that is for some sources only."""
    return field(default=None, metadata={"sources": sources})


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source; None for the default. An option that a kind of source does not use is an error.

    Args:
        label_from: files: the folder of the path that is the class; ``auto`` by default.
        labels: files: a list of their labels instead.
        label_column: tables and Hugging Face: the columns of the labels.
        path_column: tables: the column of the paths; ``path`` by default.
        image_column: Hugging Face: the column of the images.
        classes_from: files and tables: shards, or a text file with a class on each line, that define class numbers.
        shorter_side: images: see ``Recode``.
        quality: images: see ``Recode``.
        num_scenes: scenes: how many; 10000 by default.
        image_size: scenes: a side, or HEIGHTxWIDTH; 64 by default.
        masks: scenes: whether to store their masks; True by default.
    """

    label_from: LabelFrom | None = _only_for("image files")  # noqa: RUF009 (a field)
    labels: str | None = _only_for("image files")
    label_column: tuple[str, ...] | None = _only_for("tables and hf:NAME")
    path_column: str | None = _only_for("tables")
    image_column: str | None = _only_for("hf:NAME")
    classes_from: str | None = _only_for("image files and tables")
    shorter_side: int | None = _only_for("images that exist; --image-size sets that of scenes")
    quality: int | None = _only_for("images that exist; scenes are lossless")
    num_scenes: int | None = _only_for("synthetic:scenes")
    image_size: str | None = _only_for("synthetic:scenes")
    masks: bool | None = _only_for("synthetic:scenes")

    @property
    def recode(self) -> Recode:
        return Recode(self.shorter_side, self.quality)


_IMAGES = ("shorter_side", "quality")
_FILES = (*_IMAGES, "label_from", "labels", "classes_from")
_TABLE = (*_IMAGES, "label_column", "path_column", "classes_from")
_SCENES = ("num_scenes", "image_size", "masks")


def open_source(name: str, options: SourceOptions, *, seed: int, scratch: str) -> Source:
    """Open a source.

    Args:
        name: a folder, an archive, a table, ``wds:SHARDS``, ``hf:NAME`` or ``synthetic:scenes``.
        options: of the source.
        seed: of scenes.
        scratch: a folder for decompressed archives; the caller removes ``.unpacked.*`` from it.

    Raises:
        ValueError: the source does not exist, is unknown, damaged or empty, or does not use an option.
    """
    kind, _, rest = name.partition(":")
    if kind == "synthetic":
        _check_used(options, _SCENES)
        return _open_scenes(name, rest, options, seed)
    # imported here because they import torch, which no other source needs
    if kind == "hf":
        from jepa_kit.data.sources.hub import HubDataset

        _check_used(options, (*_IMAGES, "image_column", "label_column"))
        wanted = options.label_column or ()
        return HubDataset(rest, image_column=options.image_column, label_columns=wanted, recode=options.recode)
    if kind == "wds":
        from jepa_kit.data.sources.reshard import ShardSource

        _check_used(options, _IMAGES)
        return ShardSource(rest, options.recode)
    if not os.path.exists(name):
        raise ValueError(f"source (={name!r}) does not exist")
    if os.path.isdir(name) and os.path.isfile(os.path.join(name, INDEX)):
        raise ValueError(f"source (={name!r}) contains shards: give wds:{name} to copy them into new ones")
    if name.endswith(TABLES):
        _check_used(options, _TABLE)
        listing, labels = table_files(name, options.path_column or "path", options.label_column or ())
        return _files(listing, labels, options)
    if name.endswith((".tar", ".tar.gz", ".tgz")) and cifar_folder(name):
        _check_used(options, _IMAGES)
        return Cifar(name, options.recode)
    return open_files(name, options, scratch=scratch)


def open_files(path: str, options: SourceOptions, *, scratch: str) -> Files:
    """Open a folder or an archive of image files, without hidden files and folders.

    Raises:
        ValueError: an unknown kind of file, or the source or its labels are damaged or empty.
    """
    if os.path.isdir(path):
        found = folder_files(path)
    elif path.endswith(".zip"):
        found = zip_files(path)
    elif path.endswith(ARCHIVES):
        found = tar_files(path, scratch)
    else:
        kinds = f"a folder, a {', '.join(ARCHIVES)} archive, a {', '.join(TABLES)} table"
        raise ValueError(f"source (={path!r}) must be {kinds}, wds:SHARDS, hf:NAME or synthetic:scenes")
    if not found.names:
        raise ValueError(f"source (={path!r}) contains no files")
    listed = options.labels is not None and options.labels.endswith(TABLES)
    _check_used(options, (*_FILES, *(_TABLE if listed else ())))
    notes = [f"left out: {found.num_hidden} hidden files"] if found.num_hidden else []
    notes += split_notes(found.names, path)
    if options.labels is None:
        labels = folder_labels(found.names, options.label_from or ("top" if found.of_tars else "auto"))
    elif options.label_from is not None:
        raise ValueError(f"--labels (={options.labels}) and --label-from (={options.label_from}) exclude each other")
    else:
        columns, path_column = options.label_column or (), options.path_column or "path"
        labels, more = label_file(options.labels, found.names, columns, path_column)
        notes += more
    return _files(found, labels, options, notes)


def _files(listing: Listing, labels: Labels, options: SourceOptions, notes: Sequence[str] = ()) -> Files:
    """Return a source of files, with the class numbers of ``classes_from`` if it is given."""
    if options.classes_from:
        labels = labels.renumbered(_read_classes(options.classes_from, labels))
    return Files(listing, labels, options.recode, notes)


def _check_used(options: SourceOptions, used: tuple[str, ...]) -> None:
    """Raise a ValueError if an option is set that the source does not use."""
    for option in fields(options):
        value = getattr(options, option.name)
        if value is not None and option.name not in used:
            shown = ",".join(value) if isinstance(value, tuple) else value
            raise ValueError(f"--{option.name.replace('_', '-')} (={shown}) is only for {option.metadata['sources']}")


def _open_scenes(name: str, kind: str, options: SourceOptions, seed: int) -> Scenes:
    if kind not in SYNTHETIC:
        hint = did_you_mean(kind, SYNTHETIC)
        raise ValueError(f"source (={name!r}) is not known{hint} Synthetic sources: synthetic:scenes")
    sides = str(options.image_size or 64).lower().split("x")
    if len(sides) > 2 or not all(s.isdigit() for s in sides):
        raise ValueError(
            f"--image-size (={options.image_size}) must be a side in pixels, or HEIGHTxWIDTH such as 64x96"
        )
    count = 10000 if options.num_scenes is None else options.num_scenes
    return Scenes(num_scenes=count, size=(int(sides[0]), int(sides[-1])), seed=seed, masks=options.masks is not False)


def _read_classes(path: str, labels: Labels) -> dict[str, tuple[str, ...]]:
    """Return label name -> the names of its classes, from shards or from a list of classes."""
    index = os.path.join(path, INDEX)
    if not labels.classes:
        raise ValueError(f"--classes-from (={path}) numbers classes, but the source is unlabelled")
    if os.path.isfile(index):
        return {k: tuple(v) for k, v in read_index(index)["labels"].items()}
    if not os.path.isfile(path):
        raise ValueError(f"--classes-from (={path}) must be a folder of shards with an {INDEX}, or a list of classes")
    lines = read_lines(path, "--classes-from")
    if len(set(lines)) < len(lines):
        raise ValueError(f"--classes-from (={path}) must name each class once")
    return dict.fromkeys(labels.classes, tuple(lines))
