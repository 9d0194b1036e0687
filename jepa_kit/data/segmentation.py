"""Segmentation masks as they lie in a shard: a PNG of one 8-bit channel, the class of each pixel, 0 for the background.

They have nothing to do with a masker's: nothing is hidden by them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import MAX_PIXELS, encode_png, open_image
from jepa_kit.errors import ImageError

Mask = NDArray[np.uint8]


def encode_mask(mask: Mask) -> bytes:
    """The PNG of a mask [H, W] uint8."""
    assert mask.dtype == np.uint8, mask.dtype
    assert mask.ndim == 2, mask.shape
    return encode_png(Image.fromarray(mask))


def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> Mask:
    """[H, W] uint8: the classes of a mask's PNG; a palette, which is for people who look at it, is passed over.

    Raises:
        ImageError: the bytes are no image, one whose pixels are no 8-bit numbers, or one of more than ``max_pixels``.
    """
    image = open_image(data, max_pixels)
    if image.mode not in ("L", "P"):
        raise ImageError(f"a mask must have one 8-bit channel, but its mode is {image.mode!r}")
    return np.array(image, dtype=np.uint8)
