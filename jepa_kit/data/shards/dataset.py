"""WebDataset tar shards with random access to their samples; and samples in no shard, which are read as these are.

``writing.py`` describes the format; every WebDataset reader can stream the tar files. Here the offsets are
memory-mapped and a sample is one ``pread``, so that the order can be any pure function of the step and resuming is
free. ``resolve.py`` finds the shards and their index.

Legend: N samples of all shards, in the order of the shards; L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import DECODE_ERRORS, MAX_PIXELS, decode
from jepa_kit.data.listed import ListedSamples
from jepa_kit.data.remote.cache import ShardCache
from jepa_kit.data.remote.fetch import Access, is_remote
from jepa_kit.data.segmentation import decode_mask
from jepa_kit.data.shards.parts import Part
from jepa_kit.data.shards.reader import ShardFile, ShardReader
from jepa_kit.data.shards.resolve import open_parts
from jepa_kit.data.shards.writing import KEYS, LABELS, MASKS, OFFSETS
from jepa_kit.errors import ImageError, SampleError
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray

_ARRAYS = ("_offsets", "_labels", "_keys", "_masks")


class ShardDataset:
    """The samples of shards, by number.

    Cheap to pickle, and safe in forked or spawned loader workers: each process opens shards when it reads them.

    Args:
        path: a folder of shards, a shard, a pattern (``train-{000000..000127}.tar``) or a list of these; each a path,
            an ``http(s)://`` URL, ``pipe:COMMAND``, or any URL that iopath opens. Or a folder of images (listed.py).
            Or samples in no shard, from ``image_files`` or made by the caller.
        access: options for remote shards.

    Raises:
        ValueError: nothing is there, an index is of another version or differs from its files, or a URL does not
            answer.
    """

    def __init__(self, path: str | Path | Sequence[str] | ListedSamples, *, access: Access | None = None) -> None:
        self._access = access or Access()
        opened = cache(lambda: ShardCache(self._access))
        self.parts: list[Part]
        if isinstance(path, ListedSamples):
            self.path, self.parts = path.path, [path]
        else:
            given: str | list[str] = str(path) if isinstance(path, str | Path) else [str(p) for p in path]
            self.path = given if isinstance(given, str) else ", ".join(given)
            self.parts = open_parts(given, self._access, opened)
        self.remote = any(is_remote(place) for part in self.parts for place in part.places)
        """Whether any shard is remote."""
        self.cache = opened() if self.remote else None
        """The cache of remote shards."""
        self._reader = ShardReader(self.path, self.parts, self.cache)
        self.shards = self._reader.shards
        """Their entries in the index."""
        self.classes, self.conflicts = _merge_classes(self.parts)
        """Label name -> the names of its classes; and unusable label -> the reason."""
        self.mask_conflict: str | None = None
        """Why masks cannot be used, or None."""
        masked = {part.path: classes for part in self.parts if (classes := part.mask_classes) is not None}
        first, classes = next(iter(masked.items()), (None, ()))
        for path, others in masked.items():
            if others != classes:
                self.mask_conflict = f"masks have other classes in {path} than in {first}"
        self.has_masks = bool(masked) and not self.mask_conflict
        self.mask_classes: tuple[str, ...] = classes if self.has_masks else ()
        """Names of the classes of masks, from 0; empty if there are no masks or their names are unknown."""
        self.shard_sizes: IntArray = np.array([shard["samples"] for shard in self.shards], dtype=np.int64)
        """[shards] the number of samples of each shard."""
        self.unit_sizes: IntArray = _concatenate([part.unit_sizes for part in self.parts])
        """[units] samples that are read one after another, so an epoch shuffles units: a shard, or a file in none."""
        self.listed = [part for part in self.parts if isinstance(part, ListedSamples)]
        """The parts that are in no shard."""
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._open(verified=False)

    def _open(self, *, verified: bool) -> None:
        arrays = [(part, part.arrays(verified=verified)) for part in self.parts]
        self._offsets: IntArray = _concatenate([found[OFFSETS] for _, found in arrays])
        self._keys: NDArray[np.bytes_] = _concatenate([found[KEYS] for _, found in arrays])
        names = list(self.classes)
        self._labels: IntArray = _concatenate([_label_columns(part, found[LABELS], names) for part, found in arrays])
        self._masks: IntArray | None = None
        if self.has_masks:
            none = np.array([[-1, 0]])
            masks = [found[MASKS] if MASKS in found else none.repeat(len(found[KEYS]), axis=0) for _, found in arrays]
            self._masks = _concatenate(masks)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(verified=True)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        size = f"{len(self)} samples in {len(self.shards)} shards"
        return f"ShardDataset({self.path!r}: {size}, labels {[*self.classes]})"

    def shard_of(self, samples: IntArray | int) -> IntArray:
        """Return the number of each sample's shard, in the shape of ``samples``."""
        return np.searchsorted(self._starts, samples, side="right") - 1

    def fetch(self, shard: int) -> None:
        """Download a remote shard to the cache before it is needed; see ``ShardReader.fetch``."""
        if is_remote(self._reader.places[shard]):
            self._reader.fetch(shard)

    def labels(self, name: str) -> IntArray:
        """Return [N] int64 the class number of every sample.

        Raises:
            ValueError: the shards lack the label, or some samples do.
        """
        values = np.ascontiguousarray(self._labels[:, self._column(name)])
        missing = np.flatnonzero(values < 0)
        if len(missing):
            raise ValueError(
                f"label (={name!r}) is missing for {len(missing)} of {len(self)} samples of {self.path}, "
                f"first for {self.key(int(missing[0]))!r}; labelled({name!r}) gives the numbers of the others"
            )
        return values

    def labelled(self, name: str) -> IntArray:
        """Return [n] the numbers of the samples that have the label, ascending.

        Raises:
            ValueError: the shards lack the label.
        """
        return np.flatnonzero(self._labels[:, self._column(name)] >= 0)

    def _column(self, name: str) -> int:
        if name in self.conflicts:
            raise ValueError(self.conflicts[name])
        if not self.classes:
            raise ValueError(f"label (={name!r}) cannot be read: the shards in {self.path} are unlabelled")
        if name not in self.classes:
            raise ValueError(
                f"label (={name!r}) is not among the labels of {self.path}{did_you_mean(name, self.classes)} "
                f"They are: {', '.join(self.classes)}"
            )
        return list(self.classes).index(name)

    def key(self, i: int) -> str:
        """Return the sample's key: the path of its file in the source, without the extension."""
        return bytes(self._keys[self._checked(i)]).decode("utf-8")

    def image_files(self, samples: IntArray) -> list[ShardFile]:
        """Return where the image files of samples are; ``read()`` of each returns its bytes.

        Raises:
            IndexError: a number is outside 0 to N - 1.
        """
        if len(samples) and not 0 <= samples.min() <= samples.max() < len(self):
            raise IndexError(f"samples (={samples.min()} to {samples.max()}) must be 0 to {len(self) - 1}")
        keys = [key.decode("utf-8") for key in self._keys[samples].tolist()]
        places = zip(self.shard_of(samples).tolist(), self._offsets[samples, :2].tolist(), keys, strict=True)
        return [ShardFile(self._reader, shard, offset, size, key) for shard, (offset, size), key in places]

    def image_bytes(self, i: int) -> bytes:
        """Return the bytes of the image file.

        Raises:
            SampleError: they are unavailable; see ``ShardReader.read``.
        """
        i = self._checked(i)
        return self._member(i, self._offsets[i, :2])

    def image(self, i: int) -> Image.Image:
        """Return the decoded image, RGB and upright.

        Raises:
            ValueError: its bytes are unavailable, or cannot be decoded.
        """
        try:
            return decode(self.image_bytes(i))
        except (SampleError, ImageError) as error:
            raise self.unusable(i, error) from error

    def unusable(self, i: int, reason: Exception | str) -> ValueError:
        """Return the error for a sample that cannot be used."""
        return ValueError(f"sample {i} ({self.key(i)!r}) of {self.path} cannot be used: {reason}")

    def mask_bytes(self, i: int) -> bytes:
        """Return the bytes of the mask's PNG.

        Raises:
            SampleError: they are unavailable; see ``ShardReader.read``.
            ValueError: the shards or this sample have no mask.
        """
        i = self._checked(i)
        if self.mask_conflict:
            raise ValueError(self.mask_conflict)
        if self._masks is None:
            raise ValueError(f"mask of sample {i} cannot be read: the shards in {self.path} have no masks")
        if self._masks[i, 0] < 0:
            raise ValueError(f"sample {i} ({self.key(i)!r}) of {self.path} has no mask, though others have")
        return self._member(i, self._masks[i])

    def has_mask(self, i: int) -> bool:
        """Return whether a sample has a mask."""
        return self._masks is not None and bool(self._masks[self._checked(i), 0] >= 0)

    def mask(self, i: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return [H, W] uint8 the class of each pixel of the decoded image.

        Raises:
            ValueError: there is no mask, or it is no PNG of one 8-bit channel, or it has more than ``max_pixels``
                pixels.
        """
        data = self.mask_bytes(i)
        try:
            return decode_mask(data, max_pixels)
        except DECODE_ERRORS as error:
            raise ValueError(f"mask of sample {i} ({self.key(i)!r}) of {self.path} is not usable: {error}") from error

    def read(self, i: int) -> dict[str, Any]:
        """Return ``key``, ``image`` (PIL, RGB) and ``labels`` (name -> class number) of a sample."""
        return {"key": self.key(i), "image": self.image(i), "labels": self.labels_of(i)}

    def labels_of(self, i: int) -> dict[str, int]:
        """Return label name -> class number; without the labels that the sample lacks."""
        row = self._labels[self._checked(i)]
        return {name: int(v) for name, v in zip(self.classes, row, strict=True) if v >= 0}

    def _member(self, i: int, place: IntArray) -> bytes:
        return self._reader.read(int(self.shard_of(i)), int(place[0]), int(place[1]), self.key(i))

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample (={i}) must be 0 to {len(self) - 1}")
        return int(i)


def _concatenate(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _label_columns(part: Part, found: IntArray, names: Sequence[str]) -> IntArray:
    """Return [n, L] the labels of a part in the order of ``names``; -1 for a label that the part lacks."""
    own = list(part.classes)
    if own == list(names):
        return found
    none = np.full(len(found), -1)
    columns = [found[:, own.index(name)] if name in own else none for name in names]
    return np.array(columns, dtype=np.int64).reshape(len(names), len(found)).T


def _merge_classes(parts: Sequence[Part]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the classes of all parts, and the labels whose classes differ between parts, with the reason.

    A list of classes may be the beginning of a longer one: a foreign part lists classes up to its largest number.
    """
    merged: dict[str, tuple[str, ...]] = {}
    origin: dict[str, str] = {}
    conflicts: dict[str, str] = {}
    for part in parts:
        for name, classes in part.classes.items():
            shorter, longer = sorted((merged.get(name, ()), classes), key=len)
            if longer[: len(shorter)] != shorter:
                different = f"those of {part.path} differ from those of {origin[name]}"
                conflicts[name] = f"label (={name!r}) must have the same classes in all parts, but {different}"
                continue
            merged[name] = longer
            origin.setdefault(name, part.path)
    return {name: classes for name, classes in merged.items() if name not in conflicts}, conflicts
