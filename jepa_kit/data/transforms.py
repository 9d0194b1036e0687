"""From decoded images to arrays of one size: the released random resized crop, a flip, the centre crop.

Legend of shapes: B images, h, w rows and columns of the result, H, W those of an image as decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jepa_kit.rng import FloatArray, IntArray, Stream, uniforms

ATTEMPTS = 10
Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, as Pillow has it."""


def crop_box(
    size: tuple[int, int], draws: Sequence[float], *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random crop by the rule that torchvision documents for ``RandomResizedCrop``.

    Ten tries draw a share of the area, uniform in ``scale``, and an aspect ratio, log-uniform in ``ratio``. The first
    crop that fits is put anywhere, uniformly. Where none fits, it is the central crop that is as large as the
    bounds of ``ratio`` allow.

    Args:
        size: (H, W) of the image.
        draws: 2 * ATTEMPTS + 2 uniform numbers in [0, 1): share and ratio of each try, then top and left.
        scale: least and most share of the area.
        ratio: least and most width / height.
    """
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for k in range(0, 2 * ATTEMPTS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[k])
        aspect = math.exp(low + (high - low) * draws[k + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width < height * ratio[0]:
        h = round(width / ratio[0])
    elif width > height * ratio[1]:
        w = round(height * ratio[1])
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


class RandomCrop:
    """The released augmentation: a random resized crop, bilinear; and, where asked for, a horizontal flip.

    A pure function of (seed, epoch, number of the sample in its data set).

    Args:
        image_size: (h, w) of the result.
        scale, ratio: see ``crop_box``.
        flip: probability of a flip; the release has 0.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
    ) -> None:
        _check_size(image_size)
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"crop_scale (={scale}) must be ascending shares of the area, above 0 and at most 1")
        if not 0.0 < ratio[0] <= ratio[1]:
            raise ValueError(f"crop_ratio (={ratio}) must be ascending ratios of width to height, above 0")
        if not 0.0 <= flip <= 1.0:
            raise ValueError(f"flip (={flip}) must be a probability, 0 to 1")
        self.image_size, self.scale, self.ratio, self.flip = image_size, scale, ratio, flip

    def draws(self, samples: IntArray, *, seed: int, epoch: int) -> tuple[FloatArray, NDArray[np.bool_]]:
        """[B, 2 * ATTEMPTS + 2] draws for ``crop_box``, and [B] which images are flipped."""
        numbers = uniforms(Stream.CROP, samples, 2 * ATTEMPTS + 2, seed=seed, epoch=epoch)
        flips = uniforms(Stream.FLIP, samples, 1, seed=seed, epoch=epoch)[:, 0] < self.flip
        return numbers, flips

    def apply(self, image: Image.Image, draws: FloatArray, flipped: bool) -> Image.Image:
        """One image, of any size, with its draws."""
        box = crop_box((image.height, image.width), draws.tolist(), scale=self.scale, ratio=self.ratio)
        # crop, then resize: Pillow's resize(box=...) would blend in pixels from outside the box
        image = image.crop(box).resize(self.image_size[::-1], Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


class CentreCrop:
    """The evaluation's view: the image resized until it just covers the result, then its middle.

    For a square result this resizes the shorter side and crops the longer one.

    Args:
        image_size: (h, w) of the result.
        share: of the covering size that is kept on each side: 1.0 keeps all; 0.875 is the field's 224 of 256.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, *, image_size: tuple[int, int], share: float = 1.0) -> None:
        _check_size(image_size)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share (={share}) must be above 0 and at most 1")
        self.image_size, self.share = image_size, share

    def apply(self, image: Image.Image) -> Image.Image:
        h, w = self.image_size
        factor = max(round(h / self.share) / image.height, round(w / self.share) / image.width)
        size = max(w, round(image.width * factor)), max(h, round(image.height * factor))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - w) // 2, (size[1] - h) // 2
        return image if size == (w, h) else image.crop((left, top, left + w, top + h))


def _check_size(image_size: tuple[int, int]) -> None:
    if min(image_size) < 1:
        raise ValueError(f"image_size (={image_size}) must be at least 1 pixel each way")


def stack(images: Sequence[Image.Image]) -> Tensor:
    """[B, 3, h, w] uint8 of RGB images of one size."""
    out = np.empty((len(images), 3, images[0].height, images[0].width), dtype=np.uint8)
    for b, image in enumerate(images):
        out[b] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(out)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std, on the device where the images are.

    Args:
        images: [B, 3, h, w] uint8.
        mean, std: of each channel, for values in [0, 1].

    Returns:
        [B, 3, h, w] float32.
    """
    centre, scale = _statistics(tuple(mean), tuple(std), images.device)
    return images.float().div_(255.0).sub_(centre).div_(scale)


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # kept, since making them copies to the device, which waits for it
    return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))  # type: ignore[return-value]
