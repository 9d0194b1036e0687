"""Random images of a data set, for health, pictures and evaluation during a run."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.rng import IntArray, Stream, generator, permutation


def random_samples(dataset: ShardDataset, count: int, *, seed: int, lane: int = 2) -> IntArray:
    """Return up to ``count`` different sample numbers in random order, a function of the seed and the lane."""
    return permutation(generator(Stream.EVALUATION, seed=seed, lane=lane), len(dataset))[:count]


def read_images(dataset: ShardDataset, options: ImageOptions, samples: IntArray) -> Tensor:
    """Return uint8 [n, 3, h, w]: the centre crops of samples [n], in their order.

    Raises:
        ValueError: if an image cannot be used, or there is none.
    """
    return torch.cat([batch.images for batch in eval_batches(dataset, options, samples=samples)])
