"""CIFAR-10's and CIFAR-100's python archives (Krizhevsky, 2009): pixels in pickles, which become PNG.

Loading a pickle can run code, so the unpickler here accepts only the names that a numpy array needs, and replaces them
by classes that keep its shape and bytes. The archive's batches are the splits ``train`` and ``test``.

Legend: n images of 32 x 32 pixels, colour planes one after another, row by row.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import encode_png
from jepa_kit.data.shards.tars import STREAM_ERRORS, read_files
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.sources.base import Recode, Source, fingerprint
from jepa_kit.data.sources.keys import unique_keys
from jepa_kit.data.sources.labels import Labels
from jepa_kit.errors import PICKLE_ERRORS
from jepa_kit.rng import IntArray

SIDE = 32

LAYOUTS: dict[str, tuple[str, dict[str, tuple[str, str]], dict[str, tuple[str, ...]]]] = {
    "cifar-10-batches-py": (
        "batches.meta",
        {"class": ("labels", "label_names")},
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
    ),
    "cifar-100-python": (
        "meta",
        {"fine": ("fine_labels", "fine_label_names"), "coarse": ("coarse_labels", "coarse_label_names")},
        {"train": ("train",), "test": ("test",)},
    ),
}
"""Top folder of the archive -> names of its files and keys:

- the file of the class names;
- label name -> (key of the class numbers in a batch, key of the class names in that file);
- subfolder of the output -> its batches.
"""


class _Array:
    """The state of a pickled numpy array."""

    shape: tuple[int, ...]
    raw: bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, fortran, self.raw = state
        if not isinstance(dtype, _DType) or dtype.code != b"u1" or fortran or not isinstance(self.raw, bytes):
            raise pickle.UnpicklingError("an array must be of unsigned bytes, in the order of C")

    def pixels(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.raw, dtype=np.uint8).reshape(self.shape)


class _DType:
    def __init__(self, code: object, *_: object) -> None:
        self.code = code.encode() if isinstance(code, str) else code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and the like, which single bytes do not need."""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): _Array,  # named, and never called
    ("numpy", "dtype"): _DType,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a batch of CIFAR")
        return _KNOWN[module, name]


def unpickle(data: bytes) -> dict[str, Any]:
    """Return the content of a batch file: keys are str, arrays are [n, 3072] uint8.

    Raises:
        ValueError: it is no pickle of a dict, or it names anything else than an array of bytes.
    """
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError(f"a batch must be a dict, but is a {type(found).__name__}")
        return {_text(key): value.pixels() if isinstance(value, _Array) else value for key, value in found.items()}
    except (*PICKLE_ERRORS, MemoryError, OverflowError) as error:
        raise ValueError(f"not a batch of CIFAR: {error}") from error


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Cifar(Source):
    """The images of an archive, in the order of its batches.

    Args:
        path: of the archive, .tar.gz or .tar.
        recode: whether and how images are encoded again.

    Raises:
        ValueError: the archive is damaged, or a batch is missing or invalid.
    """

    def __init__(self, path: str, recode: Recode) -> None:
        folder = cifar_folder(path)
        assert folder is not None, path  # the caller chose this source by it
        file, label_keys, splits = LAYOUTS[folder]
        try:
            files = read_files(path, "r|*")
        except STREAM_ERRORS as error:
            raise ValueError(f"source (={path!r}) is not a complete tar archive: {error}") from error
        self.recode = recode
        images: list[NDArray[np.uint8]] = []
        self._names: list[str] = []
        self.splits: dict[str, IntArray] = {}
        labels: dict[str, list[int]] = {name: [] for name in label_keys}
        try:
            meta = unpickle(files[file])
            self.classes = {name: tuple(map(_text, meta[key])) for name, (_, key) in label_keys.items()}
            for split, batches in splits.items():
                start = len(self._names)
                for file in batches:  # the name is also for the error below
                    content = unpickle(files[file])
                    pixels = content["data"]
                    images.append(pixels.reshape(-1, 3, SIDE, SIDE))
                    self._names += map(_text, content["filenames"])
                    for name, (key, _) in label_keys.items():
                        labels[name] += _numbers(content[key], len(pixels), len(self.classes[name]))
                    if len(self._names) != sum(map(len, images)):
                        raise ValueError(f"{len(content['filenames'])} names for {len(pixels)} images")
                self.splits[split] = np.arange(start, len(self._names))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            missing = " is missing" if isinstance(error, KeyError) else ""
            raise ValueError(f"{file} in source (={path!r}) is invalid: {error}{missing}") from error
        self._images = np.concatenate(images)  # [n, 3, 32, 32]
        self._labels = Labels(self.classes, {name: np.array(numbers) for name, numbers in labels.items()})
        self._keys = unique_keys(self._names)

    def name(self, i: int) -> str:
        return self._names[i]

    def sample(self, i: int) -> Sample:
        png = encode_png(Image.fromarray(np.ascontiguousarray(self._images[i].transpose(1, 2, 0))))
        if self.recode == Recode():  # the PNG stays as it is, and needs no decoding
            return Sample(self._keys[i], "png", png, self._labels.of(i))
        return self.recode.sample(self._keys[i], png, self._labels.of(i))

    def fingerprint(self) -> str:
        return fingerprint([*self._names, *(numbers.tolist() for numbers in self._labels.values.values())])


def _numbers(values: object, count: int, classes: int) -> list[int]:
    """Return the class numbers of a batch, or raise a ValueError if they are invalid."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"must have one label for each of {count} images")
    wrong = [v for v in values if type(v) is not int or not 0 <= v < classes]
    if wrong:
        raise ValueError(f"label (={wrong[0]!r}) must be 0 to {classes - 1}")
    return values


def cifar_folder(path: str) -> str | None:
    """Return the folder of ``LAYOUTS`` at the start of an archive, or None; reads only the first header."""
    try:
        with tarfile.open(path, "r|*") as tar:
            first = tar.next()
    except STREAM_ERRORS:
        return None  # reading the whole archive raises the error
    folder = first.name.removeprefix("./").split("/")[0] if first else ""
    return folder if folder in LAYOUTS else None
