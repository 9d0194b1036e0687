"""Samples of a data set that has a length and gives items by number: a torch ``Dataset``, a list, a tensor, ...

An item is an image or begins with one: ``(image, label)``, or a mapping with ``image`` and perhaps ``label``. An image
is of Pillow, a tensor or array, the bytes of a file, or its path. Pixels are passed on without loss.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from jepa_kit.data.folders import read_file
from jepa_kit.data.images import to_rgb
from jepa_kit.data.listed import ListedSamples
from jepa_kit.data.sources.labels import Labels, named_labels
from jepa_kit.errors import ImageError, SampleError, cause_of

COMPARED = 32
"""Images of a data set, evenly spaced, that distinguish it from others; each is read twice."""
LABEL = "class"
"""Name of the label of items."""


def item_samples(dataset: Any, *, labels: bool | Labels = False, name: str | None = None) -> ListedSamples:
    """Return the samples of a data set that gives items by number.

    Labels are those of its attribute ``targets`` or ``labels`` (as torchvision has them), or the second part of each
    item; names of classes are its attribute ``classes``.

    Args:
        dataset: with ``len`` and ``[i]``; its items are the same at every reading.
        labels: of the items; or whether to read all items for their labels if no attribute has them.
        name: of the data set, for messages.

    Raises:
        ValueError: it is empty or has no items by number; an item is not an image or differs between two readings.
    """
    name = name or type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ValueError(f"images (=a {name} of {', '.join(map(str, dataset))}) must be one data set: give one of them")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"images (=a {name}) must have a length and items by number: the order of samples, their masks and an "
            "exact resume are functions of these numbers. Write a stream into shards (jepa-shards), or take "
            "list(stream) if it fits into memory"
        )
    count, read = len(dataset), _Items(dataset, name)
    if not count:
        raise ValueError(f"images (=a {name}) must have at least one item")
    found = labels if isinstance(labels, Labels) else _labels(dataset, count, name, read_all=labels)
    digest = hashlib.sha256(repr((count, found.classes, [v.tolist() for v in found.values.values()])).encode())
    for i in np.unique(np.linspace(0, count - 1, COMPARED, dtype=np.int64)).tolist():
        data = _readable(read, i)
        if _readable(read, i) != data:
            raise ValueError(
                f"item {i} of {name} differs between two readings, so that a run could not be repeated or resumed: "
                "take its random transforms out; data.transforms of the config crops, flips, ..."
            )
        digest.update(data)
    keys = np.char.zfill(np.arange(count).astype(bytes), 8)
    return ListedSamples(
        name,
        keys,
        np.zeros(count, dtype=np.int64),
        found,
        read,
        digest.hexdigest(),
        digest_of=f"number, labels and {COMPARED} images",
    )


@dataclass(frozen=True, eq=False)
class _Items:
    """Return the bytes of an image file of item i."""

    dataset: Any
    name: str

    def __call__(self, i: int) -> bytes:
        """Read an item.

        Raises:
            SampleError: the item or its file cannot be read, or has no RGB.
            ValueError: it is no image.
        """
        try:
            return image_bytes(_parts(self.dataset[i])[0], f"item {i} of {self.name}")
        except (OSError, ImageError) as error:
            raise SampleError(f"item {i} of {self.name} cannot be read: {cause_of(error)}") from error


def _readable(read: _Items, i: int) -> bytes:
    """Return an item, or a fixed text if it cannot be read: a run skips such samples.

    The reason does not count: Pillow's message contains an address in memory, so that it differs between two readings.
    """
    try:
        return read(i)
    except SampleError:
        return b"cannot be read"


def _parts(item: Any) -> tuple[Any, Any]:
    """Return the image and the label of an item; None for no label."""
    if isinstance(item, Mapping):
        return item.get("image"), item.get("label")
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def image_bytes(image: Any, what: str) -> bytes:
    """Return an image as the bytes of a file, without loss.

    Args:
        image: of Pillow; uint8 [h, w], [h, w, 3] as an array, [3, h, w] or [1, h, w] as a tensor; a float tensor with
            values in [0, 1]; bytes of a file; or its path.
        what: name of the image in messages.

    Raises:
        ValueError: it is none of these.
        OSError, ImageError: its file cannot be read, or it has no RGB.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return read_file(os.fspath(image))
    out = io.BytesIO()
    to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(_array(image, what))).save(out, format="PPM")
    return out.getvalue()


def _array(image: Any, what: str) -> Any:
    """Return pixels as uint8 [h, w] or [h, w, 3]."""
    array = image
    if isinstance(image, Tensor):
        x = image.detach().cpu()
        if x.is_floating_point():
            if not (x.numel() and 0 <= float(x.min()) <= float(x.max()) <= 1):
                least, most = (f"{float(v):.3g}" for v in (x.min(), x.max())) if x.numel() else ("?", "?")
                raise ValueError(
                    f"{what} has values from {least} to {most}: a float image must have values in [0, 1]; leave its "
                    "normalisation to data.mean and data.std of the config"
                )
            x = (255 * x).round().to(torch.uint8)
        array = (x.permute(1, 2, 0) if x.ndim == 3 else x).numpy()
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    fits = isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.size > 0
    if not (fits and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))):
        of = f" of {image.dtype}, shape {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else ""
        raise ValueError(
            f"{what} (=a {type(image).__name__}{of}) must be or begin with an image: of Pillow, a tensor [3, h, w] "
            "or an array [h, w, 3] of uint8, bytes of a file or its path; or a mapping with it as 'image'"
        )
    return np.ascontiguousarray(array)


def _labels(dataset: Any, count: int, name: str, *, read_all: bool) -> Labels:
    """Return the labels of a data set as the label ``class``; none if it has none."""
    values = _targets(dataset)
    if values is None and read_all:
        values = [_parts(dataset[i])[1] for i in range(count)]
        if any(value is None for value in values):
            return Labels()
    if values is None:
        return Labels()
    if len(values) != count:
        raise ValueError(f"targets of {name} (of length {len(values)}) must be one for each of its {count} items")
    plain = [value.item() if isinstance(value, Tensor | np.generic) else value for value in values]
    if wrong := [value for value in plain if type(value) not in (int, str)]:
        raise ValueError(f"labels of {name} must be numbers or names of classes, not {wrong[0]!r:.60}")
    names = getattr(dataset.dataset if isinstance(dataset, Subset) else dataset, "classes", None)
    if names is not None and all(type(value) is int and 0 <= value < len(names) for value in plain):
        return Labels({LABEL: tuple(map(str, names))}, {LABEL: np.array(plain, dtype=np.int64)})
    return named_labels({LABEL: [str(value) for value in plain]}, None)


def _targets(dataset: Any) -> Any:
    """Return the labels that an attribute has, or None."""
    if isinstance(dataset, Subset):
        values = _targets(dataset.dataset)
        return None if values is None else [values[i] for i in dataset.indices]
    return next((v for v in (getattr(dataset, key, None) for key in ("targets", "labels")) if v is not None), None)
