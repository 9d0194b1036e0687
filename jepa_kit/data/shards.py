"""Reading WebDataset tar shards: any sample at once, in any order.

The format is described in ``shard_writing.py``; any reader of WebDataset streams the tar files alone. Here the offsets
are memory-mapped and a sample is one ``pread``: an order can then be any pure function, and to resume costs nothing.
Shards from elsewhere get their index once, from their tar headers (``index_shards``).

Legend: N samples of all shards, in the order of the shards; L labels of a sample.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from iopath.common.file_io import HTTPURLHandler, PathManager
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import DECODE_ERRORS, decode
from jepa_kit.data.shard_writing import FORMAT_VERSION, INDEX, KEYS, LABELS, OFFSETS, index_shards
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray

OPEN_SHARDS = 128
"""At most so many shards are open at a time in one process."""

path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as ``s3://...``, and no local folder."""
    return "://" in path


def local_file(folder: str, name: str) -> str:
    """The path of a file of a data set on this machine, fetched by iopath where the folder is not here."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    address = f"{folder.rstrip('/')}/{name}"
    try:
        return str(path_manager.get_local_path(address))
    except OSError as error:  # of which urllib's errors are one
        raise ValueError(f"{address} cannot be fetched: {error}") from error


def _mapped(folder: str, name: str) -> NDArray[Any]:
    try:
        # a plain array over the mapped file: indexing np.memmap itself costs several times as much
        return np.asarray(np.load(local_file(folder, name), mmap_mode="r"))
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing from {folder}, but {INDEX} is there: make the shards again") from error


class ShardDataset:
    """Samples of a folder of shards, by number.

    Cheap to pickle and safe in forked or spawned loader workers: each process opens shards as it needs them.

    Args:
        path: a folder of shards, or an address that iopath opens (``https://...``).

    Raises:
        ValueError: there is no such folder or no shard in it; an index of another version, or one that disagrees
            with its own files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        if not is_remote(self.path) and not os.path.isfile(os.path.join(self.path, INDEX)):
            index_shards(self.path)
        try:
            with open(local_file(self.path, INDEX), encoding="utf-8") as f:
                index = json.load(f)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}/{INDEX} is not whole: {error}; make the shards again") from error
        version = index.get("version") if isinstance(index, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.path}/{INDEX} has version (={version!r}), but this release reads version {FORMAT_VERSION}: "
                "make the shards again, or use the release that made them"
            )
        self.shards: list[dict[str, Any]] = index["shards"]
        self.classes: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in index["labels"].items()}
        """Label name -> the names of its classes."""
        self._starts = np.concatenate([[0], np.cumsum([s["samples"] for s in self.shards])]).astype(np.int64)
        self._open()
        if len(self._offsets) != len(self):
            raise ValueError(
                f"{self.path}/{OFFSETS} lists {len(self._offsets)} samples, but {INDEX} has {len(self)}: "
                "make the shards again"
            )

    def _open(self) -> None:
        self._offsets: IntArray = _mapped(self.path, OFFSETS)
        self._labels: IntArray = _mapped(self.path, LABELS)
        self._keys: NDArray[np.bytes_] = _mapped(self.path, KEYS)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_offsets", "_labels", "_keys", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return (
            f"ShardDataset({self.path!r}: {len(self)} samples in {len(self.shards)} shards, labels {[*self.classes]})"
        )

    @property
    def shard_sizes(self) -> IntArray:
        """[shards] how many samples each shard holds."""
        return np.diff(self._starts)

    def labels(self, name: str) -> IntArray:
        """[N] int64: every sample's class number.

        Raises:
            ValueError: the shards do not carry the label, or not for every sample.
        """
        if not self.classes:
            raise ValueError(f"label (={name!r}) cannot be read: the shards in {self.path} are unlabelled")
        if name not in self.classes:
            raise ValueError(
                f"label (={name!r}) is not among the labels of {self.path}{did_you_mean(name, self.classes)} "
                f"They are: {', '.join(self.classes)}"
            )
        values = np.ascontiguousarray(self._labels[:, list(self.classes).index(name)])
        missing = np.flatnonzero(values < 0)
        if len(missing):
            raise ValueError(
                f"label (={name!r}) is missing for {len(missing)} of {len(self)} samples of {self.path}, "
                f"first for {self.key(int(missing[0]))!r}"
            )
        return values

    def key(self, i: int) -> str:
        """The sample's name: the path of its file in the source, without the extension."""
        return bytes(self._keys[self._checked(i)]).decode("utf-8")

    def image_bytes(self, i: int) -> bytes:
        """The bytes of the image file, as they are in the shard."""
        i = self._checked(i)
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        offset, size = (int(v) for v in self._offsets[i, :2])
        data = os.pread(self._descriptor(shard), size, offset)
        assert len(data) == size, (self.path, i)  # the shard's length was checked when it was opened
        return data

    def image(self, i: int) -> Image.Image:
        """The decoded image, RGB and upright.

        Raises:
            ValueError: its bytes cannot be decoded.
        """
        data = self.image_bytes(i)
        try:
            return decode(data)
        except DECODE_ERRORS as error:
            raise ValueError(f"sample {i} ({self.key(i)!r}) of {self.path} cannot be decoded: {error}") from error

    def read(self, i: int) -> dict[str, Any]:
        """``key``, ``image`` (PIL, RGB), and ``labels`` (name -> class number; those that the sample has)."""
        row = self._labels[self._checked(i)]
        labels = {name: int(v) for name, v in zip(self.classes, row, strict=True) if v >= 0}
        return {"key": self.key(i), "image": self.image(i), "labels": labels}

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample (={i}) must be 0 to {len(self) - 1}")
        return int(i)

    def _descriptor(self, shard: int) -> int:
        """An open file of the shard; the one that was used longest ago is closed beyond ``OPEN_SHARDS``."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        entry = self.shards[shard]
        try:
            descriptor = os.open(local_file(self.path, entry["file"]), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ValueError(f"shard {entry['file']} of {self.path} is missing, but {INDEX} lists it") from error
        size = os.fstat(descriptor).st_size
        if size != entry["bytes"]:
            os.close(descriptor)
            raise ValueError(
                f"shard {entry['file']} of {self.path} holds {size} bytes, but {INDEX} says {entry['bytes']}: "
                "it was cut short or changed; copy or make it again"
            )
        self._files[shard] = descriptor
        if len(self._files) > OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return descriptor
