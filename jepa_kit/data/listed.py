"""Samples that are in no shard: the image files of a folder or of a list, or anything else that is read by number.

``ShardDataset`` reads them as it reads shards: in an order that is a function of (seed, epoch), with exact resume, and
with damaged files left out. Labels are the folders of the files (sources/labels.py).

Legend: N samples, L labels.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_kit.data.folders import file_size, hidden, read_file, walk_files
from jepa_kit.data.shards.index import NAMES_AND_SIZES
from jepa_kit.data.shards.writing import KEYS, LABELS, OFFSETS, is_image
from jepa_kit.data.sources.keys import unique_keys
from jepa_kit.data.sources.labels import Labels, folder_labels, named_labels, split_folders
from jepa_kit.errors import SampleError, cause_of
from jepa_kit.rng import IntArray


@dataclass(frozen=True, eq=False)
class ListedSamples:
    """Samples of a data set that are in no shard; give them to ``ShardDataset``.

    Args:
        path: name of the data set, for messages.
        keys: [N] names of the samples, unique.
        sizes: [N] bytes of each sample's file; 0 if unknown.
        labels: of the samples.
        read: number -> bytes of an image file; it can be pickled, and raises SampleError for an unusable sample.
        digest: the same for the same samples, wherever they are: a run is resumed with an equal one only.
        notes: messages for the user.
        digest_of: what ``digest`` follows from, for messages.

    Raises:
        ValueError: there is no sample, or the lengths differ.
    """

    path: str
    keys: NDArray[np.bytes_]
    sizes: IntArray
    labels: Labels
    read: Callable[[int], bytes]
    digest: str
    notes: tuple[str, ...] = ()
    digest_of: str = NAMES_AND_SIZES

    def __post_init__(self) -> None:
        lengths = {"keys": len(self.keys), "sizes": len(self.sizes)}
        lengths |= {f"labels[{name!r}]": len(numbers) for name, numbers in self.labels.values.items()}
        if not len(self.keys):
            raise ValueError(f"data set (={self.path!r}) must have at least one sample")
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"data set (={self.path!r}) must have one key, size and label for each sample: {shown}")

    @property
    def places(self) -> list[str]:
        """Where the one entry of ``shards`` is."""
        return [self.path]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """One entry for all samples, as a shard has in an index."""
        name, size = os.path.basename(os.path.abspath(self.path)), int(self.sizes.clip(min=0).sum())
        return [{"file": name, "samples": len(self.keys), "bytes": size, "sha256": f"{self.digest_of}: {self.digest}"}]

    @property
    def unit_sizes(self) -> IntArray:
        """[N] ones: no two samples need be read one after another."""
        return np.ones(len(self.keys), dtype=np.int64)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Label name -> the names of its classes."""
        return self.labels.classes

    @property
    def mask_classes(self) -> None:
        """There are no masks."""

    @property
    def links(self) -> dict[str, list[str]]:
        """There are no tar headers, and so no names of links."""
        return {}

    def arrays(self, *, verified: bool = False) -> dict[str, NDArray[Any]]:
        """Return the arrays that shards have in their index; the offset of a sample is its number."""
        count = len(self.keys)
        offsets = np.stack([np.arange(count), self.sizes, np.full(count, -1), np.zeros(count, dtype=np.int64)], axis=1)
        columns = [self.labels.values[name] for name in self.classes]  # [L] of [N]
        labels = np.array(columns, dtype=np.int64).reshape(len(columns), count).T
        return {OFFSETS: offsets, LABELS: labels, KEYS: self.keys}


@dataclass(frozen=True, eq=False)
class _Files:
    """Read image files; arrays of bytes, because loader workers would copy the pages of a list of str.

    Args:
        root: folder of the names.
        names: [N] paths in it.
        sizes: [N] bytes.
    """

    root: str
    names: NDArray[np.bytes_]
    sizes: IntArray

    def __call__(self, i: int) -> bytes:
        """Return the content of file i.

        Raises:
            SampleError: it cannot be read, or has another size than before.
        """
        name = os.fsdecode(self.names[i])
        try:
            data = read_file(os.path.join(self.root, name))
        except OSError as error:
            raise SampleError(f"{name} of {self.root} cannot be read: {cause_of(error)}") from error
        if len(data) != self.sizes[i]:
            raise SampleError(
                f"{name} of {self.root} has {len(data)} bytes, but had {self.sizes[i]} when the data set was opened"
            )
        return data


def _listed(path: str, root: str, names: Sequence[str], sizes: Sequence[int], labels: Labels, *notes: str) -> Any:
    encoded, lengths = np.array([os.fsencode(name) for name in names]), np.array(sizes, dtype=np.int64)
    keys = np.array([key.encode() for key in unique_keys(names)])
    digest = hashlib.sha256()
    for name, size in zip(encoded.tolist(), sizes, strict=True):
        digest.update(b"%s\0%d\0" % (name, size))
    return ListedSamples(path, keys, lengths, labels, _Files(root, encoded, lengths), digest.hexdigest(), notes)


def image_folder(path: str) -> ListedSamples:
    """Return the image files in a folder and below it, in the order of their paths.

    Files with other extensions, hidden files and hidden folders are left out. The label ``class`` is the folder of a
    file, if files are in more than one; a file beside the folders has none.

    Raises:
        ValueError: there are no images.
    """
    every = sorted(walk_files(path))
    shown = [name for name in every if not hidden(name)]
    names = list(filter(is_image, shown))
    if not names:
        raise ValueError(f"shards (={path!r}) must be a folder of .tar shards or of images, but it contains neither")
    notes = []
    others = Counter(os.path.splitext(name)[1] for name in shown if not is_image(name))
    if others:
        listed = ", ".join(f"{count} {extension or 'without one'}" for extension, count in others.most_common(5))
        notes.append(f"{path}: left out {others.total()} files without the extension of an image: {listed}")
    if len(shown) < len(every):
        notes.append(f"{path}: left out {len(every) - len(shown)} hidden files")
    if splits := split_folders(names):
        notes.append(
            f"{path}: its folders {' and '.join(splits)} are one data set here; for one of them name that folder"
        )
    sizes = [file_size(os.path.join(path, name)) for name in names]
    return _listed(path, path, names, sizes, folder_labels(names, "auto"), *notes)


def image_files(
    paths: Sequence[str | os.PathLike[str]], labels: Sequence[str | int] | None = None, *, name: str = "files"
) -> ListedSamples:
    """Return image files in the given order.

    Args:
        paths: of the files; a run can be resumed with the same names below their common folder, wherever that is.
        labels: of the files, as label ``class``: names of classes, or numbers of classes; "" for no label. By default
            those of their folders, as in ``image_folder``.
        name: of the data set, for messages.

    Raises:
        ValueError: there is no path, one occurs twice, or the number of labels differs from that of the paths.
    """
    places = [os.path.abspath(path) for path in paths]
    if not places:
        raise ValueError("paths (=[]) must be at least one")
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise ValueError(f"paths must name each file once, but {twice[0]!r} occurs more than once")
    if labels is not None and len(labels) != len(places):
        raise ValueError(f"labels (of length {len(labels)}) must be one for each of {len(places)} paths")
    root = os.path.commonpath([os.path.dirname(place) for place in places])
    names = [os.path.relpath(place, root).replace(os.sep, "/") for place in places]
    given = folder_labels(names, "auto") if labels is None else named_labels({"class": [str(x) for x in labels]}, None)
    return _listed(name, root, names, [file_size(place) for place in places], given, *given.notes)
