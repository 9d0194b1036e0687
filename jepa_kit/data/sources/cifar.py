"""CIFAR-10's and CIFAR-100's python archives (Krizhevsky, 2009): pixels in pickles, which become PNG.

Loading a pickle can run code, so the unpickler here accepts three names only and returns arrays as bytes. The archive's
batches are the splits ``train`` and ``test``.

Legend: n images of 32 x 32 pixels, colour planes one after another, row by row.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import encode_png
from jepa_kit.data.shards.tars import STREAM_ERRORS, read_files
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.sources.base import Recode, Source, fingerprint, unique_keys
from jepa_kit.rng import IntArray

SIDE = 32


@dataclass(frozen=True)
class Layout:
    """Names of the files and keys in an archive.

    Args:
        meta: the file of the class names.
        labels: label name -> (key of the class numbers in a batch, key of the class names in ``meta``).
        splits: subfolder of the output -> its batches.
    """

    meta: str
    labels: dict[str, tuple[str, str]]
    splits: dict[str, tuple[str, ...]]


LAYOUTS = {
    "cifar-10-batches-py": Layout(
        "batches.meta",
        {"class": ("labels", "label_names")},
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
    ),
    "cifar-100-python": Layout(
        "meta",
        {"fine": ("fine_labels", "fine_label_names"), "coarse": ("coarse_labels", "coarse_label_names")},
        {"train": ("train",), "test": ("test",)},
    ),
}
"""Top folder of the archive -> its layout."""


class _Array:
    """The state of a pickled numpy array."""

    shape: tuple[int, ...]
    raw: bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, fortran, self.raw = state
        if not isinstance(dtype, _DType) or dtype.code != b"u1" or fortran or not isinstance(self.raw, bytes):
            raise pickle.UnpicklingError("an array must be of unsigned bytes, in the order of C")


class _DType:
    def __init__(self, code: object, *_: object) -> None:
        self.code = code.encode() if isinstance(code, str) else code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and the like, which single bytes do not need."""


class _Kind:
    """Stands for ``numpy.ndarray``, which the pickle names and never calls."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Kind,
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
        return {_text(key): _pixels(value) if isinstance(value, _Array) else value for key, value in found.items()}
    except (  # all that pickle raises on arbitrary bytes
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, MemoryError),
        *(OverflowError, ImportError),
    ) as error:
        raise ValueError(f"not a batch of CIFAR: {error}") from error


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pixels(array: _Array) -> NDArray[np.uint8]:
    return np.frombuffer(array.raw, dtype=np.uint8).reshape(array.shape)


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
        assert folder is not None, path
        layout = LAYOUTS[folder]
        try:
            files = read_files(path, "r|*")
        except STREAM_ERRORS as error:
            raise ValueError(f"source (={path!r}) is not a complete tar archive: {error}") from error
        self.recode = recode
        images: list[NDArray[np.uint8]] = []
        names: list[str] = []
        self.splits: dict[str, IntArray] = {}
        labels: dict[str, list[int]] = {name: [] for name in layout.labels}
        self.classes: dict[str, tuple[str, ...]] = {}
        batch = layout.meta
        try:
            meta = unpickle(files[batch])
            self.classes = {name: tuple(map(_text, meta[key])) for name, (_, key) in layout.labels.items()}
            for split, batches in layout.splits.items():
                start = len(names)
                for batch in batches:
                    content = unpickle(files[batch])
                    pixels = content["data"]
                    images.append(pixels.reshape(-1, 3, SIDE, SIDE))
                    names += map(_text, content["filenames"])
                    for name, (key, _) in layout.labels.items():
                        labels[name] += _numbers(content[key], len(pixels), len(self.classes[name]))
                    if len(names) != sum(map(len, images)):
                        raise ValueError(f"{len(content['filenames'])} names for {len(pixels)} images")
                self.splits[split] = np.arange(start, len(names))
        except KeyError as error:
            raise ValueError(f"{batch} in source (={path!r}) is invalid: {error} is missing") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{batch} in source (={path!r}) is invalid: {error}") from error
        self._images = np.concatenate(images)  # [n, 3, 32, 32]
        self._labels: dict[str, IntArray] = {name: np.array(numbers) for name, numbers in labels.items()}
        self._names, self._keys = names, unique_keys(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return self._names[i]

    def sample(self, i: int) -> Sample:
        png = encode_png(Image.fromarray(np.ascontiguousarray(self._images[i].transpose(1, 2, 0))))
        labels = {name: int(numbers[i]) for name, numbers in self._labels.items()}
        if self.recode == Recode():
            return Sample(self._keys[i], "png", png, labels)
        return self.recode.sample(self._keys[i], png, labels)

    def fingerprint(self) -> str:
        return fingerprint([*self._names, *(numbers.tolist() for numbers in self._labels.values())])


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
