"""Make an index for shards without one, by reading their tar headers and the bytes for their SHA-256 once.

A sample has all tar members of one name up to its first dot. Its image is the member with a known extension. Its labels
are a ``.cls`` member (label ``class``), or the integers of a ``.json`` member by their names, except image sizes and
names whose numbers are out of range for classes. Class names are unknown, so they are the numbers.

A damaged shard loses only what is damaged: the samples before a cut and around a corrupt range are used. What is left
out is listed in the index under ``refused``, as are sparse files and devices. A hard or symbolic link stands for its
target, if that is in the same shard.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from jepa_kit.data.folders import walk_files
from jepa_kit.data.shards.members import group_samples, list_members
from jepa_kit.data.shards.tars import BLOCK, COMPRESSED, Refusal, compressed_shard, compression
from jepa_kit.data.shards.writing import (
    IMAGE_EXTENSIONS,
    INDEX,
    MASK_EXTENSION,
    MAX_CLASSES,
    UNFINISHED,
    Rows,
    Shard,
    is_image,
    make_rows,
    write_index,
)
from jepa_kit.files import sha256_of, write_text

INDEXER = 2
"""Version of the indexes of foreign shards; those of other versions are made again. 2: checksums, links."""
SIZES = ("width", "height", "original_width", "original_height")
"""Integers that img2dataset writes into .json members and that are no labels."""
SEARCHED_FILES = 1000
"""Files of a folder without shards that are searched for images."""
REPORT_EVERY = 30.0
"""Seconds between two messages about the progress."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scan:
    """The content of a shard.

    Args:
        entry: of the index.
        rows: its samples.
        refused: samples without an image, invalid labels, and damaged ranges.
        outside: name of an integer in .json members -> number of samples in which it is out of range for classes.
    """

    entry: Shard
    rows: Rows
    refused: list[Refusal]
    outside: dict[str, int]

    def save(self, path: str) -> None:
        """Write a JSON file, so that indexing can resume after this shard."""
        write_text(Path(path), json.dumps(asdict(self), default=np.ndarray.tolist), shared=True)

    @classmethod
    def load(cls, path: str) -> Scan | None:
        """Return what `save` wrote, or None if there is no such file or it is damaged."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = Rows(**saved["rows"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        offsets, masks = (np.array(x, dtype=np.int64).reshape(-1, n) for x, n in ((rows.offsets, 4), (rows.masks, 2)))
        labels = {name: np.array(numbers, dtype=np.int64) for name, numbers in rows.labels.items()}
        rows = replace(rows, offsets=offsets, masks=masks, labels=labels)
        return cls(Shard(**saved["entry"]), rows, [Refusal(*r) for r in saved["refused"]], saved["outside"])


def scan(path: str, name: str, *, checksum: bool = False) -> Scan:
    """Read the tar headers and the label members of a shard.

    Args:
        path: of the file.
        name: of the shard in the index.
        checksum: whether to compute its SHA-256, which reads the whole file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is compressed.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        if how := compression(stream.read(BLOCK)):
            raise compressed_shard(path, how)
    members, refused = list_members(path)
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    found: list[dict[str, int]] = []
    links: dict[str, list[str]] = {}
    outside: Counter[str] = Counter()
    with open(path, "rb") as stream:
        for key, parts in group_samples(members):
            image = next((parts[e] for e in IMAGE_EXTENSIONS if e in parts), None)
            if image is None:
                refused.append(Refusal(key, f"no image member, only: {', '.join(parts)}"))
                continue
            kind = next((k for k in ("cls", "json") if k in parts), None)
            label, mask = parts[kind] if kind else None, parts.get(MASK_EXTENSION)
            keys.append(key)
            places.append([(m.offset, m.size) if m else (-1, 0) for m in (image, label, mask)])
            if linked := [m.header for m in (image, mask) if m and m.header != m.name]:
                links.setdefault(key, []).extend(linked)
            labels: dict[str, int] = {}
            if label is not None:
                stream.seek(label.offset)
                labels, fault, beyond = parse_label(stream.read(label.size), kind == "cls")
                outside.update(beyond)
                if fault:
                    refused.append(Refusal(f"{key}.{kind}", f"{fault}: used without that label"))
            found.append(labels)
    entry = Shard(name, len(keys), size, sha256_of(path) if checksum else None)
    return Scan(entry, make_rows(keys, np.array(places), found, links), refused, dict(outside))


def parse_label(text: bytes, is_cls: bool) -> tuple[dict[str, int], str | None, list[str]]:
    """Return the class numbers of a label member, what is wrong with it, and names whose numbers are out of range.

    Values of a .json that are not integers are ignored, and -1 means no label.
    """
    shown = text[:40].decode(errors="replace")
    try:
        found = {"class": int(text)} if is_cls else json.loads(text or b"{}")
    except (ValueError, RecursionError):  # JSON that is nested thousands of levels deep
        return {}, f"{shown!r} is no {'class number' if is_cls else 'JSON'}", []
    if not isinstance(found, dict):
        return {}, f"{shown!r} is no mapping of labels", []
    integers = {k: v for k, v in found.items() if type(v) is int}
    labels = {k: v for k, v in integers.items() if 0 <= v < MAX_CLASSES}
    if is_cls and not labels:
        return {}, f"{shown!r} is no class number from 0 to {MAX_CLASSES - 1}", []
    return labels, None, [k for k, v in integers.items() if k not in labels and v != -1]


def write_foreign_index(folder: str, scans: Sequence[Scan], path: str) -> None:
    """Write the index of scanned shards, and log what it leaves out.

    Args:
        folder: of the index.
        scans: in the order of the shards.
        path: of the data set, for messages.

    Raises:
        ValueError: no sample has an image.
    """
    parts = [s.rows for s in scans]
    refused = [Refusal(f"{s.entry.file}: {name}", reason) for s in scans for name, reason in s.refused]
    if not any(part.keys for part in parts):
        reasons = "".join(f"; {name}: {reason}" for name, reason in refused[:3])
        raise ValueError(
            f"shards (={path!r}) must contain images, but no sample of its {len(parts)} shards has one{reasons}"
        )
    names, notes, missing = _choose_labels(scans)
    refused += missing
    for name, reason in refused[:10]:
        log.warning("%s: %s", name, reason)
    if len(refused) > 10:
        log.warning("and %d more; %s lists all under 'refused'", len(refused) - 10, os.path.join(folder, INDEX))
    for text in notes:
        log.warning("%s: %s", path, text)
    most = {name: max(int(part.labels[name].max()) for part in parts if name in part.labels) for name in names}
    classes = {name: [str(k) for k in range(most[name] + 1)] for name in names}
    made_by = {"tool": "index_shards", "version": INDEXER}
    write_index(folder, [s.entry for s in scans], parts, classes=classes, refused=refused, made_by=made_by, notes=notes)


def _choose_labels(scans: Sequence[Scan]) -> tuple[list[str], list[str], list[Refusal]]:
    """Return which integers of foreign shards are labels, notes on the others, and labels that some samples lack."""
    outside: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for found in scans:
        outside.update(found.outside)
        within.update({name: int((numbers >= 0).sum()) for name, numbers in found.rows.labels.items()})
    limits = f"have a number outside 0 to {MAX_CLASSES - 1}"
    sizes = sorted(name for name in {*outside, *within} if name.lower() in SIZES)
    # mostly out of range: an ID or a size in bytes, not a class
    ids = sorted(name for name, count in outside.items() if count > within[name] and name not in sizes)
    names = sorted(name for name in within if name not in sizes and name not in ids)
    notes = [f"{', '.join(sizes)}: image sizes, not used as labels"] if sizes else []
    for name in ids:
        count = f"{outside[name]} of {outside[name] + within[name]}"
        notes.append(f"{name}: not used as a label, since {count} samples {limits}")
    reasons = {name: f"{outside[name]} samples {limits}: used without that label" for name in names if outside[name]}
    return names, notes, [Refusal(f"label {name!r}", reason) for name, reason in reasons.items()]


def reported(scans: Iterable[Scan], what: str, total: int) -> Iterator[Scan]:
    """Yield the scans of shards, and log the progress every 30 seconds."""
    start = last = time.monotonic()
    for done, found in enumerate(scans, start=1):
        yield found
        now = time.monotonic()
        if now - last > REPORT_EVERY:
            last = now
            log.warning("%s: %d of %d, %.0f s left", what, done, total, (now - start) / done * (total - done))


def index_files(files: Sequence[str], folder: str, path: str) -> None:
    """Write the index of local shards, in the given order, into ``folder``.

    Args:
        files: paths of the shards.
        folder: of the index.
        path: of the data set, for messages.

    Raises:
        ValueError: a file is missing, or no sample has an image.
    """
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"shards (={path!r}) name {len(files)} files, but {len(missing)} of them are missing, first {missing[0]}"
        )
    log.info("indexing %d shards of %s, once", len(files), path)
    scans = (scan(file, os.path.basename(file), checksum=True) for file in files)
    write_foreign_index(folder, list(reported(scans, "shards indexed", len(files))), path)


def shards_in(folder: str) -> list[str]:
    """Return the paths of the shards in a folder without an index, sorted; none if it has images instead.

    Raises:
        ValueError: the folder does not exist, contains neither ``*.tar`` nor images, or a writer did not finish it.
    """
    if os.path.isfile(folder):
        hint = _suggest_command(folder)
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but it is a file: {hint}")
    if not os.path.isdir(folder):
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but there is no such folder")
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise ValueError(
            f"shards (={folder!r}) are unfinished: run the same make_shards command again, or with --overwrite"
        )
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    if not files:
        names = sorted(os.listdir(folder))
        if packed := [name for name in names if COMPRESSED.search(name)]:
            raise compressed_shard(os.path.join(folder, packed[0]), "by its name")
        if inner := [name for name in names if os.path.exists(os.path.join(folder, name, INDEX))]:
            raise ValueError(
                f"shards (={folder!r}) must be a folder of .tar shards, but it contains none; these folders in it do: "
                f"{', '.join(inner)}"
            )
        if not any(map(is_image, islice(walk_files(folder), SEARCHED_FILES))):
            raise ValueError(
                f"shards (={folder!r}) must be a folder of .tar shards or of images, but it contains neither (of its "
                f"files, {SEARCHED_FILES:,} were searched)"
            )
    return files


def _suggest_command(source: str) -> str:
    name = os.path.basename(os.path.abspath(source)).partition(".")[0]
    return f"`jepa-shards {source} shards/{name}` makes shards of it, for data.shards=shards/{name}"
