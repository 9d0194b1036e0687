"""Transforms that set the size of an image.

Legend of shapes: h, w rows and columns of the result, H, W those of an image as decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from jepa_kit.data.transforms.crop_geometry import (
    ATTEMPTS,
    Interpolation,
    Window,
    check_crop,
    check_size,
    crop_box,
    resample,
)
from jepa_kit.registry import TRANSFORMS
from jepa_kit.rng import Stream


@TRANSFORMS.register("random_resized_crop")
class RandomResizedCrop:
    """The released augmentation: a random part of the image at the size of the result; see ``crop_box``.

    Args:
        image_size: (h, w) of the result.
        scale: (least, most) share of the image's area that is kept.
        ratio: (least, most) width over height of the part before it is resized.
        interpolation: of the resizing; the release has bilinear.

    Raises:
        ValueError: a value outside its range.
    """

    stream = Stream.CROP
    num_draws = 2 * ATTEMPTS + 2

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
    ) -> None:
        check_size(image_size)
        check_crop(scale, ratio)
        self.image_size, self.scale, self.ratio, self.interpolation = image_size, scale, ratio, interpolation

    def window(self, size: tuple[int, int], draws: Sequence[float]) -> Window:
        """What becomes of an image of size (H, W)."""
        box = crop_box(size, draws, scale=self.scale, ratio=self.ratio)
        return Window(box, self.image_size[::-1], interpolation=self.interpolation)

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        return resample(image, self.window((image.height, image.width), draws))


@TRANSFORMS.register("center_crop")
class CenterCrop:
    """The evaluation's view: the image resized until it just covers the result, then its middle.

    For a square result this resizes the shorter side and crops the longer one.

    Args:
        image_size: (h, w) of the result.
        share: of the covering size that is kept on each side: 1.0 keeps all; 0.875 is the field's 224 of 256.
        interpolation: of the resizing.

    Raises:
        ValueError: a value outside its range.
    """

    num_draws = 0

    def __init__(
        self, *, image_size: tuple[int, int], share: float = 1.0, interpolation: Interpolation = "bilinear"
    ) -> None:
        check_size(image_size)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share (={share}) must be above 0 and at most 1")
        self.image_size, self.share, self.interpolation = image_size, share, interpolation

    def window(self, size: tuple[int, int], draws: Sequence[float] = ()) -> Window:
        """What becomes of an image of size (H, W)."""
        (h, w), (height, width) = self.image_size, size
        factor = max(round(h / self.share) / height, round(w / self.share) / width)
        columns, rows = max(w, round(width * factor)), max(h, round(height * factor))
        left, top = (columns - w) // 2, (rows - h) // 2
        part = None if (columns, rows) == (w, h) else (left, top, left + w, top + h)
        return Window((0, 0, width, height), (columns, rows), part, self.interpolation)

    def __call__(self, image: Image.Image, draws: Sequence[float] = ()) -> Image.Image:
        return resample(image, self.window((image.height, image.width)))


@TRANSFORMS.register("resize")
class Resize:
    """The whole image at the size of the result, whatever its own width over height.

    Args:
        image_size: (h, w) of the result.
        interpolation: of the resizing.

    Raises:
        ValueError: a value outside its range.
    """

    num_draws = 0

    def __init__(self, *, image_size: tuple[int, int], interpolation: Interpolation = "bilinear") -> None:
        check_size(image_size)
        self.image_size, self.interpolation = image_size, interpolation

    def window(self, size: tuple[int, int], draws: Sequence[float] = ()) -> Window:
        """What becomes of an image of size (H, W)."""
        return Window((0, 0, size[1], size[0]), self.image_size[::-1], interpolation=self.interpolation)

    def __call__(self, image: Image.Image, draws: Sequence[float] = ()) -> Image.Image:
        return resample(image, self.window((image.height, image.width)))
