"""Geometric transforms: crops, resizing and flips.

A crop is computed as numbers (``Window``) from the size of the image, and applied by Pillow or, to the arrays of the
fast decoder, by torch.

Shapes: h, w rows and columns of the result; H, W those of the decoded image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from PIL import Image

from jepa_kit.data.images import Pixels
from jepa_kit.errors import ImageError
from jepa_kit.registry import TRANSFORMS
from jepa_kit.rng import Stream

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, as in Pillow."""
Interpolation = Literal["bilinear", "bicubic"]

ATTEMPTS = 10
"""Attempts of ``crop_box`` to find a box inside the image."""
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Window:
    """``image.crop(box).resize(size).crop(part)``.

    Args:
        box: of the upright image.
        size: (columns, rows) to which the box is resized.
        part: of the resized box that is kept; None for all of it.
        interpolation: of the resizing, which antialiases when it reduces, as Pillow does.
    """

    box: Box
    size: tuple[int, int]
    part: Box | None = None
    interpolation: Interpolation = "bilinear"


@runtime_checkable
class Transform(Protocol):
    """Map an RGB image and its own random numbers to an RGB image.

    Attributes:
        num_draws: uniform numbers in [0, 1) that it uses for each image.
    """

    num_draws: int

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image: ...


@runtime_checkable
class Described(Transform, Protocol):
    """A transform that describes what its draws do to an image; for views with ``action: true``.

    Attributes:
        action_size: numbers of ``action``, 1 and up.
    """

    action_size: int

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> Sequence[float]:
        """Return what the draws do to an image of size (H, W); docs/data.md has the layout of each transform."""


@runtime_checkable
class Crop(Transform, Protocol):
    """A transform whose result has the size (h, w) of the result."""

    def window(self, size: tuple[int, int], draws: Sequence[float]) -> Window:
        """Return the window that becomes the result, for an image of size (H, W)."""


def shown(window: Window, size: tuple[int, int]) -> list[float]:
    """Return (left, top, right, bottom) of what a window shows, as fractions of an image of size (H, W)."""
    (left, top, right, bottom), (columns, rows) = window.box, window.size
    part = window.part or (0, 0, columns, rows)
    xs = (left + x * (right - left) / columns for x in part[::2])
    ys = (top + y * (bottom - top) / rows for y in part[1::2])
    return [value for x, y in zip(xs, ys, strict=True) for value in (x / size[1], y / size[0])]


def resample(image: Image.Image, window: Window) -> Image.Image:
    """Crop and resize by Pillow: the reference for ``resample_array``."""
    if window.box != (0, 0, *image.size):
        # crop, then resize: Pillow's resize(box=...) would blend in pixels from outside the box
        image = image.crop(window.box)
    if window.size != image.size:
        image = image.resize(window.size, FILTERS[window.interpolation])
    return image if window.part is None else image.crop(window.part)


def resample_array(pixels: Pixels, window: Window) -> Pixels:
    """Crop and resize [H, W, 3] by torch: at most 1 level of 255 from ``resample``, or 2 for bicubic."""
    left, top, right, bottom = window.box
    part = pixels[top:bottom, left:right]
    if window.size != (right - left, bottom - top):
        chw = torch.from_numpy(part)[None].permute(0, 3, 1, 2)  # [1, 3, H, W], a view: torch keeps channels last
        resized = F.interpolate(chw, size=window.size[::-1], mode=window.interpolation, antialias=True)
        part = resized[0].permute(1, 2, 0).numpy()  # [h, w, 3]
    if window.part is not None:
        left, top, right, bottom = window.part
        part = part[top:bottom, left:right]
    return part


def apply_crop(
    crop: Crop, name: str, max_pixels: int, image: Image.Image | Pixels, draws: Sequence[float]
) -> Image.Image | Pixels:
    """Return the image's window of a crop.

    Raises:
        ImageError: a narrow image that would be enlarged to more than ``max_pixels`` before most of it is cut off.
    """
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    window = crop.window((height, width), draws)
    if window.part is not None and window.size[0] * window.size[1] > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels would become {window.size[0]} x {window.size[1]} before {name} cuts them, "
            f"more than max_pixels (={max_pixels}) allows"
        )
    return resample(image, window) if isinstance(image, Image.Image) else resample_array(image, window)


def crop_box(
    size: tuple[int, int], draws: Sequence[float], *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return a random crop by the rule that torchvision documents for ``RandomResizedCrop``.

    Each of ten attempts draws a fraction of the area, uniform in ``scale``, and an aspect ratio, log-uniform in
    ``ratio``. The first crop that fits is placed uniformly. If none fits, the result is the largest central crop
    whose aspect ratio is within ``ratio``.

    Args:
        size: (H, W) of the image.
        draws: 2 * ATTEMPTS + 2 uniform numbers in [0, 1): fraction and ratio of each attempt, then top and left.
        scale: smallest and largest fraction of the area.
        ratio: smallest and largest width / height.
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
    """Raise ValueError if a side is below 1."""
    if min(image_size) < 1:
        raise ValueError(f"image_size (={image_size}) must be at least 1 pixel each way")


def check_probability(name: str, p: float) -> None:
    """Raise ValueError if ``p`` is outside [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} (={p}) must be a probability, 0 to 1")


@TRANSFORMS.register("random_resized_crop")
class RandomResizedCrop:
    """Crop a random part of the image and resize it: the released augmentation, see ``crop_box``.

    Args:
        image_size: (h, w) of the result.
        scale: (smallest, largest) fraction of the image's area that is kept.
        ratio: (smallest, largest) width / height of the part before it is resized.
        interpolation: of the resizing; bilinear in the release.

    Raises:
        ValueError: a value outside its range.
    """

    stream = Stream.CROP
    num_draws = 2 * ATTEMPTS + 2
    action_size = 4

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
    ) -> None:
        check_size(image_size)
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"scale (={scale}) must be ascending fractions of the area, above 0 and at most 1")
        if not 0.0 < ratio[0] <= ratio[1] < math.inf:
            raise ValueError(f"ratio (={ratio}) must be ascending ratios of width to height, above 0")
        self.image_size, self.scale, self.ratio, self.interpolation = image_size, scale, ratio, interpolation

    def window(self, size: tuple[int, int], draws: Sequence[float]) -> Window:
        """Return a random window of an image of size (H, W)."""
        box = crop_box(size, draws, scale=self.scale, ratio=self.ratio)
        return Window(box, self.image_size[::-1], interpolation=self.interpolation)

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        return resample(image, self.window((image.height, image.width), draws))

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return (left, top, right, bottom) of the part that is shown, as fractions of the image."""
        return shown(self.window(size, draws), size)


@TRANSFORMS.register("center_crop")
class CenterCrop:
    """Resize the image until it just covers the result, then crop its centre: the view for evaluation.

    A square result resizes the shorter side and crops the longer one.

    Args:
        image_size: (h, w) of the result.
        share: fraction of the covering size that is kept on each side: 1.0 keeps all; 0.875 is the usual 224 of 256.
        interpolation: of the resizing.

    Raises:
        ValueError: a value outside its range.
    """

    num_draws = 0
    action_size = 4

    def __init__(
        self, *, image_size: tuple[int, int], share: float = 1.0, interpolation: Interpolation = "bilinear"
    ) -> None:
        check_size(image_size)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share (={share}) must be above 0 and at most 1")
        self.image_size, self.share, self.interpolation = image_size, share, interpolation

    def window(self, size: tuple[int, int], draws: Sequence[float] = ()) -> Window:
        """Return the central window of an image of size (H, W)."""
        (h, w), (height, width) = self.image_size, size
        factor = max(round(h / self.share) / height, round(w / self.share) / width)
        columns, rows = max(w, round(width * factor)), max(h, round(height * factor))
        left, top = (columns - w) // 2, (rows - h) // 2
        part = None if (columns, rows) == (w, h) else (left, top, left + w, top + h)
        return Window((0, 0, width, height), (columns, rows), part, self.interpolation)

    def __call__(self, image: Image.Image, draws: Sequence[float] = ()) -> Image.Image:
        return resample(image, self.window((image.height, image.width)))

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return (left, top, right, bottom) of the part that is shown, as fractions of the image."""
        return shown(self.window(size, draws), size)


@TRANSFORMS.register("resize")
class Resize:
    """Resize the whole image to the size of the result, without keeping its aspect ratio.

    Args:
        image_size: (h, w) of the result.
        interpolation: of the resizing.

    Raises:
        ValueError: a value outside its range.
    """

    num_draws = 0
    action_size = 4

    def __init__(self, *, image_size: tuple[int, int], interpolation: Interpolation = "bilinear") -> None:
        check_size(image_size)
        self.image_size, self.interpolation = image_size, interpolation

    def window(self, size: tuple[int, int], draws: Sequence[float] = ()) -> Window:
        """Return the window of a whole image of size (H, W)."""
        return Window((0, 0, size[1], size[0]), self.image_size[::-1], interpolation=self.interpolation)

    def __call__(self, image: Image.Image, draws: Sequence[float] = ()) -> Image.Image:
        return resample(image, self.window((image.height, image.width)))

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return (left, top, right, bottom) of the part that is shown, as fractions of the image."""
        return shown(self.window(size, draws), size)


@TRANSFORMS.register("horizontal_flip")
class HorizontalFlip:
    """Swap left and right.

    Args:
        p: probability.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """

    stream = Stream.FLIP
    num_draws = 1
    action_size = 1
    method = Image.Transpose.FLIP_LEFT_RIGHT

    def __init__(self, *, p: float = 0.5) -> None:
        check_probability("p", p)
        self.p = p

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        return image.transpose(self.method) if draws[0] < self.p else image

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return whether the image is flipped, 1.0 or 0.0."""
        return [float(draws[0] < self.p)]


@TRANSFORMS.register("vertical_flip")
class VerticalFlip(HorizontalFlip):
    """Swap top and bottom; options as for ``HorizontalFlip``."""

    method = Image.Transpose.FLIP_TOP_BOTTOM
