"""Writing WebDataset tar shards and their index.

A folder of shards:

    shard-000000.tar ...   <key>.jpg or <key>.png, and <key>.cls (the label 'class') or <key>.json (others, by name)
    index.json             format version; samples, bytes and SHA-256 of each shard; labels and the names of their
                           classes; what was refused and why; how it was made
    offsets.npy            [N, 4] int64: byte offset and size of a sample's image, then of its label, inside its shard
                           (-1 and 0 where it has no label)
    labels.npy             [N, L] int64: the labels, in the order of index.json; -1 is "none"
    keys.npy               [N] bytes: the keys, UTF-8

Nothing half-written ever has its final name: a shard is written beside it and moved there, and ``index.json``, which
makes a folder of shards a data set, comes last. A folder that a writer has begun and not finished holds ``UNFINISHED``.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from jepa_kit.rng import IntArray

FORMAT_VERSION = 1
INDEX, OFFSETS, LABELS, KEYS = "index.json", "offsets.npy", "labels.npy", "keys.npy"
UNFINISHED = "UNFINISHED"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "img")
"""Members of shards from elsewhere that are taken for the image of their sample."""
MAX_CLASSES = 65536
"""Whole numbers in a foreign .json up to here are taken for class numbers."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """What goes into a shard.

    Args:
        key: unique; no dot after its last slash (WebDataset's extension begins there).
        extension: ``jpg`` or ``png``.
        image: bytes of the image file.
        labels: label name -> class number; empty where unlabelled.
    """

    key: str
    extension: str
    image: bytes
    labels: Mapping[str, int] = field(default_factory=dict)


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
    """

    keys: list[str]
    offsets: IntArray
    labels: dict[str, IntArray]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A name beside ``path`` to write to; it is moved to ``path`` if the block ends well, and removed if not."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.partial")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _to_disk(path: str) -> None:
    # else a power cut can leave the new name with the bytes still missing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(path: str, samples: Iterable[Sample]) -> tuple[Shard, Rows]:
    """Writes one tar file; equal samples give equal bytes.

    A sample's only label is written as ``<key>.cls`` if it is called ``class``; others as ``<key>.json``.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as stream, TarWriter(stream, mtime=0) as tar:
            for sample in samples:
                members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
                if sample.labels.keys() == {"class"}:
                    members["cls"] = str(sample.labels["class"])
                elif sample.labels:
                    members["json"] = json.dumps(dict(sample.labels))
                tar.write(members)
        rows, refused = scan_shard(temporary)
        assert not refused, refused
        return Shard(os.path.basename(path), len(rows.keys), os.path.getsize(temporary), _sha256(temporary)), rows


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def scan_shard(path: str) -> tuple[Rows, list[dict[str, str]]]:
    """Reads the tar headers of a shard, and its label members.

    Returns:
        The rows, and what was refused: ``name`` and ``reason``.

    Raises:
        ValueError: the file is not a tar archive, or is cut short.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                if member.isreg() and key:
                    samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = member
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar archive: {error}") from error
    refused: list[dict[str, str]] = []
    keys: list[str] = []
    offsets: list[tuple[int, int, int, int]] = []
    found: list[dict[str, int]] = []
    with open(path, "rb") as stream:
        for key, members in samples.items():
            image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
            if image is None:
                refused.append({"name": key, "reason": f"no image member, only: {', '.join(members)}"})
                continue
            label = members.get("cls") or members.get("json")
            place = (label.offset_data, label.size) if label else (-1, 0)
            keys.append(key)
            offsets.append((image.offset_data, image.size, *place))
            stream.seek(max(place[0], 0))
            found.append(_parse_label(stream.read(place[1]), "cls" in members))
    labels = {name: np.array([row.get(name, -1) for row in found]) for row in found for name in row}
    return Rows(keys, np.array(offsets, dtype=np.int64).reshape(-1, 4), labels), refused


def _parse_label(text: bytes, is_cls: bool) -> dict[str, int]:
    """Class numbers of a label member; what is no class number is left out."""
    try:
        found = {"class": int(text)} if is_cls else json.loads(text or b"{}")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if type(v) is int and 0 <= v < MAX_CLASSES}


def write_index(
    folder: str,
    shards: Sequence[Shard],
    rows: Sequence[Rows],
    *,
    classes: Mapping[str, Sequence[str]],
    refused: Sequence[Mapping[str, str]],
    made_by: Mapping[str, Any],
) -> None:
    """Writes the arrays, then ``index.json``, and takes the mark of an unfinished folder away."""
    keys = [key.encode("utf-8") for part in rows for key in part.keys]
    columns = [
        np.concatenate([part.labels.get(name, np.full(len(part.keys), -1)) for part in rows]) for name in classes
    ]
    arrays = {
        OFFSETS: np.concatenate([part.offsets for part in rows]),
        LABELS: np.array(columns, dtype=np.int64).reshape(len(classes), len(keys)).T,
        KEYS: np.array(keys, dtype=f"S{max(map(len, keys))}"),
    }
    for name, array in arrays.items():
        with replacing(os.path.join(folder, name)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, array)
    index = {
        "format": "jepa_kit shards",
        "version": FORMAT_VERSION,
        "samples": len(keys),
        "shards": [asdict(shard) for shard in shards],
        "labels": {name: list(names) for name, names in classes.items()},
        "refused": [dict(entry) for entry in refused],
        "made_by": dict(made_by),
    }
    with replacing(os.path.join(folder, INDEX)) as temporary, open(temporary, "w", encoding="utf-8") as text:
        json.dump(index, text, indent=1)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, UNFINISHED))


def index_shards(folder: str) -> None:
    """Gives shards from elsewhere their index, by reading their tar headers once.

    Labels are ``.cls`` members (label ``class``) or the whole numbers of ``.json`` members (by their names). Names
    of classes are not known: they are the numbers.

    Raises:
        ValueError: no such folder, no ``*.tar`` in it, a folder that a writer left unfinished, or a file that is not
            a tar archive.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but there is no such folder")
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise ValueError(f"shards (={folder!r}) were left unfinished: run make_shards again with --overwrite")
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    if not files:
        inner = [name for name in sorted(os.listdir(folder)) if os.path.exists(os.path.join(folder, name, INDEX))]
        hint = f"; these folders in it do: {', '.join(inner)}" if inner else ""
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but it holds none{hint}")
    log.info("indexing %d shards of %s, once", len(files), folder)
    shards, parts, refused = [], [], []
    for path in files:
        rows, bad = scan_shard(path)
        shards.append(Shard(os.path.basename(path), len(rows.keys), os.path.getsize(path), None))
        parts.append(rows)
        refused += [{"name": f"{os.path.basename(path)}: {entry['name']}", "reason": entry["reason"]} for entry in bad]
    if not any(part.keys for part in parts):
        raise ValueError(f"shards (={folder!r}) must hold images, but no sample of its {len(files)} shards has one")
    names = sorted({name for part in parts for name in part.labels})
    most = {name: max(int(part.labels[name].max()) for part in parts if name in part.labels) for name in names}
    classes = {name: [str(k) for k in range(most[name] + 1)] for name in names}
    write_index(folder, shards, parts, classes=classes, refused=refused, made_by={"tool": "index_shards"})
