"""Write the samples of a source into shards, by several processes, so that an interrupted run can resume.

Worker processes make samples, in chunks and in order; this process writes them into tar files. The content of a shard
depends only on the samples before it, so a run that resumes after the last complete shard writes the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jepa_kit.data.making.sample_workers import Workers
from jepa_kit.data.making.write_log import WriteLog, clear, existing, folders_with_shards
from jepa_kit.data.shards.tars import Refusal
from jepa_kit.data.shards.writing import INDEX, Packed, tar_size, write_index, write_packed
from jepa_kit.data.sources.base import Source
from jepa_kit.rng import IntArray, Stream, generator, permutation

LISTED = 10
"""Refused samples that a message names; index.json names all."""


@dataclass(frozen=True)
class Limits:
    """Limits of a shard, and of refused samples.

    Args:
        samples: of a shard, at most; None for no limit.
        bytes: of a shard's file, at most, except for a shard of one sample; None for no limit.
        refused: fraction of all samples that may be refused.
    """

    samples: int | None = 1024
    bytes: int | None = None
    refused: float = 0.1


def check_apart(source: str, out: str) -> None:
    """Check that the output does not overwrite the source.

    Raises:
        ValueError: the output is a file, is inside the source folder, or contains shards that are the source.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"OUT_DIR (={out!r}) must be a folder, but is a file")
    read, target = source.removeprefix("wds:"), os.path.realpath(out)
    paths = {os.path.realpath(source)}
    if read != source:
        from jepa_kit.data.sources.reshard import shard_files  # imports torch

        paths = shard_files(read)
    if os.path.isdir(source) and os.path.commonpath([*paths, target]) in paths:
        raise ValueError(f"OUT_DIR (={out!r}) must be outside the source (={source!r})")
    if paths & {os.path.realpath(path) for folder in folders_with_shards(out) for path in existing(folder)}:
        raise ValueError(f"source (={source!r}) must not be a shard in OUT_DIR, which would be replaced")


def split_folder(out: str, split: str) -> str:
    """Return the folder of a split."""
    return os.path.join(out, split) if split else out


def orders(source: Source, *, seed: int, shuffle: bool, split_val: float) -> dict[str, IntArray]:
    """Assign samples to splits, in the order of their shards.

    Args:
        source: of the samples.
        seed: of the order.
        shuffle: whether to shuffle the samples.
        split_val: fraction of the samples, or of the source's split ``train``, for the split ``val``.

    Returns:
        Folder of each split -> numbers of its samples.

    Raises:
        ValueError: a validation split leaves one side empty, or the source has one already.
    """
    found: dict[str, IntArray] = {}
    for k, (split, numbers) in enumerate(source.splits.items()):
        if not source.mixed:  # scenes are in random order already
            rng = generator(Stream.ORDER, seed=seed, lane=k << 32)
            numbers = numbers[permutation(rng, len(numbers))]
        if split_val and split in ("", "train"):
            left, right = len(numbers) - round(len(numbers) * split_val), len(numbers)
            if not 0 < left < right:
                raise ValueError(
                    f"--split-val (={split_val}) must leave samples on both sides, but there are {len(numbers)}"
                )
            if "val" in source.splits or "validation" in source.splits:
                raise ValueError(f"--split-val (={split_val}) cannot be used: the source has a validation split")
            found |= {"train": numbers[:left], "val": numbers[left:]}
        else:
            found[split] = numbers
    if split_val and "val" not in found:
        raise ValueError(f"--split-val (={split_val}) needs a split train, but the source has: {', '.join(found)}")
    return found if shuffle else {split: np.sort(numbers) for split, numbers in found.items()}


def make(
    source: Source, logs: Sequence[WriteLog], *, limits: Limits, workers: int, show: Callable[[int], None]
) -> list[WriteLog]:
    """Write the shards that are not written yet.

    Args:
        source: of the samples.
        logs: begun, one for each split. No other process writes to their folders.
        limits: of shards and of refused samples.
        workers: processes that make samples.
        show: called with the number of samples done.

    Returns:
        The logs of the folders that this call finished.

    Raises:
        TooManyRefused: more than the limits allow.
        ValueError: all samples of a split were refused.
        BrokenProcessPool: a worker died.
    """
    for log in logs:
        log.open()
    show(sum(log.end for log in logs))
    made = [log for log in logs if not log.complete]
    total = sum(len(log.numbers) for log in logs)

    def accept(log: WriteLog, samples: Iterator[Packed | Refusal]) -> Iterator[Packed]:
        """Yield samples that are not refused, and record the others in the log of their split.

        ``log.end`` counts a sample once the next one is requested, so that it excludes one that did not fit into a
        shard.
        """
        for sample in samples:
            if isinstance(sample, Packed):
                log.notes.update(filter(None, [sample.note]))
                yield sample
            else:
                log.refused.append(sample)
            log.end += 1
            show(sum(log.end for log in logs))
            if isinstance(sample, Refusal) and sum(len(log.refused) for log in logs) > limits.refused * total:
                raise TooManyRefused([entry for log in logs for entry in log.refused], total, limits.refused)

    with Workers(source, workers) as pool:
        for log in made:
            for shard in _split(accept(log, pool.samples(log.numbers[log.end :])), limits):
                log.add(*write_packed(os.path.join(log.folder, f"shard-{len(log.shards):06d}.tar"), shard))
            _finish(log, source)
    return made


class TooManyRefused(ValueError):
    """More samples were refused than the user allows. Shards that are written stay, so that the run can resume.

    Args:
        refused: all so far.
        total: number of samples.
        allowed: fraction that may be refused.
    """

    def __init__(self, refused: Sequence[Refusal], total: int, allowed: float) -> None:
        names = "; ".join(f"{name} ({reason})" for name, reason in refused)
        super().__init__(f"{len(refused)} of {total} samples were refused, above --max-refused (={allowed}): {names}")


def _split(samples: Iterator[Packed], limits: Limits) -> Iterator[Iterator[Packed]]:
    """Yield the samples of each shard; each iterator must be exhausted before the next one."""
    sample = next(samples, None)

    def shard() -> Iterator[Packed]:
        nonlocal sample
        count = size = 0
        while sample is not None:
            count, size = count + 1, size + len(sample.data)
            full = count > (limits.samples or count) or tar_size(size) > (limits.bytes or tar_size(size))
            if full and count > 1:
                return
            yield sample
            sample = next(samples, None)

    while sample is not None:
        yield shard()


def _finish(log: WriteLog, source: Source) -> None:
    """Write the index of a split."""
    log.refused.sort(key=lambda entry: entry.name)
    if not log.shards:
        clear([log.folder])
        name = log.made_by.get("source")
        raise ValueError(f"source (={name!r}) has no image for {log.folder}: {listed(log.refused)}")
    write_index(
        log.folder,
        log.shards,
        log.rows,
        classes=source.classes,
        refused=log.refused,
        made_by=log.made_by,
        mask_classes=source.mask_classes,
    )


def listed(refused: Sequence[Refusal]) -> str:
    """Return the first refused samples with their reasons, as one line."""
    more = f"; and {len(refused) - LISTED} more, in {INDEX}" if len(refused) > LISTED else ""
    return "; ".join(f"{name} ({reason})" for name, reason in refused[:LISTED]) + more
