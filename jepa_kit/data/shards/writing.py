"""Write WebDataset tar shards and their index.

A folder of shards contains:

    shard-000000.tar ...   <key>.jpg or <key>.png; <key>.cls (the label 'class') or <key>.json (other labels by name);
                           <key>.mask.png if there are masks: one 8-bit channel, a class number for each pixel
    index.json             format version; samples, bytes and SHA-256 of each shard; SHA-256 of the arrays; labels and
                           the names of their classes; masks and the names of theirs; what was refused and why; the
                           tool and its options; for foreign shards, links to members of other names
    offsets.npy            [N, 4] int64: byte offset and size of a sample's image, then of its label, in the shard; -1
                           and 0 if there is no label
    labels.npy             [N, L] int64: the labels, in the order of index.json; -1 for no label
    keys.npy               [N] bytes: the keys, in UTF-8
    masks.npy              [N, 2] int64, only if there are masks: offset and size of a sample's mask; -1 and 0 for none

Every file is written under a temporary name and renamed. ``index.json`` comes last: it makes the folder a data set.
Until then the folder contains ``UNFINISHED``. Readers ignore unknown keys of ``index.json`` and unknown members of a
sample, so that masks could be added without a new format version.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jepa_kit.data.shards.tars import Refusal
from jepa_kit.files import atomic_write, sha256_of, write_text
from jepa_kit.rng import IntArray

FORMAT_VERSION = 1
INDEX, OFFSETS, LABELS, KEYS, MASKS = "index.json", "offsets.npy", "labels.npy", "keys.npy", "masks.npy"
UNFINISHED = "UNFINISHED"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "img")
"""Extensions of the image of a sample, the preferred one first; other tools write some of them."""
MASK_EXTENSION = "mask.png"
MAX_CLASSES = 65536
"""Class numbers are below this; larger integers in a foreign .json are no labels."""


@dataclass(frozen=True)
class Sample:
    """A sample to write.

    Args:
        key: unique; no dot after its last slash, since WebDataset's extension begins there.
        extension: ``jpg`` or ``png``.
        image: bytes of the image file.
        labels: label name -> class number; empty if unlabelled.
        mask: bytes of a PNG with one 8-bit channel, a class number for each pixel of the stored image; or None.
        note: how the image was interpreted, for the user; empty if it needs no comment.
    """

    key: str
    extension: str
    image: bytes
    labels: Mapping[str, int] = field(default_factory=dict)
    mask: bytes | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Packed:
    """A sample as bytes of a tar file.

    Args:
        key: of the sample.
        data: its members, headers and padding included.
        places: [3, 2] offset in ``data`` and size of image, label and mask; -1 and 0 for a missing one.
        labels: label name -> class number.
        note: see ``Sample``.
    """

    key: str
    data: bytes
    places: IntArray
    labels: Mapping[str, int]
    note: str = ""


@dataclass(frozen=True)
class Shard:
    """The entry of a shard in ``index.json``."""

    file: str
    samples: int
    bytes: int
    sha256: str | None


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one shard in the arrays of the index.

    Args:
        keys: n keys.
        offsets: [n, 4] int64.
        labels: label name -> [n] int64, -1 for no label.
        masks: [n, 2] int64, -1 and 0 for no mask.
        links: key -> names in the tar headers of its image and mask, if these are links to members of other names.
    """

    keys: list[str]
    offsets: IntArray
    labels: dict[str, IntArray]
    masks: IntArray
    links: dict[str, list[str]] = field(default_factory=dict)


def pack(sample: Sample) -> Packed:
    """Return the tar members of a sample, sorted by extension, with the same bytes as webdataset's `TarWriter`.

    A single label called ``class`` becomes ``<key>.cls``; other labels become ``<key>.json``.
    """
    label = ""
    members = {sample.extension: sample.image}
    if sample.mask is not None:
        members[MASK_EXTENSION] = sample.mask
    if sample.labels.keys() == {"class"}:
        label, members["cls"] = "cls", str(sample.labels["class"]).encode()
    elif sample.labels:
        label, members["json"] = "json", json.dumps(dict(sample.labels)).encode()
    data, found = b"", {}
    for extension, content in sorted(members.items()):
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size, info.mode, info.uname, info.gname = len(content), 0o444, "bigdata", "bigdata"
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8")
        found[extension] = len(data) + len(header), len(content)
        data += header + content + bytes(-len(content) % tarfile.BLOCKSIZE)
    places = [found.get(name, (-1, 0)) for name in (sample.extension, label, MASK_EXTENSION)]
    return Packed(sample.key, data, np.array(places, dtype=np.int64), sample.labels, sample.note)


def tar_size(members: int) -> int:
    """Return the bytes of a tar file, given those of its members with headers and padding.

    A tar file ends with two empty blocks, padded to a multiple of 10240 bytes.
    """
    return -(-(members + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def is_image(name: str) -> bool:
    """Return whether a file has the extension of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def write_shard(path: str, samples: Iterable[Sample]) -> tuple[Shard, Rows]:
    """Write a shard; equal samples give equal bytes."""
    return write_packed(path, map(pack, samples))


def write_packed(path: str, samples: Iterable[Packed]) -> tuple[Shard, Rows]:
    """Write a shard of packed samples."""
    digest, size, keys, places, found = hashlib.sha256(), 0, [], [], []
    with atomic_write(path, shared=True) as temporary, temporary.open("wb") as stream:
        for sample in samples:
            stream.write(sample.data)
            digest.update(sample.data)
            keys.append(sample.key)
            places.append(sample.places + np.array([[size, 0]]) * (sample.places[:, :1] >= 0))
            found.append(sample.labels)
            size += len(sample.data)
        end = bytes(tar_size(size) - size)
        stream.write(end)
        digest.update(end)
    shard = Shard(os.path.basename(path), len(keys), size + len(end), digest.hexdigest())
    return shard, make_rows(keys, np.array(places), found)


def make_rows(
    keys: list[str],
    places: IntArray,
    found: Sequence[Mapping[str, int]],
    links: dict[str, list[str]] | None = None,
) -> Rows:
    """Return the rows of a shard.

    Args:
        keys: of n samples.
        places: [n, 3, 2] offset and size of image, label and mask.
        found: label name -> class number, of each sample.
        links: see ``Rows``.
    """
    places = places.astype(np.int64).reshape(-1, 6)
    names = dict.fromkeys(name for row in found for name in row)
    labels = {name: np.array([row.get(name, -1) for row in found]) for name in names}
    return Rows(keys, places[:, :4], labels, places[:, 4:], links or {})


def write_index(
    folder: str,
    shards: Sequence[Shard],
    rows: Sequence[Rows],
    *,
    classes: Mapping[str, Sequence[str]],
    refused: Sequence[Refusal],
    made_by: Mapping[str, Any],
    mask_classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the arrays, then ``index.json``, and delete ``UNFINISHED``.

    Args:
        folder: of the shards.
        shards: in their order.
        rows: of each shard.
        classes: label name -> names of its classes.
        refused: the samples that were left out.
        made_by: the tool and its options.
        mask_classes: names of the classes of masks, from 0; empty if there are no masks or their names are unknown.
        notes: messages about the labels, for the user.
    """
    keys = [key.encode("utf-8") for part in rows for key in part.keys]
    columns = [
        np.concatenate([part.labels.get(name, np.full(len(part.keys), -1)) for part in rows]) for name in classes
    ]
    arrays = {
        OFFSETS: np.concatenate([part.offsets for part in rows]),
        LABELS: np.array(columns, dtype=np.int64).reshape(len(classes), len(keys)).T,
        KEYS: np.array(keys, dtype=f"S{max(map(len, keys))}"),
    }
    masks = np.concatenate([part.masks for part in rows])
    if (masks[:, 0] >= 0).any():
        arrays[MASKS] = masks
    for name, array in arrays.items():
        with atomic_write(Path(folder, name), shared=True) as temporary, temporary.open("wb") as stream:
            np.save(stream, array)
    index: dict[str, Any] = {
        "format": "jepa_kit shards",
        "version": FORMAT_VERSION,
        "samples": len(keys),
        "shards": [asdict(shard) for shard in shards],
        "arrays": {name: sha256_of(Path(folder, name)) for name in arrays},
        "labels": {name: list(names) for name, names in classes.items()},
        "refused": [entry._asdict() for entry in refused],
        "made_by": dict(made_by),
    }
    links: dict[str, list[str]] = {}
    for part in rows:
        for key, names in part.links.items():
            links.setdefault(key, []).extend(names)
    index |= {key: found for key, found in (("links", links), ("notes", list(notes))) if found}
    if MASKS in arrays:
        index["masks"] = {"samples": int((masks[:, 0] >= 0).sum()), "classes": list(mask_classes)}
    write_text(Path(folder, INDEX), json.dumps(index, indent=1), shared=True)
    Path(folder, UNFINISHED).unlink(missing_ok=True)
