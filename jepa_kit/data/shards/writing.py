"""Writing WebDataset tar shards and their index.

A folder of shards:

    shard-000000.tar ...   <key>.jpg or <key>.png; <key>.cls (the label 'class') or <key>.json (others, by name);
                           <key>.mask.png where there are masks: one 8-bit channel, a class number for each pixel
    index.json             format version; samples, bytes and SHA-256 of each shard; SHA-256 of the arrays; labels and
                           the names of their classes; masks and the names of theirs; what was refused and why; how it
                           was made; of foreign shards, links to members of other names
    offsets.npy            [N, 4] int64: byte offset and size of a sample's image, then of its label, inside its shard
                           (-1 and 0 where it has no label)
    labels.npy             [N, L] int64: the labels, in the order of index.json; -1 is "none"
    keys.npy               [N] bytes: the keys, UTF-8
    masks.npy              [N, 2] int64, only where there are masks: offset and size of a sample's mask, or -1 and 0

Nothing half-written ever has its final name: a shard is written beside it and moved there, and ``index.json``, which
makes a folder of shards a data set, comes last. A folder that a writer has begun and not finished holds ``UNFINISHED``.
Readers pass over keys of ``index.json`` and members of a sample that they do not know: masks came after the first
version 1, and need no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jepa_kit.files import atomic_write, sha256_of, write_text
from jepa_kit.rng import IntArray

FORMAT_VERSION = 1
INDEX, OFFSETS, LABELS, KEYS, MASKS = "index.json", "offsets.npy", "labels.npy", "keys.npy", "masks.npy"
UNFINISHED = "UNFINISHED"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "img")
"""Members of shards from elsewhere that are taken for the image of their sample."""
MASK_EXTENSION = "mask.png"
MAX_CLASSES = 65536
"""Whole numbers in a foreign .json up to here are taken for class numbers."""


@dataclass(frozen=True)
class Sample:
    """What goes into a shard.

    Args:
        key: unique; no dot after its last slash (WebDataset's extension begins there).
        extension: ``jpg`` or ``png``.
        image: bytes of the image file.
        labels: label name -> class number; empty where unlabelled.
        mask: bytes of a PNG of one 8-bit channel, a class number for each pixel of the image as it is stored; or none.
        note: what the user should know of how the image was understood; empty for nothing.
    """

    key: str
    extension: str
    image: bytes
    labels: Mapping[str, int] = field(default_factory=dict)
    mask: bytes | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Packed:
    """A sample as it lies in a tar file.

    Args:
        key: of the sample.
        data: its members, headers and padding included.
        places: [3, 2] offset in ``data`` and size of image, label and mask; -1 and 0 for what the sample lacks.
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
    """A written shard: its entry in ``index.json``."""

    file: str
    samples: int
    bytes: int
    sha256: str | None


@dataclass(frozen=True, eq=False)
class Rows:
    """A shard's part of the arrays beside the index.

    Args:
        keys: n keys.
        offsets: [n, 4] int64.
        labels: label name -> [n] int64, -1 where a sample has none.
        masks: [n, 2] int64, -1 and 0 where a sample has none.
        links: key -> names in the headers before its image and mask, if these are links to members of other names.
    """

    keys: list[str]
    offsets: IntArray
    labels: dict[str, IntArray]
    masks: IntArray
    links: dict[str, list[str]] = field(default_factory=dict)


def _to_disk(path: str) -> None:
    # of a file: else a power cut can leave the new name and not the bytes; of a folder: else it can take the name
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack(sample: Sample) -> Packed:
    """The members of a sample, sorted by extension; equal samples give equal bytes, and those of webdataset's writer.

    A sample's only label is written as ``<key>.cls`` if it is called ``class``; others as ``<key>.json``.
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
    """Bytes of a tar file whose members, with headers and padding, take so many: two empty blocks, whole records."""
    return -(-(members + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def write_shard(path: str, samples: Iterable[Sample]) -> tuple[Shard, Rows]:
    """Writes one tar file; equal samples give equal bytes."""
    return write_packed(path, map(pack, samples))


def write_packed(path: str, samples: Iterable[Packed]) -> tuple[Shard, Rows]:
    """Writes one tar file of samples that are packed already."""
    digest, size, keys, places, found = hashlib.sha256(), 0, [], [], []
    with atomic_write(path, shared=True) as temporary:
        with open(temporary, "wb") as stream:
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
    return shard, _rows(keys, np.array(places), found)


def _rows(keys: list[str], places: IntArray, found: Sequence[Mapping[str, int]]) -> Rows:
    """Args: places [n, 3, 2] of image, label and mask in the shard; the labels of each sample."""
    places = places.astype(np.int64).reshape(-1, 6)
    names = dict.fromkeys(name for row in found for name in row)
    labels = {name: np.array([row.get(name, -1) for row in found]) for name in names}
    return Rows(keys, places[:, :4], labels, places[:, 4:])


def write_index(
    folder: str,
    shards: Sequence[Shard],
    rows: Sequence[Rows],
    *,
    classes: Mapping[str, Sequence[str]],
    refused: Sequence[Mapping[str, str]],
    made_by: Mapping[str, Any],
    mask_classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes the arrays, then ``index.json``, and takes the mark of an unfinished folder away.

    Args:
        folder: of the shards.
        shards: in their order.
        rows: of each shard.
        classes: label name -> names of its classes.
        refused: ``name`` and ``reason`` of each sample that was left out.
        made_by: the tool and its options.
        mask_classes: names of the classes of masks, from 0; empty where there are none or they are not known.
        notes: what a user should know about labels that were found.
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
    sums = {}
    for name, array in arrays.items():
        with atomic_write(os.path.join(folder, name), shared=True) as temporary:
            with open(temporary, "wb") as stream:
                np.save(stream, array)
            sums[name] = sha256_of(temporary)
    index: dict[str, Any] = {
        "format": "jepa_kit shards",
        "version": FORMAT_VERSION,
        "samples": len(keys),
        "shards": [asdict(shard) for shard in shards],
        "arrays": sums,
        "labels": {name: list(names) for name, names in classes.items()},
        "refused": [dict(entry) for entry in refused],
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
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, UNFINISHED))
