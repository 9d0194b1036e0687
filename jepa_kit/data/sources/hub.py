"""``hf:NAME``: a Hugging Face data set by its name, or a local folder or .parquet file.

Needs the package ``datasets`` (``pip install 'jepa_kit[hf]'``). Images keep their bytes, and the splits of the data set
become subfolders of the output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_kit.data.shards.writing import MAX_CLASSES, Sample
from jepa_kit.data.sources.base import Recode, Refused, Source, fingerprint
from jepa_kit.data.sources.labels import Labels, named_labels
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray


class HubDataset(Source):
    """The rows of a Hugging Face data set, split by split.

    Args:
        name: ``NAME`` or ``NAME:CONFIG`` of the data set; a folder written by ``save_to_disk``; or a .parquet file.
        image_column: column of images, their bytes or their paths; by default the only one of type ``Image``.
        label_columns: columns of labels; by default those of type ``ClassLabel``. A single one is called ``class``.
        recode: whether and how images are encoded again.
        parts: split -> the data set, if it is loaded already.

    Raises:
        ValueError: the package ``datasets`` is not installed, or there is no such data set or column.
    """

    def __init__(
        self,
        name: str,
        *,
        image_column: str | None = None,
        label_columns: Sequence[str] = (),
        recode: Recode | None = None,
        parts: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.recode = name, recode or Recode()
        parts = parts or _load(name)
        features = next(iter(parts.values())).features
        self.column = _image_column(name, features, image_column)
        self.labels = _labels(name, parts, label_columns)
        self.classes = self.labels.classes
        self.splits: dict[str, IntArray] = {}
        self._parts, self._starts, start = [], [], 0
        for split, part in parts.items():
            self.splits[split if len(parts) > 1 else ""] = np.arange(start, start + len(part))
            self._parts.append(_undecoded(part, self.column))
            self._starts.append(start)
            start += len(part)
        self._names = list(parts)

    def _place(self, i: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return part, i - self._starts[part]

    def name(self, i: int) -> str:
        part, row = self._place(i)
        return f"{self._names[part]}/{row:08d}"

    def sample(self, i: int) -> Sample:
        """Make sample i from the bytes of its row, or from the file that the row names."""
        return self.recode.sample(f"{self._place(i)[1]:08d}", self.image_bytes(i), self.labels.of(i))

    def image_bytes(self, i: int) -> bytes:
        """Return the bytes of the image file of sample i.

        Raises:
            Refused: there is no image, or its file cannot be read.
        """
        part, row = self._place(i)
        cell = self._parts[part][row][self.column]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, str):
            data, path = None, data
        if data is None and path:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise Refused(f"cannot be read: {error.strerror}") from error
        if not isinstance(data, bytes):
            raise Refused("no image in this row")
        return data

    def fingerprint(self) -> str:
        labels = [self.classes, *(numbers.tolist() for numbers in self.labels.values.values())]
        return fingerprint([*self.splits, len(self), self.column, *labels])


def _load(name: str) -> dict[str, Any]:
    """Return split -> datasets.Dataset, without empty splits."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"source (='hf:{name}') needs the package datasets: pip install 'jepa_kit[hf]'") from error
    if not name:
        raise ValueError("source (='hf:') must name a data set, such as hf:uoft-cs/cifar10")
    if name.endswith(".parquet"):
        if not os.path.isfile(name):
            raise ValueError(f"source (='hf:{name}') does not exist")
        found = datasets.Dataset.from_parquet(name)
    elif any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "dataset_info.json")):
        found = datasets.load_from_disk(name)
    else:
        address, _, config = name.partition(":")
        try:
            found = datasets.load_dataset(address, config or None)
        except (OSError, ValueError) as error:  # not found, no network, no such config, ...
            raise ValueError(f"source (='hf:{name}') cannot be loaded: {error}") from error
    parts = dict(found) if isinstance(found, dict) else {"rows": found}
    if not sum(map(len, parts.values())):
        raise ValueError(f"source (='hf:{name}') has no rows")
    return {split: part for split, part in parts.items() if len(part)}


def _columns(features: Any, kind: str) -> list[str]:
    """Return the columns of a type of ``datasets``, such as ``Image``."""
    import datasets

    return [column for column, feature in features.items() if isinstance(feature, getattr(datasets, kind))]


def _check_column(name: str, option: str, column: str, features: Any) -> None:
    """Raise a ValueError if a column that the user names does not exist."""
    if column not in features:
        hint = did_you_mean(column, features)
        raise ValueError(f"{option} (={column}) is no column of hf:{name}{hint} It has: {', '.join(features)}")


def _image_column(name: str, features: Any, wanted: str | None) -> str:
    if wanted is not None:
        _check_column(name, "--image-column", wanted, features)
        return wanted
    images = _columns(features, "Image")
    if len(images) != 1:
        raise ValueError(
            f"hf:{name} has {len(images)} columns of images: name one with --image-column; its columns are: "
            f"{', '.join(features)}"
        )
    return images[0]


def _undecoded(part: Any, column: str) -> Any:
    """Return a data set with one column only, images as bytes, so that nothing is decoded."""
    import datasets

    part = part.select_columns([column])
    return part.cast_column(column, datasets.Image(decode=False)) if _columns(part.features, "Image") else part


def _labels(name: str, parts: dict[str, Any], columns: Sequence[str]) -> Labels:
    """Return the labels of all rows; -1, which the hidden labels of test splits have, means no label."""
    features = next(iter(parts.values())).features
    for column in columns:
        _check_column(name, "--label-column", column, features)
    of_classes = _columns(features, "ClassLabel")
    columns = columns or of_classes
    classes, values = {}, {}
    for column in columns:
        label = column if len(columns) > 1 else "class"
        cells = [cell for part in parts.values() for cell in part.select_columns([column])[:][column]]
        if column in of_classes:
            numbers = np.array([-1 if cell is None else cell for cell in cells], dtype=np.int64)
            if numbers.max(initial=0) >= MAX_CLASSES:
                most = f"{numbers.max()}), which must be below {MAX_CLASSES}"
                raise ValueError(f"label {column!r} of hf:{name} has class number (={most}")
            classes[label], values[label] = tuple(features[column].names), np.maximum(numbers, -1)
        else:
            texts = ["" if cell is None or cell == -1 else str(cell) for cell in cells]
            found = named_labels({label: texts}, None)
            classes |= found.classes
            values |= found.values
    return Labels(classes, values)
