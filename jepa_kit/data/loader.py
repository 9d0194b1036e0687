"""Batches for training and evaluation: read, decoded, cropped and masked in loader workers.

What a batch holds is a pure function of (seed, step): the same for any number of workers and, joined over ranks, for
any number of ranks. One worker makes one whole batch, so workers never share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jepa_kit.data.order import epoch_order
from jepa_kit.data.shards import ShardDataset
from jepa_kit.data.transforms import CentreCrop, RandomCrop, stack
from jepa_kit.maskers import Masker
from jepa_kit.rng import IntArray
from jepa_kit.structures import MaskBatch


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one rank.

    Args:
        images: [B, 3, h, w] uint8.
        masks: what is seen and predicted; None for evaluation.
        samples: [B] int64, the number of each image in its data set.
    """

    images: Tensor
    masks: MaskBatch | None
    samples: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        masks = None if self.masks is None else self.masks.to(device, non_blocking)
        return Batch(
            self.images.to(device, non_blocking=non_blocking), masks, self.samples.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self, device: Any = None) -> Batch:
        masks = None if self.masks is None else self.masks.pin_memory()
        return Batch(self.images.pin_memory(), masks, self.samples.pin_memory())


@dataclass(frozen=True, eq=False)
class Request:
    """What a worker is asked for: the batch of a step. ``samples`` is [B], this rank's part."""

    step: int
    epoch: int
    samples: IntArray


class _TrainBatches(Dataset):
    """Request -> Batch."""

    def __init__(self, dataset: ShardDataset, masker: Masker | None, crop: RandomCrop, seed: int) -> None:
        self.dataset, self.masker, self.crop, self.seed = dataset, masker, crop, seed

    def __getitem__(self, request: Request) -> Batch:
        samples, epoch = request.samples, request.epoch
        draws, flips = self.crop.draws(samples, seed=self.seed, epoch=epoch)
        images = [self.crop.apply(self.dataset.image(int(i)), draws[b], bool(flips[b])) for b, i in enumerate(samples)]
        masks = None
        if self.masker is not None:
            masks = self.masker(samples, seed=self.seed, epoch=epoch, step=request.step)
        return Batch(stack(images), masks, torch.from_numpy(samples))


class _EvalBatches(Dataset):
    """Sample numbers [B] -> Batch."""

    def __init__(self, dataset: ShardDataset, crop: CentreCrop) -> None:
        self.dataset, self.crop = dataset, crop

    def __getitem__(self, samples: IntArray) -> Batch:
        images = [self.crop.apply(self.dataset.image(int(i))) for i in samples]
        return Batch(stack(images), None, torch.from_numpy(samples))


class TrainLoader:
    """Training batches from any step on.

    Batch g of an epoch is ``order[g * batch_size : (g + 1) * batch_size]``, of which each rank takes its
    consecutive part; the order's last ``N % batch_size`` samples are left out of that epoch.

    Args:
        dataset: where samples are read.
        masker: draws the masks, or None for images alone.
        batch_size: over all ranks.
        image_size: (h, w) in pixels.
        seed: of the run.
        rank, world_size: of this process.
        crop_scale, crop_ratio, flip: see ``RandomCrop``.
        shuffle_window: see ``epoch_order``.
        num_workers: loader processes of this rank; 0 loads in this process.
        pin_memory: batches arrive in page-locked memory, for a CUDA device.

    Raises:
        ValueError: a value outside its range, a batch that does not divide by the ranks, or that is larger than the
            data set.
    """

    def __init__(
        self,
        *,
        dataset: ShardDataset,
        masker: Masker | None,
        batch_size: int,
        image_size: tuple[int, int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        shuffle_window: int = 16384,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
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
        if len(dataset) < batch_size:
            raise ValueError(f"batch_size (={batch_size}) must be at most the data set's {len(dataset)} samples")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.shuffle_window = rank, world_size, shuffle_window
        self.num_workers, self.pin_memory = num_workers, pin_memory
        crop = RandomCrop(image_size=image_size, scale=crop_scale, ratio=crop_ratio, flip=flip)
        self._batches = _TrainBatches(dataset, masker, crop, seed)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset) // self.batch_size

    def requests(self, start_step: int) -> Iterator[Request]:
        """What this rank's workers are asked for, from a step on, without end."""
        part = self.batch_size // self.world_size
        epoch, first = divmod(start_step, self.steps_per_epoch)
        while True:
            order = epoch_order(self.dataset.shard_sizes, seed=self.seed, epoch=epoch, window=self.shuffle_window)
            for g in range(first, self.steps_per_epoch):
                begin = g * self.batch_size + self.rank * part
                yield Request(epoch * self.steps_per_epoch + g, epoch, order[begin : begin + part].copy())
            epoch, first = epoch + 1, 0

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from ``start_step`` on, without end.

        Raises:
            ValueError: a negative step, or a sample that cannot be read.
            RuntimeError: a loader worker died.
        """
        if start_step < 0:
            raise ValueError(f"start_step (={start_step}) must be at least 0")
        loaded = _load(self._batches, _Requests(self, start_step), self.num_workers, self.pin_memory)
        return enumerate(loaded, start_step)


class _Requests:
    """An iterable, as DataLoader wants its sampler to be."""

    def __init__(self, loader: TrainLoader, start_step: int) -> None:
        self.loader, self.start_step = loader, start_step

    def __iter__(self) -> Iterator[Request]:
        return self.loader.requests(self.start_step)


def eval_batches(
    dataset: ShardDataset,
    *,
    image_size: tuple[int, int],
    batch_size: int = 256,
    num_workers: int = 0,
    share: float = 1.0,
    samples: IntArray | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Centre-cropped images in the order of the data set, each once; the last batch may be smaller.

    Args:
        share: see ``CentreCrop``.
        samples: [n] only these samples, in this order.

    Raises:
        ValueError: a value outside its range, or a sample that cannot be read.
        RuntimeError: a loader worker died.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size (={batch_size}) must be at least 1")
    if num_workers < 0:
        raise ValueError(f"num_workers (={num_workers}) must be at least 0")
    chosen = np.arange(len(dataset)) if samples is None else np.asarray(samples, dtype=np.int64)
    parts = [chosen[k : k + batch_size] for k in range(0, len(chosen), batch_size)]
    return _load(_EvalBatches(dataset, CentreCrop(image_size=image_size, share=share)), parts, num_workers, pin_memory)


def _load(batches: Dataset, requests: Iterable[Any], num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """One batch for each request, in their order."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the run's own numbers
    )
    try:
        yield from loader
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        if not _is_death(error) or not num_workers:
            raise
        raise RuntimeError(
            f"a loader worker died ({error or type(error).__name__}). Often memory ran out: fewer num_workers than "
            f"{num_workers} or a smaller batch_size help; or /dev/shm is too small for the batches in flight"
        ) from error


def _is_death(error: Exception) -> bool:
    """Whether an error of DataLoader means that a worker is gone, and not that it raised the error itself.

    It is found dead by its process (RuntimeError), or by its end of the connection over which a finished batch was
    being fetched. What a worker raises is raised again with a text that begins "Caught".
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return not str(error).startswith("Caught")
