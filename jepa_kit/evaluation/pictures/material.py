"""The images, masks and networks that pictures of a run are drawn from.

B = images    n = patches of an image, H * W    D = width of a target    p = patch size    P = target patches
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import normalize
from jepa_kit.evaluation.feature_sources import encoder_named
from jepa_kit.evaluation.features import LoadedRun
from jepa_kit.evaluation.health.measure import BATCH, several_masks
from jepa_kit.evaluation.images import random_samples, read_images
from jepa_kit.evaluation.pictures.decoder import image_scale, patchify
from jepa_kit.evaluation.pictures.maps import all_targets, predict
from jepa_kit.from_config import masker_of
from jepa_kit.interfaces import Encoder
from jepa_kit.recipe import PatchRecipe
from jepa_kit.structures import Grid, MaskBatch

FEWEST = 24
"""Images that a page needs: 16 for the figures of health, 8 for the decoder."""


@dataclass(frozen=True, eq=False)
class Material:
    """A run and the images for its pictures.

    Args:
        run: with its modules on the device.
        images: [B, 3, h, w] uint8, the subject of the pictures; the first of them are shown.
        others: [B', 3, h, w] uint8 on which the decoder is trained.
        masks: of ``images``, by the recipe's masker; None if it has none.
        device: of the networks.
        seed: of the decoder, its noise and the halves of contexts.
    """

    run: LoadedRun
    images: Tensor
    others: Tensor
    masks: MaskBatch | None
    device: torch.device
    seed: int

    @property
    def grid(self) -> Grid:
        return cast(Encoder, self.run.jepa.encoder).grid

    @property
    def patch_size(self) -> int:
        return cast(Encoder, self.run.jepa.encoder).patch_size

    @property
    def recipe(self) -> PatchRecipe:
        """The recipe, for sections on predictions: they are left out for recipes that predict no patches."""
        assert isinstance(self.run.jepa, PatchRecipe)
        return self.run.jepa

    @property
    def encoder(self) -> Literal["target", "context"]:
        """Return the name of the encoder to evaluate."""
        return encoder_named(self.run.jepa)

    @property
    def normalizes_images(self) -> bool:
        """Return whether the encoder removes the colour and contrast of each image as a whole."""
        return getattr(self.run.jepa.encoder, "input_norm", "none") == "image"

    def normalized(self, images: Tensor) -> Tensor:
        """Return images [B, 3, h, w] as the encoder's input, on its device."""
        data = self.run.config.data
        return normalize(images.to(self.device), data.mean, data.std)

    def targets(self, images: Tensor) -> Tensor:
        """Return [B, n, D] on the host: the target of every patch."""
        return all_targets(self.recipe, self.normalized(images)).cpu()

    def predictions(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Return [P, D] on the host: predictions, packed as ``masks.targets``."""
        return predict(self.recipe, self.normalized(images), masks.to(self.device)).cpu()

    def pixels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a decoder can draw, [B, n, 3 * p * p] on the host, and the centre and deviation left out of it.

        See ``image_scale``.
        """
        x = self.normalized(images).cpu()
        centre, deviation = image_scale(x, self.normalizes_images)
        return patchify((x - centre) / deviation, self.patch_size), centre, deviation


def divided(samples: int, images: int, others: int, path: str = "the data set") -> tuple[int, int]:
    """Return how many images to show and how many others to train the decoder on: fewer if the data set is small.

    Args:
        samples: number of images in the data set.
        images, others: requested numbers.
        path: of the data set, for the message.

    Raises:
        ValueError: if there are fewer than 24 images.
    """
    if samples < FEWEST:
        raise ValueError(f"{path} has {samples} images; pictures of a run need at least {FEWEST}")
    reserved = min(others, max(BATCH, samples - images), samples // 3)  # for the decoder
    images = min(images, samples - reserved)
    return images, min(others, samples - images)


def gather(
    run: LoadedRun,
    dataset: ShardDataset,
    *,
    images: int,
    others: int,
    device: torch.device,
    seed: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Material:
    """Return random images of a data set with the recipe's masks; fewer if the data set is small (see ``divided``).

    Args:
        run: its modules are moved to ``device``.
        dataset: where the images are.
        images, others: requested numbers of images to show, and to train the decoder on.
        device: for the networks.
        seed: of the choice of images, and of everything random later.
        log: called with a message if there are fewer images than requested.

    Raises:
        ValueError: if the data set has fewer than 24 images.
    """
    requested = (images, others)
    images, others = divided(len(dataset), images, others, dataset.path)
    if (images, others) != requested:
        log(f"{dataset.path} has {len(dataset)} images: {images} for pictures, {others} to train the decoder")
    samples = random_samples(dataset, images + others, seed=seed, lane=3)
    pixels = read_images(dataset, ImageOptions.from_config(run.config.data), samples)
    masker = masker_of(run.config)
    masks = None if masker is None else several_masks(masker, np.arange(images), 1, seed=seed)
    run.jepa.to(device)
    return Material(run, pixels[:images], pixels[images:], masks, device, seed)
