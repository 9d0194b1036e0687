"""Features of all networks in one pass over the images, shared by all protocols, and kept for later calls.

N  images of a data set    n  patches of an image    D  width of a feature
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards import ShardDataset
from jepa_kit.engine.distributed import World
from jepa_kit.evaluation.networks import Network, View

FORMAT = "jepa_kit features/1"
Arrays = dict[tuple[str, View], NDArray[Any]]
"""(name of a network, view) -> [N, D] float32; [N, n, D] float16 where patches are not averaged."""


class FeatureStore:
    """Extracts what is wanted and not there yet.

    Each array is one file, ``<key>.npy``, which is mapped and not read whole; beside it ``<key>.json`` says in words
    what it depends on: the checkpoint's hash (or what an untrained network is made of), the encoder, the block, the
    pooling, the data's identity, the size of the images. The key is a digest of that, so that a change of any of them
    is another file, and nothing stale is ever taken. The .json is written last: without it an array is not complete.

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
        *,
        image_size: tuple[int, int],
        batch_size: int = 256,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Arrays:
        """Every array that is wanted; each image is read and decoded once for all that are not there yet.

        Raises:
            ValueError: a value outside its range, or an image that cannot be read.
        """
        arrays: Arrays = {}
        missing: list[tuple[Network, View]] = []
        for network, view in wanted:
            kept = self._kept(network, view, dataset, image_size)
            if kept is not None and kept.with_suffix(".json").exists():
                arrays[network.name, view] = np.load(kept, mmap_mode="r")
            else:
                missing.append((network, view))
        if not missing:
            say(f"features of {len(dataset):,} images in {dataset.path}: all kept in {self.folder}", progress)
            return arrays
        start = time.perf_counter()
        fresh = self._allocate(missing, dataset, image_size)
        self._fill(fresh, missing, dataset, image_size, batch_size, num_workers, progress)
        arrays |= self._keep(fresh, missing, dataset, image_size)
        seconds = time.perf_counter() - start
        say(f"features of {len(dataset):,} images in {dataset.path}: {seconds:.1f} s", progress)
        return arrays

    def _fill(
        self,
        fresh: Arrays,
        missing: Sequence[tuple[Network, View]],
        dataset: ShardDataset,
        image_size: tuple[int, int],
        batch_size: int,
        num_workers: int,
        progress: bool,
    ) -> None:
        """One pass over this rank's images."""
        by_network: dict[Network, list[View]] = {}
        for network, view in missing:
            by_network.setdefault(network, []).append(view)
        mine = np.array_split(np.arange(len(dataset)), self.world.size)[self.world.rank]
        batches = eval_batches(
            dataset, image_size=image_size, batch_size=batch_size, num_workers=num_workers, samples=mine
        )
        done = 0
        with bar(f"features of {dataset.path}", len(mine), "image", progress) as shown:
            for batch in batches:
                rows = batch.samples.numpy()
                for network, views in by_network.items():
                    for view, found in zip(views, network.source(batch.images, views), strict=True):
                        fresh[network.name, view][rows] = found.numpy()
                done += len(rows)
                shown.update(len(rows))
        if done != len(mine):
            raise ValueError(f"{len(mine) - done} of {len(mine)} images in {dataset.path} could not be read")

    def _allocate(
        self, missing: Sequence[tuple[Network, View]], dataset: ShardDataset, image_size: tuple[int, int]
    ) -> Arrays:
        """Empty arrays; with a folder, files that are named as unfinished."""
        fresh: Arrays = {}
        probe = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
        for network, view in missing:
            (one,) = network.source(probe, [view])
            shape = (len(dataset), *one.shape[1:])
            dtype = np.dtype(np.float32 if view.pooling == "mean" else np.float16)
            kept = self._kept(network, view, dataset, image_size)
            if kept is None:
                fresh[network.name, view] = np.empty(shape, dtype)
                continue
            part = self._unfinished(kept)
            if self.world.is_main:
                np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
            self._wait()
            fresh[network.name, view] = np.lib.format.open_memmap(part, mode="r+")
        return fresh

    def _keep(
        self,
        fresh: Arrays,
        missing: Sequence[tuple[Network, View]],
        dataset: ShardDataset,
        image_size: tuple[int, int],
    ) -> Arrays:
        """Names the files as finished."""
        kept_arrays: Arrays = {}
        for network, view in missing:
            key = (network.name, view)
            kept = self._kept(network, view, dataset, image_size)
            if kept is None:
                kept_arrays[key] = fresh[key]
                continue
            fresh[key].flush()  # type: ignore[attr-defined]
            self._wait()
            if self.world.is_main:
                self._unfinished(kept).replace(kept)
                words = json.dumps(self._words(network, view, dataset, image_size), indent=1)
                temporary = kept.with_suffix(f".json.{os.getpid()}.part")
                temporary.write_text(words + "\n")
                temporary.replace(kept.with_suffix(".json"))
            self._wait()
            kept_arrays[key] = np.load(kept, mmap_mode="r")
        return kept_arrays

    def _unfinished(self, kept: Path) -> Path:
        """The name of a file until it is complete; calls that run at the same time have names of their own."""
        return kept.with_suffix(".part" if self.world.size > 1 else f".{os.getpid()}.part")

    def _wait(self) -> None:
        if self.world.size > 1:
            dist.barrier()

    def _kept(self, network: Network, view: View, dataset: ShardDataset, image_size: tuple[int, int]) -> Path | None:
        """The file of an array; None where it stays in memory."""
        if self.folder is None or (network.identity is None and self.world.size == 1):
            return None
        assert network.identity is not None, network.name
        words = json.dumps(self._words(network, view, dataset, image_size), sort_keys=True)
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:24]}.npy"

    def _words(
        self, network: Network, view: View, dataset: ShardDataset, image_size: tuple[int, int]
    ) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "network": network.identity,
            "block": view.block,
            "pooling": view.pooling,
            "data": {k: v for k, v in identity(dataset).items() if k != "shards"},
            "image_size": list(image_size),
            "view": "centre crop",
        }


def identity(dataset: ShardDataset) -> dict[str, Any]:
    """What tells data sets apart, wherever they lie: their length, and a digest of what their index says of shards."""
    entries = json.dumps([[shard[key] for key in ("file", "samples", "bytes", "sha256")] for shard in dataset.shards])
    return {
        "shards": dataset.path,
        "samples": len(dataset),
        "index_sha256": hashlib.sha256(entries.encode()).hexdigest(),
    }


def bar(what: str, total: int, unit: str, progress: bool) -> tqdm[Any]:
    """A progress bar, on a terminal."""
    show = progress and sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False, disable=not show)


def say(text: str, progress: bool) -> None:
    """A plain line in place of the bar."""
    if progress and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
