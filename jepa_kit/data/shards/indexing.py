"""Shards without an index get theirs, by reading them once: their tar headers, and all bytes for their SHA-256.

A sample is what tar members of one name have in common up to the first dot of it. A member that a name has already
begins another sample of that name: shards may have been joined, or count anew. A sample's image is the member of a
known extension; labels are ``.cls`` members (label ``class``) or the whole numbers of ``.json`` members (by their
names), but for sizes of images, and for names whose numbers no class can have. Names of classes are not known: they are
the numbers.

What is broken costs what is broken: of a shard that was cut short the samples before the cut are used, of one with a
corrupt stretch those before and after it. What is left out is listed in the index under ``refused``: sparse files and
devices too. A hard or symbolic link is the file that it leads to, if that is in the same shard.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jepa_kit.data.shards.tars import (
    BLOCK,
    COMPRESSED,
    TAR_ERRORS,
    compressed_shard,
    compression,
    follow,
    is_filler,
    stored_size,
    target_of,
)
from jepa_kit.data.shards.writing import (
    IMAGE_EXTENSIONS,
    INDEX,
    MASK_EXTENSION,
    MAX_CLASSES,
    UNFINISHED,
    Rows,
    Shard,
    write_index,
)
from jepa_kit.files import sha256_of

INDEXER = 2
"""Of what an index of foreign shards contains; one with another number is made again. 2: checksums, links."""
SIZES = ("width", "height", "original_width", "original_height")
"""Whole numbers in a .json that are no labels: img2dataset writes them."""
LOOKED_AT = 1000
"""Files of a folder without shards in which images are looked for."""
SAY_EVERY = 30.0
"""Seconds between two lines about the progress."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scan:
    """What a shard holds.

    Args:
        entry: of the index.
        rows: its samples.
        refused: ``name`` and ``reason`` of samples without an image, labels that are none, and broken stretches.
        outside: name of a whole number in .json members -> how many samples have one that no class can have.
    """

    entry: Shard
    rows: Rows
    refused: list[dict[str, str]]
    outside: dict[str, int]


def scan(path: str, name: str, *, checksum: bool = False) -> Scan:
    """Read the tar headers of a shard, and its label members.

    Args:
        path: of the file.
        name: of the shard, for its entry.
        checksum: whether its SHA-256 is computed too: the file is read whole for it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is compressed.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        if how := compression(stream.read(BLOCK)):
            raise compressed_shard(path, how)
    members, refused = _members(path, size)
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    found: list[dict[str, int]] = []
    links: dict[str, list[str]] = {}
    outside: Counter[str] = Counter()
    with open(path, "rb") as stream:
        for key, parts in _samples(members):
            image = next((parts[e] for e in IMAGE_EXTENSIONS if e in parts), None)
            if image is None:
                refused.append({"name": key, "reason": f"no image member, only: {', '.join(parts)}"})
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
                    refused.append({"name": f"{key}.{kind}", "reason": f"{fault}: used without that label"})
            found.append(labels)
    numbers = np.array(places, dtype=np.int64).reshape(-1, 6)
    names = dict.fromkeys(name for row in found for name in row)
    columns = {name: np.array([row.get(name, -1) for row in found]) for name in names}
    entry = Shard(name, len(keys), size, sha256_of(path) if checksum else None)
    return Scan(entry, Rows(keys, numbers[:, :4], columns, numbers[:, 4:], links), refused, dict(outside))


class _File(NamedTuple):
    """A file of a shard: its name, where its bytes are, and the name in the header before them (of a link: another)."""

    name: str
    offset: int
    size: int
    header: str


class _Link(NamedTuple):
    """A link in a shard: the path that it leads to, and that as it is written."""

    name: str
    path: str
    written: str


def _members(path: str, size: int) -> tuple[list[_File], list[dict[str, str]]]:
    """The files that are whole, links to them included, and what is left out."""
    found: list[_File | _Link] = []
    files: dict[str, _File] = {}  # by normalised path, the last of each
    faults: list[dict[str, str]] = []
    end, reason = 0, "the shard is corrupt or cut short there"
    with open(path, "rb") as stream:
        try:
            # ignore_zeros: a header that cannot be read is passed over, block by block, up to the next good one
            with tarfile.open(path, "r:", ignore_zeros=True) as tar:
                for member in tar:
                    if member.offset > end and not is_filler(stream, end, member.offset):
                        text = f"bytes {end} to {member.offset} are no tar members: the shard is corrupt there"
                        faults.append({"name": f"before {member.name}", "reason": text})
                    if member.offset_data + stored_size(member) > size:
                        text = f"the shard ends after {size} bytes, in the middle of it"
                        faults.append({"name": member.name, "reason": text})
                        end = size
                        break
                    end, one = tar.offset, _file(member, files)
                    if isinstance(one, str):
                        faults.append({"name": member.name, "reason": one})
                    elif one is not None:
                        found.append(one)
        except TAR_ERRORS as error:
            reason = str(error) or type(error).__name__
        if end < size and not is_filler(stream, end, size):
            faults.append({"name": f"from byte {end} on", "reason": f"no tar members: {reason}"})
    return _linked(found, files, faults), faults


def _file(member: tarfile.TarInfo, files: dict[str, _File]) -> _File | _Link | str | None:
    """A member as a file or a link, None for a folder, or why it is neither."""
    if member.issparse():
        return "a sparse file (tar -S), whose bytes are not in one piece: pack the shard again without -S"
    if member.islnk() or member.issym():
        link = _Link(member.name, target_of(member), member.linkname)
        if link.path not in files:  # a symbolic link to what comes later, or to nothing
            return link
        one = files[link.path]._replace(name=member.name)
    elif member.isreg():
        one = _File(member.name, member.offset_data, member.size, member.name)
    else:
        return None if member.isdir() else "a device, a pipe or a member of unknown type, not a file"
    files[os.path.normpath(member.name)] = one
    return one


def _linked(found: Sequence[_File | _Link], files: Mapping[str, _File], faults: list[dict[str, str]]) -> list[_File]:
    """The files, with links to later ones resolved; a link to nothing is a fault."""
    links = {os.path.normpath(one.name): one for one in found if isinstance(one, _Link)}
    whole = []
    for one in found:
        if isinstance(one, _File):
            whole.append(one)
        elif target := files.get(follow(one.path, links)):
            whole.append(target._replace(name=one.name))
        else:
            reason = f"a link to {one.written!r}, which is no file of the shard"
            faults.append({"name": one.name, "reason": reason})
    return whole


def _samples(members: Sequence[_File]) -> list[tuple[str, dict[str, _File]]]:
    """(key, extension -> member) of each sample; a member that its key has already begins another one of that key."""
    samples: list[tuple[str, dict[str, _File]]] = []
    latest: dict[str, dict[str, _File]] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:
            continue
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if key not in latest or extension in latest[key]:
            latest[key] = {}
            samples.append((key, latest[key]))
        latest[key][extension] = member
    return samples


def parse_label(text: bytes, is_cls: bool) -> tuple[dict[str, int], str | None, list[str]]:
    """Return the class numbers of a label member, what is wrong with it, and names whose numbers no class can have.

    Captions and the like in a .json are no fault, and -1 stands for no label.
    """
    shown = text[:40].decode(errors="replace")
    try:
        found = {"class": int(text)} if is_cls else json.loads(text or b"{}")
    except (ValueError, RecursionError):  # the last where it is nested thousands deep
        return {}, f"{shown!r} is no {'class number' if is_cls else 'JSON'}", []
    if not isinstance(found, dict):
        return {}, f"{shown!r} is no mapping of labels", []
    whole = {k: v for k, v in found.items() if type(v) is int}
    labels = {k: v for k, v in whole.items() if 0 <= v < MAX_CLASSES}
    if is_cls and not labels:
        return {}, f"{shown!r} is no class number from 0 to {MAX_CLASSES - 1}", []
    return labels, None, [k for k, v in whole.items() if k not in labels and v != -1]


def write_foreign_index(folder: str, scans: Sequence[Scan], path: str) -> None:
    """Writes the index of scanned shards, and logs what it leaves out.

    Args:
        folder: where the index goes.
        scans: in the order of the shards.
        path: of the data set, for messages.

    Raises:
        ValueError: no sample has an image.
    """
    parts = [s.rows for s in scans]
    refused = [
        {"name": f"{s.entry.file}: {entry['name']}", "reason": entry["reason"]} for s in scans for entry in s.refused
    ]
    if not any(part.keys for part in parts):
        reasons = "".join(f"; {entry['name']}: {entry['reason']}" for entry in refused[:3])
        raise ValueError(
            f"shards (={path!r}) must hold images, but no sample of its {len(parts)} shards has one{reasons}"
        )
    names, notes, more = _labels_among(scans)
    refused += more
    for entry in refused[:10]:
        log.warning("%s: %s", entry["name"], entry["reason"])
    if len(refused) > 10:
        log.warning("and %d more; %s lists all under 'refused'", len(refused) - 10, os.path.join(folder, INDEX))
    for text in notes:
        log.warning("%s: %s", path, text)
    most = {name: max(int(part.labels[name].max()) for part in parts if name in part.labels) for name in names}
    classes = {name: [str(k) for k in range(most[name] + 1)] for name in names}
    entries = [s.entry for s in scans]
    made_by = {"tool": "index_shards", "version": INDEXER}
    write_index(folder, entries, parts, classes=classes, refused=refused, made_by=made_by, notes=notes)


def _labels_among(scans: Sequence[Scan]) -> tuple[list[str], list[str], list[dict[str, str]]]:
    """Which whole numbers of foreign shards are labels; notes on those that are none; and labels that samples lack."""
    outside: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for found in scans:
        outside.update(found.outside)
        within.update({name: int((numbers >= 0).sum()) for name, numbers in found.rows.labels.items()})
    sizes = sorted(name for name in {*outside, *within} if name.lower() in SIZES)
    ids = sorted(name for name, count in outside.items() if count > within[name] and name not in sizes)
    notes = [f"{', '.join(sizes)}: taken for sizes of images, not for labels"] if sizes else []
    notes += [
        f"{name}: no label, since {outside[name]} of {outside[name] + within[name]} samples have a number outside 0 to "
        f"{MAX_CLASSES - 1}"
        for name in ids
    ]
    names = sorted(name for name in within if name not in sizes and name not in ids)
    lacking = [
        {
            "name": f"label {name!r}",
            "reason": f"{outside[name]} samples have a number outside 0 to {MAX_CLASSES - 1}: used without that label",
        }
        for name in names
        if outside[name]
    ]
    return names, notes, lacking


class Progress:
    """Lines about a pass over shards that takes long."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.said = time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        now = time.monotonic()
        if now - self.said > SAY_EVERY:
            self.said = now
            left = (now - self.start) / self.done * (self.total - self.done)
            log.warning("%s: %d of %d, %.0f s left", self.what, self.done, self.total, left)


def index_files(files: Sequence[str], folder: str, path: str) -> None:
    """Writes the index of local shards, in this order, into ``folder``.

    Raises:
        ValueError: a file that is missing, or no image in all of them.
    """
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"shards (={path!r}) name {len(files)} files, but {len(missing)} of them are missing, first {missing[0]}"
        )
    log.info("indexing %d shards of %s, once", len(files), path)
    progress, scans = Progress("shards indexed", len(files)), []
    for file in files:
        scans.append(scan(file, os.path.basename(file), checksum=True))
        progress.step()
    write_foreign_index(folder, scans, path)


def shards_in(folder: str) -> list[str]:
    """The shards of a folder that has no index.

    Raises:
        ValueError: no such folder, no ``*.tar`` in it, or a folder that a writer left unfinished.
    """
    if os.path.isfile(folder):
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but it is a file: {_make(folder)}")
    if not os.path.isdir(folder):
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but there is no such folder")
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise ValueError(
            f"shards (={folder!r}) were left unfinished: give make_shards its command again, or --overwrite"
        )
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    if not files:
        if packed := [name for name in sorted(os.listdir(folder)) if COMPRESSED.search(name)]:
            raise compressed_shard(os.path.join(folder, packed[0]), "by its name")
        inner = [name for name in sorted(os.listdir(folder)) if os.path.exists(os.path.join(folder, name, INDEX))]
        hint = f"; these folders in it do: {', '.join(inner)}" if inner else ""
        if not inner and (image := _first_image(folder)):
            hint = f", and images ({image}): {_make(folder)}"
        raise ValueError(f"shards (={folder!r}) must be a folder of .tar shards, but it holds none{hint}")
    return files


def _make(source: str) -> str:
    name = os.path.basename(os.path.abspath(source)).partition(".")[0]
    return f"`python tools/make_shards.py {source} shards/{name}` makes shards of it, for data.shards=shards/{name}"


def _first_image(folder: str) -> str | None:
    """The first file of an image's name in a folder or below, among as many as a message is worth looking at."""
    looked = 0
    for parent, _, files in os.walk(folder):
        for name in sorted(files):
            looked += 1
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                return os.path.relpath(os.path.join(parent, name), folder)
        if looked > LOOKED_AT:
            break
    return None
