"""Features of all networks, extracted in one pass over the images and cached on disk.

N  images of a data set    n  patches of an image    D  width of a feature
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.distributed.collectives import World, barrier, broadcast_from_rank0, run_on_all_ranks
from jepa_kit.evaluation.data_identity import identity
from jepa_kit.evaluation.feature_sources import Feature, Network
from jepa_kit.files import write_text

FORMAT = "jepa_kit features/1"
Arrays = dict[tuple[str, Feature], NDArray[Any]]
"""(name of a network, view) -> [N, D] float32; [N, n, D] float16 if patches are not averaged."""

Named = dict[str, NDArray[Any]]
"""What a baseline has learned: names to arrays."""


class _Entry(NamedTuple):
    """An array of features: its file, None if it stays in memory, and what it depends on."""

    network: Network
    view: Feature
    file: Path | None
    origin: dict[str, Any]

    @property
    def key(self) -> tuple[str, Feature]:
        return self.network.name, self.view


class FeatureStore:
    """A cache of features, which extracts those that it does not have.

    Each array is one memory-mapped file, ``<key>.npy``. ``<key>.json`` beside it has what the array depends on: the
    checkpoint's digest (or the config and seed of an untrained network), the encoder, the block, the pooling, the
    identity of the data, the image size, and the decoder if it is not Pillow's. The key is a digest of these, so that
    no file can be out of date. The .json is written last: an array without it is incomplete.

    Args:
        folder: of the files; None keeps arrays in memory.
        world: each process extracts a consecutive part of the images. Several processes need a shared folder.

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
        wanted: Sequence[tuple[Network, Feature]],
        dataset: ShardDataset,
        options: ImageOptions,
        *,
        progress: bool = False,
    ) -> Arrays:
        """Return arrays of features; images are read and decoded once for all arrays that are not cached.

        Args:
            wanted: (network, view) of each array.
            dataset: of the images.
            options: how images are read.
            progress: print progress to stderr.

        Raises:
            ValueError: an image that cannot be read, or a damaged cached array; on all processes.
        """
        entries = [self._entry(network, view, dataset, options) for network, view in wanted]
        # rank 0 looks, so that all ranks agree on what is missing
        cached = broadcast_from_rank0(lambda: [_is_complete(one.file) for one in entries])
        missing = [one for one, there in zip(entries, cached, strict=True) if not there]
        arrays: Arrays = {
            one.key: _load_mapped(one.file) for one in entries if one not in missing and one.file is not None
        }
        took = f"all cached in {self.folder}"
        if missing:
            start = time.perf_counter()
            fresh = self._allocate(missing, len(dataset), options.image_size)
            run_on_all_ranks(lambda: self._fill(fresh, missing, dataset, options, progress))
            arrays |= self._finish(fresh, missing)
            took = f"{time.perf_counter() - start:.1f} s"
        say(f"features of {len(dataset):,} images in {dataset.path}: {took}", progress)
        return arrays

    def learned(
        self, origin: Mapping[str, Any], learn: Callable[[], dict[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Return what a baseline learns from images: from ``<key>.npz`` of an earlier call, or from ``learn``.

        Rank 0 learns; all processes must call it.

        Args:
            origin: what it depends on, as plain values; the key is its digest.
            learn: names to arrays.
        """
        if self.folder is None:
            return learn()
        file = self.folder / f"{_digest({'format': FORMAT, **origin})}.npz"

        def write() -> None:
            if self.world.is_main and not file.exists():
                part = self._unfinished(file)
                with part.open("wb") as out:
                    np.savez(out, **learn())  # type: ignore[arg-type]
                part.replace(file)

        run_on_all_ranks(write)
        self._wait()
        with np.load(file) as found:
            return dict(found)

    def _fill(
        self, fresh: Arrays, missing: Sequence[_Entry], dataset: ShardDataset, options: ImageOptions, progress: bool
    ) -> None:
        """Fill arrays in one pass over this rank's part of the images."""
        by_network: dict[Network, list[Feature]] = {}
        for one in missing:
            by_network.setdefault(one.network, []).append(one.view)
        own = np.array_split(np.arange(len(dataset)), self.world.size)[self.world.rank]
        with bar(f"features of {dataset.path}", len(own), "image", progress) as shown:
            for batch in eval_batches(dataset, options, samples=own):
                for network, views in by_network.items():
                    for view, found in zip(views, network.source(batch.images, views), strict=True):
                        fresh[network.name, view][batch.samples.numpy()] = found.numpy()
                shown.update(len(batch))

    def _allocate(self, missing: Sequence[_Entry], samples: int, image_size: tuple[int, int]) -> Arrays:
        """Return empty arrays; with a folder, in files with a name for unfinished ones."""
        fresh: Arrays = {}
        probe = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
        for one in missing:
            (found,) = one.network.source(probe, [one.view])
            shape = (samples, *found.shape[1:])
            dtype = np.dtype(np.float16 if one.view.pooling == "none" else np.float32)
            if one.file is None:
                fresh[one.key] = np.empty(shape, dtype)
                continue
            part = self._unfinished(one.file)
            if self.world.is_main:
                np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
            self._wait()
            fresh[one.key] = np.lib.format.open_memmap(part, mode="r+")
        return fresh

    def _finish(self, fresh: Arrays, missing: Sequence[_Entry]) -> Arrays:
        """Rename complete files to their final names; return the arrays."""
        for one in missing:
            if one.file is None:
                continue
            fresh[one.key].flush()  # type: ignore[attr-defined]
            self._wait()
            if self.world.is_main:
                self._unfinished(one.file).replace(one.file)
                write_text(one.file.with_suffix(".json"), json.dumps(one.origin, indent=1) + "\n", shared=True)
            self._wait()
            fresh[one.key] = _load_mapped(one.file)
        return fresh

    def _unfinished(self, file: Path) -> Path:
        """Return the name of a file until it is complete; simultaneous calls have different ones."""
        return file.with_suffix(".part" if self.world.size > 1 else f".{os.getpid()}.part")

    def _wait(self) -> None:
        if self.world.size > 1:
            barrier()

    def _entry(self, network: Network, view: Feature, dataset: ShardDataset, options: ImageOptions) -> _Entry:
        origin = {
            "format": FORMAT,
            "network": network.identity,
            "block": view.block,
            "pooling": view.pooling,
            "data": {k: v for k, v in identity(dataset).items() if k != "shards"},
            "image_size": list(options.image_size),
            "view": "centre crop" if options.decoder == "pillow" else f"centre crop, {options.decoder} decoder",
        }
        if self.folder is None or (network.identity is None and self.world.size == 1):
            return _Entry(network, view, None, origin)
        assert network.identity is not None, network.name
        return _Entry(network, view, self.folder / f"{_digest(origin)}.npy", origin)


def _digest(origin: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:24]


def _is_complete(file: Path | None) -> bool:
    return file is not None and file.with_suffix(".json").exists() and file.exists()


def _load_mapped(file: Path) -> NDArray[Any]:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and its features are extracted again") from error


def bar(what: str, total: int, unit: str, progress: bool) -> tqdm[Any]:
    """Return a progress bar, which is shown on a terminal."""
    show = progress and sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False, disable=not show)


def say(text: str, progress: bool) -> None:
    """Print a line to stderr if it is no terminal, and so has no progress bar."""
    if progress and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
