"""Mirrored images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image

from jepa_kit.data.transforms.crop_geometry import check_probability
from jepa_kit.registry import TRANSFORMS
from jepa_kit.rng import Stream


@TRANSFORMS.register("flip")
class Flip:
    """A mirrored image, with a probability.

    Args:
        p: probability.
        direction: ``horizontal`` swaps left and right, ``vertical`` top and bottom.

    Raises:
        ValueError: ``p`` is no probability.
    """

    stream = Stream.FLIP
    num_draws = 1

    def __init__(self, *, p: float = 0.5, direction: Literal["horizontal", "vertical"] = "horizontal") -> None:
        check_probability("p", p)
        self.p, self.direction = p, direction
        horizontal = direction == "horizontal"
        self._transpose = Image.Transpose.FLIP_LEFT_RIGHT if horizontal else Image.Transpose.FLIP_TOP_BOTTOM

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        return image.transpose(self._transpose) if draws[0] < self.p else image
