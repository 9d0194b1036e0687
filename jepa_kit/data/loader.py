"""Batches for training and evaluation: read, decoded, cropped and masked in loader workers.

A batch is a pure function of (seed, step): the same for any number of workers and, concatenated over ranks, for any
number of ranks. Each batch is made by one worker. A sample that cannot be used is left out of its batch, which names
it; no other sample takes its place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from jepa_kit.data.batch import Batch, Skipped
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.remote.prefetch import Prefetcher
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import Pipeline, eval_pipeline
from jepa_kit.data.views import Loaded, ViewMaker, check_views, draws_of, load_images, make_views
from jepa_kit.data.workers import Workers, choose_workers, load
from jepa_kit.rng import IntArray, epoch_order
from jepa_kit.structures import View


@dataclass(frozen=True, eq=False)
class Request:
    """The batch of a step, for a worker to make. ``samples`` [B] are those of this rank."""

    step: int
    epoch: int
    samples: IntArray


class _TrainBatches(Dataset):
    """Map a Request to a Batch."""

    def __init__(self, dataset: ShardDataset, views: Sequence[ViewMaker], seed: int) -> None:
        self.dataset, self.views, self.seed = dataset, views, seed

    def load(self, samples: IntArray, epoch: int) -> tuple[Loaded, list[Skipped]]:
        """Return the images of samples [B], and which of these could not be used."""
        draws = draws_of(self.views, samples, seed=self.seed, epoch=epoch)
        files = self.dataset.image_files(samples)
        loaded = load_images(self.views, [file.read for file in files], draws)
        return loaded, [Skipped(int(samples[b]), files[b].key, str(error)) for b, error in loaded.errors.items()]

    def __getitem__(self, request: Request) -> Batch:
        loaded, skipped = self.load(request.samples, request.epoch)
        if not loaded.kept:
            raise ValueError(
                f"no image is left in the batch of step {request.step}, as none of its {len(skipped)} samples can be "
                "used: " + "; ".join(f"{s.key!r}: {s.reason}" for s in skipped[:3])
            )
        samples = request.samples[loaded.kept]
        views = make_views(self.views, loaded, samples, seed=self.seed, epoch=request.epoch, step=request.step)
        return Batch(views, torch.from_numpy(samples), tuple(skipped))


class _EvalBatches(Dataset):
    """Map sample numbers [B] to a batch of all of them."""

    def __init__(self, dataset: ShardDataset, pipeline: Pipeline, seed: int, epoch: int) -> None:
        self.dataset, self.pipeline, self.seed, self.epoch = dataset, pipeline, seed, epoch

    def __getitem__(self, samples: IntArray) -> Batch:
        draws = self.pipeline.draws(samples, seed=self.seed, epoch=self.epoch)
        files = [file.read for file in self.dataset.image_files(samples)]
        loaded = load_images([ViewMaker(pipeline=self.pipeline)], files, [draws])
        for b, error in loaded.errors.items():  # a score over fewer samples would pass for one over all
            raise self.dataset.unusable(int(samples[b]), error) from error
        return Batch((View(loaded.images[0]),), torch.from_numpy(samples))


class TrainLoader:
    """Load training batches from any step on.

    Batch g of an epoch is ``order[g * batch_size : (g + 1) * batch_size]``. Each rank takes a consecutive part of it,
    and the last ``N % batch_size`` samples of the order are left out of that epoch. Every rank thus has the same number
    of batches and no sample is used twice in an epoch, for any number of shards, ranks and workers.

    Remote shards are downloaded whole, before the steps that need them. A batch mixes the shards of a window, so every
    rank needs nearly all shards in an epoch (``fetched_bytes``). Ranks of a machine that have the same cache folder
    download each shard once; otherwise each rank does.

    Args:
        dataset: samples.
        views: how each view of a sample is made, one or several, in their order.
        batch_size: over all ranks.
        seed: of the run.
        rank, world_size: of this process.
        shuffle_window: see ``epoch_order``.
        num_workers: loader processes of this rank; 0 loads in this process.
        pin_memory: return batches in page-locked memory, for a CUDA device.

    Raises:
        ValueError: no view or views that do not fit together, a value outside its range, a batch that the ranks do not
            divide or that is larger than the data set, or a cache that is too small for the shards of one window.
    """

    def __init__(
        self,
        *,
        dataset: ShardDataset,
        views: Sequence[ViewMaker],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_window: int = 16384,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        samples = len(dataset)
        check_views(views)
        if batch_size < 1:
            raise ValueError(f"batch_size (={batch_size}) must be at least 1")
        if batch_size % world_size:
            raise ValueError(f"batch_size (={batch_size}) must be divisible by the number of ranks (={world_size})")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank (={rank}) must be 0 to {world_size - 1}: there are {world_size} ranks")
        if shuffle_window < 1:
            raise ValueError(f"shuffle_window (={shuffle_window}) must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers (={num_workers}) must be at least 0")
        if samples < batch_size:
            raise ValueError(f"batch_size (={batch_size}) must be at most the data set's {samples} samples")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.shuffle_window = rank, world_size, shuffle_window
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.steps_per_epoch = samples // batch_size
        self.views = views
        self._batches = _TrainBatches(dataset, views, seed)
        self._window_steps = -(-shuffle_window // batch_size)
        if dataset.remote:
            self._check_cache()

    def order(self, epoch: int) -> IntArray:
        """Return the samples [N] of an epoch in order; the last ``N % batch_size`` are not used."""
        return epoch_order(self.dataset.unit_sizes, seed=self.seed, epoch=epoch, window=self.shuffle_window)

    def requests(self, start_step: int) -> Iterator[Request]:
        """Yield the requests to this rank's workers from a step on, without end."""
        part = self.batch_size // self.world_size
        epoch, first = divmod(start_step, self.steps_per_epoch)
        while True:
            order = self.order(epoch)
            for g in range(first, self.steps_per_epoch):
                begin = g * self.batch_size + self.rank * part
                yield Request(epoch * self.steps_per_epoch + g, epoch, order[begin : begin + part].copy())
            epoch, first = epoch + 1, 0

    def set_workers(self, wanted: Workers, device: torch.device) -> None:
        """Set ``num_workers`` by ``choose_workers``; "auto" times the first images of local shards."""
        self.num_workers = choose_workers(wanted, device)
        if wanted == "auto" and self.num_workers and not self.dataset.remote:
            self.num_workers = choose_workers(wanted, device, self.seconds_per_image())

    def seconds_per_image(self, count: int = 16) -> float | None:
        """Return the CPU time for all views of an image, over the first ``count``; None if none of them can be used."""
        samples = next(self.requests(0)).samples[:count]
        start = time.thread_time()
        kept = self._batches.load(samples, 0)[0].kept
        return (time.thread_time() - start) / len(kept) if kept else None

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) from ``start_step`` on, without end.

        Raises:
            ValueError: a negative step, or no usable sample in a batch.
            RuntimeError: a loader worker died.
        """
        if start_step < 0:
            raise ValueError(f"start_step (={start_step}) must be at least 0")
        return self._numbered(start_step)

    def _numbered(self, start_step: int) -> Iterator[tuple[int, Batch]]:
        prefetcher = None
        if self.dataset.remote:
            prefetcher = Prefetcher(self.shards_needed(start_step), self.dataset.fetch, self._window_steps)
        requests = _Requests(self, start_step)
        loaded = load(self._batches, requests, self.num_workers, self.pin_memory, views=len(self._batches.views))
        with closing(loaded):
            try:
                for step, batch in enumerate(loaded, start_step):
                    if prefetcher is not None:  # not before the first batch: workers are forked until then
                        prefetcher.advance(step)
                    yield step, batch
            finally:
                if prefetcher is not None:
                    prefetcher.stop()

    def shards_needed(self, start_step: int) -> Iterator[tuple[int, int | None]]:
        """Yield (step, shard) if a step needs a shard that no step of the window before it did; see ``Prefetcher``."""
        used: dict[int, int] = {}
        for request in self.requests(start_step):
            shards = np.unique(self.dataset.shard_of(request.samples)).tolist()
            needed = [s for s in shards if request.step - used.get(s, -self._window_steps - 1) > self._window_steps]
            used.update(dict.fromkeys(shards, request.step))
            yield from ((request.step, shard) for shard in needed or [None])

    def fetched_bytes(self, epoch: int = 0) -> int:
        """Return the bytes of the shards that this rank reads in an epoch; a shard counts once for each window."""
        part, used = self.batch_size // self.world_size, self.steps_per_epoch * self.batch_size
        rows = self.order(epoch)[:used].reshape(self.steps_per_epoch, self.batch_size)
        own = rows[:, self.rank * part : (self.rank + 1) * part]
        windows = np.arange(used).reshape(rows.shape)[:, :1] // self.shuffle_window
        return int(self._bytes_in_windows(own, windows).sum())

    def fetching(self) -> str:
        """Return a one-line summary of the bytes read from remote shards."""
        whole = sum(shard["bytes"] for shard in self.dataset.shards)
        text = f"each rank reads {self.fetched_bytes() / 1e9:.3g} GB of {whole / 1e9:.3g} GB of shards in an epoch"
        if self.dataset.cache is not None and self.dataset.cache.temporary:
            return f"{text}, and downloads them itself in every epoch; a folder in data.cache is shared and kept"
        return f"{text}; data.cache is shared by the ranks of a machine and keeps them"

    def _bytes_in_windows(self, samples: IntArray, windows: IntArray) -> IntArray:
        """Return [windows] the bytes of each window's shards; ``windows`` is broadcast to ``samples``."""
        count = len(self.dataset.shards)
        pairs = np.unique(windows * count + self.dataset.shard_of(samples))
        sizes = np.array([shard["bytes"] for shard in self.dataset.shards], dtype=np.float64)
        return np.bincount(pairs // count, weights=sizes[pairs % count]).astype(np.int64)

    def _check_cache(self) -> None:
        cache = self.dataset.cache
        if cache is None or cache.limit is None:
            return
        limit = cache.limit * 1e9
        windows = np.arange(len(self.dataset)) // self.shuffle_window
        needed = int(self._bytes_in_windows(self.order(0), windows).max())
        if needed > limit:
            raise ValueError(
                f"data.cache_gb (={limit / 1e9:g}) must be at least {needed / 1e9:.3g}: the samples that are shuffled "
                f"together (data.shuffle_window={self.shuffle_window}) are in shards of so many bytes, and each would "
                "be downloaded again and again. Or make the window smaller, or name a larger folder in data.cache"
            )


class _Requests:
    """An iterable over ``TrainLoader.requests``, which DataLoader needs as its sampler."""

    def __init__(self, loader: TrainLoader, start_step: int) -> None:
        self.loader, self.start_step = loader, start_step

    def __iter__(self) -> Iterator[Request]:
        return self.loader.requests(self.start_step)


def eval_batches(
    dataset: ShardDataset,
    options: ImageOptions,
    *,
    share: float = 1.0,
    samples: IntArray | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield batches of centre-cropped images in the order of the data set, each once; the last may be smaller.

    Args:
        dataset: images.
        options: how they are read.
        share: see ``CenterCrop``.
        samples: [n] only these samples, in this order.
        pin_memory: return batches in page-locked memory.

    Raises:
        ValueError: ``share`` is outside its range, a decoder is not installed, or a sample cannot be used.
        RuntimeError: a loader worker died.
    """
    chosen = np.arange(len(dataset)) if samples is None else np.asarray(samples, dtype=np.int64)
    size = options.batch_size
    parts = [chosen[k : k + size] for k in range(0, len(chosen), size)]
    pipeline = eval_pipeline(
        image_size=options.image_size, share=share, decoder=options.decoder, max_pixels=options.max_pixels
    )
    return whole_batches(dataset, pipeline, parts, num_workers=options.num_workers, pin_memory=pin_memory)


def whole_batches(
    dataset: ShardDataset,
    pipeline: Pipeline,
    parts: Sequence[IntArray],
    *,
    num_workers: int,
    seed: int = 0,
    epoch: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Return a batch of each list of samples [B], none of which may be left out.

    Args:
        dataset: of the images.
        pipeline: of each image; its random numbers depend on ``seed``, ``epoch`` and the sample.
        parts: the samples of each batch.
        num_workers: loader processes; 0 loads in this process.
        pin_memory: put batches into pinned memory.

    Raises:
        ValueError: a sample that cannot be used.
        RuntimeError: a loader worker died.
    """
    return load(_EvalBatches(dataset, pipeline, seed, epoch), parts, num_workers, pin_memory)
