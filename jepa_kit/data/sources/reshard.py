"""``wds:PATTERN``: WebDataset shards of any origin, to copy into new shards; see `ShardDataset` for patterns."""

from __future__ import annotations

import os
import tarfile
from itertools import islice

from jepa_kit.data.remote.fetch import expand
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import is_foreign
from jepa_kit.data.shards.parts import ShardPart
from jepa_kit.data.shards.writing import IMAGE_EXTENSIONS, MASK_EXTENSION, Sample
from jepa_kit.data.sources.base import Recode, Refused, Source, fingerprint, single_split
from jepa_kit.data.sources.keys import safe_keys
from jepa_kit.errors import SampleError

SEARCHED_MEMBERS = 1000
"""Members of the first shard that are searched for some that are not copied."""


class ShardSource(Source):
    """The samples of shards, in their order: images, masks and labels, without other members.

    Shards without an index get one first; samples that it leaves out are refused.

    Args:
        pattern: a path of ``ShardDataset``.
        recode: whether and how images are encoded again.

    Raises:
        ValueError: no such shards, or they cannot be used.
    """

    def __init__(self, pattern: str, recode: Recode) -> None:
        self.recode, self.dataset = recode, ShardDataset(pattern)
        if conflicts := [*self.dataset.conflicts.values(), *filter(None, [self.dataset.mask_conflict])]:
            raise ValueError(f"source (='wds:{pattern}') cannot become one set of shards: {conflicts[0]}")
        n = len(self.dataset)
        self._old = [self.dataset.key(i) for i in range(n)]
        self._keys = safe_keys(self._old)
        parts = [part for part in self.dataset.parts if isinstance(part, ShardPart)]
        if len(parts) < len(self.dataset.parts):
            raise ValueError(f"source (='wds:{pattern}') contains images and no shards: give {pattern}")
        foreign = [part.index for part in parts if is_foreign(part.index)]
        self._bad = [(entry["name"], entry["reason"]) for index in foreign for entry in index["refused"]]
        self.classes, self.mask_classes = self.dataset.classes, self.dataset.mask_classes
        self.splits = single_split(n + len(self._bad))
        self.notes = _not_copied(self.dataset) + [note for index in foreign for note in index.get("notes", [])]

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
    """Return the local files that match a pattern, and the files in local folders that match."""
    found: set[str] = set()
    for path in expand(pattern):
        inside = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
        found.update(os.path.realpath(file) for file in inside)
    return found


def _not_copied(dataset: ShardDataset) -> list[str]:
    """Return a note on members of the first shard that are neither image, label nor mask, if there are any."""
    path = dataset.parts[0].places[0]
    if not os.path.isfile(path):
        return []  # remote: not worth a download
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        names = [member.name.rpartition("/")[2] for member in islice(tar, SEARCHED_MEMBERS) if member.isreg()]
    known = {*IMAGE_EXTENSIONS, MASK_EXTENSION, "cls", "json"}
    others = sorted({name.partition(".")[2].lower() for name in names} - known - {""})
    shown = ", ".join(f".{name}" for name in others)
    return [f"not copied: members {shown} (as in {os.path.basename(path)})"] if others else []
