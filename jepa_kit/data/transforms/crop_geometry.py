"""Which part of an image becomes the result, and at what size: crops as numbers, before any pixel is touched.

Legend of shapes: h, w rows and columns of the result, H, W those of an image as decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, as Pillow has it."""
Interpolation = Literal["bilinear", "bicubic"]

ATTEMPTS = 10
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Window:
    """``image.crop(box).resize(size).crop(part)``.

    Args:
        box: of the upright image.
        size: (columns, rows) to which the box is resized.
        part: of the resized box that is kept; None for all.
        interpolation: of the resizing; both smooth where they make smaller (antialiasing), as Pillow does.
    """

    box: Box
    size: tuple[int, int]
    part: Box | None = None
    interpolation: Interpolation = "bilinear"


def resample(image: Image.Image, window: Window) -> Image.Image:
    """The pixels of a window, by Pillow: the definition that every faster way is measured against."""
    if window.box != (0, 0, *image.size):
        # crop, then resize: Pillow's resize(box=...) would blend in pixels from outside the box
        image = image.crop(window.box)
    if window.size != image.size:
        image = image.resize(window.size, FILTERS[window.interpolation])
    return image if window.part is None else image.crop(window.part)


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


def check_size(image_size: tuple[int, int]) -> None:
    """Raises ValueError for a result without pixels."""
    if min(image_size) < 1:
        raise ValueError(f"image_size (={image_size}) must be at least 1 pixel each way")


def check_probability(name: str, p: float) -> None:
    """Raises ValueError for what is no probability."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} (={p}) must be a probability, 0 to 1")


def check_crop(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raises ValueError for bounds that ``crop_box`` cannot have."""
    if not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise ValueError(f"scale (={scale}) must be ascending shares of the area, above 0 and at most 1")
    if not 0.0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio (={ratio}) must be ascending ratios of width to height, above 0")
