"""From a source to shards: in which order, by several processes, and so that a run that was interrupted can go on.

Processes make samples, in chunks and in order; this one puts them into tar files. What a shard holds depends on the
samples before it and on nothing else, so a run that goes on after the last whole shard ends in the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jepa_kit.data.making.sample_workers import Refusal, Workers
from jepa_kit.data.making.write_log import Journal, Standing, clear, existing, folders_with_shards
from jepa_kit.data.order import permutation
from jepa_kit.data.shards.writing import INDEX, Packed, tar_size, write_index, write_packed
from jepa_kit.data.sources.base import Source
from jepa_kit.rng import IntArray, Stream, generator

LISTED = 10
"""So many refused samples are named in a message; index.json names all."""
Refusals = list[dict[str, str]]


@dataclass(frozen=True)
class Limits:
    """When a shard is full, and when too much was refused.

    Args:
        samples: at most so many in a shard; None where bytes alone decide.
        bytes: at most so many in a shard's file, but for a shard of a single sample; None where samples alone decide.
        refused: share of all samples that may be refused.
    """

    samples: int | None = 1024
    bytes: int | None = None
    refused: float = 0.1

    def allow(self, samples: int, size: int) -> bool:
        """Whether a shard may hold so many samples in so many bytes."""
        return samples <= (self.samples or samples) and size <= (self.bytes or size)


@dataclass(frozen=True)
class Made:
    """A finished folder of shards; ``notes`` are about images of this run: text -> how many."""

    folder: str
    samples: int
    shards: int
    bytes: int
    refused: Refusals
    notes: dict[str, int]


def check_apart(source: str, out: str) -> None:
    """Makes sure that what is written is not what is read.

    Raises:
        ValueError: the output is a file, lies in the source folder, or holds shards that are the source.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"OUT_DIR (={out!r}) must be a folder, but is a file")
    read, target = source.removeprefix("wds:"), os.path.realpath(out)
    paths = {os.path.realpath(source)}
    if read != source:
        from jepa_kit.data.sources.reshard import shard_files  # brings torch along

        paths = shard_files(read)
    if os.path.isdir(source) and os.path.commonpath([*paths, target]) in paths:
        raise ValueError(f"OUT_DIR (={out!r}) must lie outside the source (={source!r})")
    if paths & {os.path.realpath(path) for folder in folders_with_shards(out) for path in existing(folder)}:
        raise ValueError(f"source (={source!r}) must not be a shard in OUT_DIR, which would be replaced")


def split_folder(out: str, split: str) -> str:
    """The folder of a split."""
    return os.path.join(out, split) if split else out


def orders(source: Source, *, seed: int, shuffle: bool, split_val: float) -> dict[str, IntArray]:
    """Which sample goes where.

    Args:
        source: of the samples.
        seed: of the order.
        shuffle: whether samples are mixed before they are put into shards.
        split_val: share of the samples, or of the source's split ``train``, that goes into ``val``.

    Returns:
        Folder of each split -> numbers of its samples, in the order of its shards.

    Raises:
        ValueError: a validation split that leaves one side empty, or of a source that has one already.
    """
    found: dict[str, IntArray] = {}
    for k, (split, numbers) in enumerate(source.splits.items()):
        if not source.mixed:  # any range of scenes is as good as another
            rng = generator(Stream.ORDER, seed=seed, lane=k << 32)
            numbers = numbers[permutation(rng, len(numbers))]
        if split_val and split in ("", "train"):
            left, right = len(numbers) - round(len(numbers) * split_val), len(numbers)
            if not 0 < left < right:
                raise ValueError(
                    f"--split-val (={split_val}) must leave samples on both sides, but there are {len(numbers)}"
                )
            if "val" in source.splits or "validation" in source.splits:
                raise ValueError(f"--split-val (={split_val}) is of no use: the source has a validation split already")
            found |= {"train": numbers[:left], "val": numbers[left:]}
        else:
            found[split] = numbers
    if split_val and "val" not in found:
        raise ValueError(f"--split-val (={split_val}) needs a split train, but the source has: {', '.join(found)}")
    return found if shuffle else {split: np.sort(numbers) for split, numbers in found.items()}


def make(
    source: Source,
    plan: dict[str, IntArray],
    journals: Sequence[Journal],
    *,
    limits: Limits,
    workers: int,
    show: Callable[[int], None],
) -> list[Made]:
    """Writes what is not written yet.

    Args:
        source: of the samples.
        plan: see ``orders``.
        journals: one for each split of the plan, begun. Nobody else writes in their folders.
        limits: of shards and of refusals.
        workers: processes that make samples.
        show: is called with the number of samples that are done.

    Returns:
        The folders that were finished now; those that were whole already are left alone.

    Raises:
        TooManyRefused: more than the limits allow.
        ValueError: a split of which nothing is left.
        BrokenProcessPool: a worker died.
    """
    standings = [journal.open(len(numbers)) for journal, numbers in zip(journals, plan.values(), strict=True)]
    show(sum(standing.end for standing in standings))
    made: list[Made] = []
    with Workers(source, workers) as pool:
        for journal, standing, numbers in zip(journals, standings, plan.values(), strict=True):
            if standing.whole:
                continue
            feed = _Feed(pool.samples(numbers[standing.end :]), standings, standing, limits, show)
            while feed.left():
                path = os.path.join(journal.folder, f"shard-{len(standing.shards):06d}.tar")
                journal.add(standing, *write_packed(path, feed.shard()))
            made.append(_finish(journal, standing, source))
    return made


class TooManyRefused(ValueError):
    """More samples were refused than the user allows. What is written stays, so the run can go on.

    Args:
        refused: all of them so far.
        total: how many samples there are.
        share: of them may be refused.
    """

    def __init__(self, refused: Refusals, total: int, share: float) -> None:
        names = "; ".join(f"{entry['name']} ({entry['reason']})" for entry in refused)
        super().__init__(f"{len(refused)} of {total} samples were refused, above --max-refused (={share}): {names}")


class _Feed:
    """Samples of one split, in the portions that shards take. What is refused goes into the standing of the split.

    Args:
        samples: those that are left.
        all_standings: of all splits: for how much is done, and how much was refused.
        standing: of this split; its ``end`` follows the samples.
        limits: of a shard, and of refusals.
        show: is called with the number of samples that are done.
    """

    def __init__(
        self,
        samples: Iterator[Packed | Refusal],
        all_standings: Sequence[Standing],
        standing: Standing,
        limits: Limits,
        show: Callable[[int], None],
    ) -> None:
        self._samples, self._all, self._standing = samples, all_standings, standing
        self._limits, self._show = limits, show
        self._next: Packed | None = None
        self._total = sum(s.total for s in all_standings)

    def left(self) -> bool:
        """Whether there is a sample left that is not refused.

        Raises:
            TooManyRefused: more than the limits allow.
        """
        while self._next is None:
            found = next(self._samples, None)
            if found is None:
                return False
            if isinstance(found, Packed):
                self._next = found
                self._standing.notes.update(filter(None, [found.note]))
            else:
                self._standing.refused.append({"name": found.name, "reason": found.reason})
                self._advance()
                if sum(len(s.refused) for s in self._all) > self._limits.refused * self._total:
                    refused = [entry for standing in self._all for entry in standing.refused]
                    raise TooManyRefused(refused, self._total, self._limits.refused)
        return True

    def shard(self) -> Iterator[Packed]:
        """Samples until the shard is full, or none are left."""
        count = size = 0
        while self.left():
            assert self._next is not None
            count, size = count + 1, size + len(self._next.data)
            if count > 1 and not self._limits.allow(count, tar_size(size)):
                return
            sample, self._next = self._next, None
            self._advance()
            yield sample

    def _advance(self) -> None:
        self._standing.end += 1
        self._show(sum(standing.end for standing in self._all))


def _finish(journal: Journal, standing: Standing, source: Source) -> Made:
    """Writes a split's index."""
    folder = journal.folder
    standing.refused.sort(key=lambda entry: entry["name"])
    if not standing.shards:
        clear([folder])
        raise ValueError(
            f"source (={journal.made_by.get('source')!r}) holds no image for {folder}: {listed(standing.refused)}"
        )
    write_index(
        folder,
        standing.shards,
        standing.rows,
        classes=source.classes,
        refused=standing.refused,
        made_by=journal.made_by,
        mask_classes=source.mask_classes,
    )
    samples, size = sum(s.samples for s in standing.shards), sum(s.bytes for s in standing.shards)
    return Made(folder, samples, len(standing.shards), size, standing.refused, dict(standing.notes))


def listed(refused: Refusals) -> str:
    """The first of them, with reasons."""
    more = f"; and {len(refused) - LISTED} more, in {INDEX}" if len(refused) > LISTED else ""
    return "; ".join(f"{entry['name']} ({entry['reason']})" for entry in refused[:LISTED]) + more
