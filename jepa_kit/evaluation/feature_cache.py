"""Features of all networks in one pass over the images, shared by all protocols, and kept for later calls.

N  images of a data set    n  patches of an image    D  width of a feature
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import Batch, eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.distributed.collectives import World, barrier, broadcast_from_rank0, run_on_all_ranks
from jepa_kit.evaluation.feature_sources import Network, View
from jepa_kit.files import write_text

FORMAT = "jepa_kit features/1"
Arrays = dict[tuple[str, View], NDArray[Any]]
"""(name of a network, view) -> [N, D] float32; [N, n, D] float16 where patches are not averaged."""


class _Array(NamedTuple):
    """An array that is wanted: its file, None where it stays in memory, and what it depends on in words."""

    network: Network
    view: View
    file: Path | None
    words: dict[str, Any]


class FeatureStore:
    """Extracts what is wanted and not there yet.

    Each array is one file, ``<key>.npy``, which is mapped and not read whole; beside it ``<key>.json`` says in words
    what it depends on: the checkpoint's hash (or what an untrained network is made of), the encoder, the block, the
    pooling, the data's identity, the size of the images, the decoder where it is not Pillow's. The key is a digest of
    that, so that a change of any of them is another file, and nothing stale is ever taken. The .json is written last:
    without it an array is not complete.

    Args:
        folder: where arrays are kept; None keeps them in memory for this call.
        world: of several processes, each extracts a consecutive part of the images; they need a folder that all see.

    Raises:
        ValueError: several processes without a folder.
    """

    def __init__(self, folder: str | Path | None = None, world: World | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.world = world or World()
        if self.world.size > 1 and self.folder is None:
            raise ValueError(f"{self.world.size} processes need a folder that all of them see: give --features DIR")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def extract(
        self,
        wanted: Sequence[tuple[Network, View]],
        dataset: ShardDataset,
        options: ImageOptions,
        *,
        progress: bool = False,
    ) -> Arrays:
        """Every array that is wanted; each image is read and decoded once for all that are not there yet.

        Args:
            wanted: arrays, each of a network.
            dataset: the images.
            options: how they are read.
            progress: says on stderr what is being done.

        Raises:
            ValueError: a value outside its range, an image that cannot be read, or a kept array that is damaged; on
                all processes.
        """
        arrays: Arrays = {}
        asked = [self._array(network, view, dataset, options) for network, view in wanted]
        # one process looks: all must agree on what is missing
        there = broadcast_from_rank0(lambda: [one.file is not None and _is_kept(one.file) for one in asked])
        missing: list[_Array] = []
        for one, kept in zip(asked, there, strict=True):
            if kept:
                arrays[one.network.name, one.view] = _mapped(cast(Path, one.file))
            else:
                missing.append(one)
        if not missing:
            say(f"features of {len(dataset):,} images in {dataset.path}: all kept in {self.folder}", progress)
            return arrays
        start = time.perf_counter()
        fresh = self._allocate(missing, len(dataset), options.image_size)
        mine = np.array_split(np.arange(len(dataset)), self.world.size)[self.world.rank]
        batches = eval_batches(dataset, options, samples=mine)
        run_on_all_ranks(lambda: self._fill(fresh, missing, batches, dataset, len(mine), progress))
        arrays |= self._keep(fresh, missing)
        seconds = time.perf_counter() - start
        say(f"features of {len(dataset):,} images in {dataset.path}: {seconds:.1f} s", progress)
        return arrays

    def _fill(
        self,
        fresh: Arrays,
        missing: Sequence[_Array],
        batches: Iterable[Batch],
        dataset: ShardDataset,
        count: int,
        progress: bool,
    ) -> None:
        """One pass over this rank's images, ``count`` of them."""
        by_network: dict[Network, list[View]] = {}
        for one in missing:
            by_network.setdefault(one.network, []).append(one.view)
        done = 0
        with bar(f"features of {dataset.path}", count, "image", progress) as shown:
            for batch in batches:
                rows = batch.samples.numpy()
                for network, views in by_network.items():
                    for view, found in zip(views, network.source(batch.images, views), strict=True):
                        fresh[network.name, view][rows] = found.numpy()
                done += len(rows)
                shown.update(len(rows))
        assert done == count, (done, count)  # what cannot be read raises

    def _allocate(self, missing: Sequence[_Array], samples: int, image_size: tuple[int, int]) -> Arrays:
        """Empty arrays; with a folder, files that are named as unfinished."""
        fresh: Arrays = {}
        probe = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
        for network, view, file, _ in missing:
            (one,) = network.source(probe, [view])
            shape = (samples, *one.shape[1:])
            dtype = np.dtype(np.float32 if view.pooling == "mean" else np.float16)
            if file is None:
                fresh[network.name, view] = np.empty(shape, dtype)
                continue
            part = self._unfinished(file)
            if self.world.is_main:
                np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
            self._wait()
            fresh[network.name, view] = np.lib.format.open_memmap(part, mode="r+")
        return fresh

    def _keep(self, fresh: Arrays, missing: Sequence[_Array]) -> Arrays:
        """Names the files as finished."""
        kept_arrays: Arrays = {}
        for network, view, file, words in missing:
            key = (network.name, view)
            if file is None:
                kept_arrays[key] = fresh[key]
                continue
            fresh[key].flush()  # type: ignore[attr-defined]
            self._wait()
            if self.world.is_main:
                self._unfinished(file).replace(file)
                write_text(file.with_suffix(".json"), json.dumps(words, indent=1) + "\n", shared=True)
            self._wait()
            kept_arrays[key] = _mapped(file)
        return kept_arrays

    def _unfinished(self, kept: Path) -> Path:
        """The name of a file until it is complete; calls that run at the same time have names of their own."""
        return kept.with_suffix(".part" if self.world.size > 1 else f".{os.getpid()}.part")

    def _wait(self) -> None:
        if self.world.size > 1:
            barrier()

    def _array(self, network: Network, view: View, dataset: ShardDataset, options: ImageOptions) -> _Array:
        """What is kept of an array, and where."""
        words = {
            "format": FORMAT,
            "network": network.identity,
            "block": view.block,
            "pooling": view.pooling,
            "data": {k: v for k, v in identity(dataset).items() if k != "shards"},
            "image_size": list(options.image_size),
            "view": "centre crop" if options.decoder == "pillow" else f"centre crop, {options.decoder} decoder",
        }
        if self.folder is None or (network.identity is None and self.world.size == 1):
            return _Array(network, view, None, words)
        assert network.identity is not None, network.name
        key = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:24]
        return _Array(network, view, self.folder / f"{key}.npy", words)


def _is_kept(file: Path) -> bool:
    """Whether an array and its words are there."""
    return file.with_suffix(".json").exists() and file.exists()


def _mapped(file: Path) -> NDArray[Any]:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and its features are extracted again") from error


def identity(dataset: ShardDataset) -> dict[str, Any]:
    """What tells data sets apart, wherever they lie: their length, and a digest of what their index says of shards."""
    entries = json.dumps([[shard[key] for key in ("file", "samples", "bytes", "sha256")] for shard in dataset.shards])
    return {
        "shards": dataset.path,
        "samples": len(dataset),
        "index_sha256": hashlib.sha256(entries.encode()).hexdigest(),
    }


def shared_samples(train: ShardDataset, test: ShardDataset) -> int:
    """How many test samples lie in shards that the training set has too, by digest (else by name and size)."""

    def content(shard: Mapping[str, Any]) -> tuple[Any, ...]:
        return (shard["sha256"],) if shard["sha256"] else (shard["file"], shard["samples"], shard["bytes"])

    learned = {content(shard) for shard in train.shards}
    return sum(shard["samples"] for shard in test.shards if content(shard) in learned)


def bar(what: str, total: int, unit: str, progress: bool) -> tqdm[Any]:
    """A progress bar, on a terminal."""
    show = progress and sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False, disable=not show)


def say(text: str, progress: bool) -> None:
    """A plain line in place of the bar."""
    if progress and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
