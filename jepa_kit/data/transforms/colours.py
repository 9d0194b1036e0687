"""Transforms of colour and sharpness, by Pillow; the released recipe has none of them, the StoP recipe and others do.

Each takes an RGB image and numbers in [0, 1), of which the first decides whether it is applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from jepa_kit.data.transforms.crops import check_probability
from jepa_kit.registry import TRANSFORMS


@TRANSFORMS.register("color_jitter")
class ColorJitter:
    """Change brightness, contrast, saturation and hue by random amounts, in random order, as torchvision's ColorJitter.

    A factor is uniform in [max(0, 1 - x), 1 + x]. Brightness multiplies; contrast blends with the mean of the grey
    image (one number), saturation with the grey image; hue shifts the H of HSV by a fraction of the circle, uniform in
    [-x, x]. The 24 orders are equally likely. Each step rounds to 8 bits, as torchvision's does for Pillow images.

    Args:
        brightness, contrast, saturation: x above, at least 0; 0 leaves it out.
        hue: x above, 0 to 0.5.
        p: probability that the image is changed.

    Raises:
        ValueError: a value outside its range, or all four 0.
    """

    stream_name = "colour_jitter"
    num_draws = 9
    """p, four amounts, four numbers whose ranks are the order."""
    action_size = 5

    def __init__(
        self,
        *,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        p: float = 1.0,
    ) -> None:
        check_probability("p", p)
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} (={value}) must be at least 0, and finite")
        if not 0.0 <= hue <= 0.5:
            raise ValueError(f"hue (={hue}) must be a fraction of the colour circle, 0 to 0.5")
        if not brightness and not contrast and not saturation and not hue:
            raise ValueError("brightness, contrast, saturation and hue are all 0: leave the colour jitter out")
        self.ranges, self.p = (brightness, contrast, saturation, hue), p

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        if draws[0] >= self.p:
            return image
        amounts = self._amounts(draws)
        for k in np.argsort(draws[5:9], kind="stable").tolist():
            if self.ranges[k]:
                image = shift_hue(image, amounts[3]) if k == 3 else _ENHANCERS[k](image).enhance(amounts[k])
        return image

    def _amounts(self, draws: Sequence[float]) -> list[float]:
        """Return the factors of brightness, contrast and saturation, and the shift of the hue."""
        lows = [max(0.0, 1.0 - x) for x in self.ranges[:3]]
        factors = [low + (1.0 + x - low) * u for low, x, u in zip(lows, self.ranges, draws[1:], strict=False)]
        return [*factors, self.ranges[3] * (2.0 * draws[4] - 1.0)]

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return whether it is applied (1.0 or 0.0), its three factors and its shift of the hue, without their order.

        If it is not applied: 0, 1, 1, 1, 0.
        """
        return [1.0, *self._amounts(draws)] if draws[0] < self.p else [0.0, 1.0, 1.0, 1.0, 0.0]


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def shift_hue(image: Image.Image, fraction: float) -> Image.Image:
    """Return an RGB image with its hues shifted by a fraction of the circle, in Pillow's HSV of 8 bits."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(fraction * 256) % 256
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@TRANSFORMS.register("gaussian_blur")
class GaussianBlur:
    """Blur by Pillow's approximation of a Gaussian, three box filters, which is within about one level of 255.

    Args:
        sigma: (smallest, largest) standard deviation in pixels of the result, uniform between them.
        p: probability.

    Raises:
        ValueError: a value outside its range.
    """

    num_draws = 2
    action_size = 2

    def __init__(self, *, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        check_probability("p", p)
        if not 0.0 < sigma[0] <= sigma[1] < math.inf:
            raise ValueError(f"sigma (={sigma}) must be ascending, above 0 and finite")
        self.sigma, self.p = sigma, p

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        if draws[0] >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(self._sigma(draws)))

    def _sigma(self, draws: Sequence[float]) -> float:
        low, high = self.sigma
        return low + (high - low) * draws[1]

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return whether it is applied (1.0 or 0.0), and the standard deviation in pixels, 0 if it is not."""
        return [1.0, self._sigma(draws)] if draws[0] < self.p else [0.0, 0.0]


@TRANSFORMS.register("grayscale")
class Grayscale:
    """Convert to grey, in three equal channels: 0.299 R + 0.587 G + 0.114 B (ITU-R 601).

    Args:
        p: probability.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """

    stream_name = "grey"
    num_draws = 1
    action_size = 1

    def __init__(self, *, p: float = 0.2) -> None:
        check_probability("p", p)
        self.p = p

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        return image.convert("L").convert("RGB") if draws[0] < self.p else image

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return whether it is applied, 1.0 or 0.0."""
        return [float(draws[0] < self.p)]


@TRANSFORMS.register("solarize")
class Solarize:
    """Invert levels at or above ``threshold``.

    Args:
        threshold: 0 to 255.
        p: probability.

    Raises:
        ValueError: a value outside its range.
    """

    stream_name = "solarise"
    num_draws = 1
    action_size = 1

    def __init__(self, *, threshold: int = 128, p: float = 0.2) -> None:
        check_probability("p", p)
        if not 0 <= threshold <= 255:
            raise ValueError(f"threshold (={threshold}) must be a level, 0 to 255")
        self.threshold, self.p = threshold, p

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        return ImageOps.solarize(image, self.threshold) if draws[0] < self.p else image

    def action(self, draws: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Return whether it is applied, 1.0 or 0.0."""
        return [float(draws[0] < self.p)]
