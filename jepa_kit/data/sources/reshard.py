"""``wds:PATTERN``: WebDataset shards, ours or anybody's, to be put into other shards. See ``parts.py`` for patterns."""

from __future__ import annotations

import os
import tarfile
from itertools import islice

from jepa_kit.data.remote.fetch import expand
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import is_foreign
from jepa_kit.data.shards.writing import IMAGE_EXTENSIONS, MASK_EXTENSION, Sample
from jepa_kit.data.sources.base import Recode, Refused, each_once, fingerprint, whole
from jepa_kit.errors import SampleError

LOOKED_AT = 1000
"""Members of the first shard that are looked at for what is left behind."""


class OldShards:
    """Samples of shards, in their order. Images, masks and labels go over; other members are left behind.

    Shards without an index get theirs first; what could not be read then is refused now.

    Args:
        pattern: what ``ShardDataset`` takes: a folder, a shard, braces, an address.
        recode: what happens to the images.

    Raises:
        ValueError: no such shards, or they cannot be used.
    """

    def __init__(self, pattern: str, recode: Recode) -> None:
        self.recode, self.dataset = recode, ShardDataset(pattern)
        if conflicts := [*self.dataset.conflicts.values(), *filter(None, [self.dataset.mask_conflict])]:
            raise ValueError(f"source (='wds:{pattern}') cannot be put into one set of shards: {conflicts[0]}")
        n = len(self.dataset)
        self._old = [self.dataset.key(i) for i in range(n)]
        self._keys = each_once(self._old)
        foreign = [part.index for part in self.dataset.parts if is_foreign(part.index)]
        self._bad = [(entry["name"], entry["reason"]) for index in foreign for entry in index["refused"]]
        self.classes, self.mask_classes = self.dataset.classes, self.dataset.mask_classes
        self.splits, self.mixed, self.notes = whole(n + len(self._bad)), False, _left_behind(self.dataset)
        self.notes += [note for index in foreign for note in index.get("notes", [])]

    def __len__(self) -> int:
        return len(self._keys) + len(self._bad)

    def name(self, i: int) -> str:
        return self._old[i] if i < len(self._old) else self._bad[i - len(self._old)][0]

    def sample(self, i: int) -> Sample:
        if i >= len(self._keys):
            raise Refused(self._bad[i - len(self._keys)][1])
        try:
            data = self.dataset.image_bytes(i)
            mask = self.dataset.mask_bytes(i) if self.dataset.has_mask(i) else None
        except SampleError as error:
            raise Refused(f"cannot be read: {error}") from error
        return self.recode.sample(self._keys[i], data, self.dataset.labels_of(i), mask)

    def fingerprint(self) -> str:
        shards = [(s["file"], s["samples"], s["bytes"], s["sha256"]) for s in self.dataset.shards]
        return fingerprint([*self._old, *shards, self.classes])


def shard_files(pattern: str) -> set[str]:
    """The local files that a pattern stands for, as far as they are there; their folders are expanded."""
    found: set[str] = set()
    for path in expand(pattern):
        inside = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
        found.update(os.path.realpath(file) for file in inside)
    return found


def _left_behind(dataset: ShardDataset) -> list[str]:
    """A note on members that are neither image, label nor mask, as the first shard has them."""
    path = dataset.parts[0].places[0]
    if not os.path.isfile(path):
        return []  # of another machine: looking would mean to fetch it
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        names = [member.name.rpartition("/")[2] for member in islice(tar, LOOKED_AT) if member.isreg()]
    known = {*IMAGE_EXTENSIONS, MASK_EXTENSION, "cls", "json"}
    others = sorted({name.partition(".")[2].lower() for name in names} - known - {""})
    shown = ", ".join(f".{name}" for name in others)
    return [f"left behind: members {shown} (as in {os.path.basename(path)})"] if others else []
