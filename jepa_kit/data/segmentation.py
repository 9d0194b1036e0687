"""Encode and decode segmentation masks: PNGs with one 8-bit channel, the class of each pixel, 0 for the background.

They are labels, unrelated to the masks of a masker.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import MAX_PIXELS, encode_png, open_image
from jepa_kit.errors import ImageError

Mask = NDArray[np.uint8]


def encode_mask(mask: Mask) -> bytes:
    """Return a mask [H, W] uint8 as PNG."""
    assert mask.dtype == np.uint8, mask.dtype
    assert mask.ndim == 2, mask.shape
    return encode_png(Image.fromarray(mask))


def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> Mask:
    """Return the class of each pixel [H, W] uint8 of a PNG; a palette is ignored.

    Raises:
        ImageError: the bytes are not an image with one 8-bit channel, or it has more than ``max_pixels`` pixels.
    """
    image = open_image(data, max_pixels)
    if image.mode not in ("L", "P"):
        raise ImageError(f"a mask must have one 8-bit channel, but its mode is {image.mode!r}")
    return np.array(image, dtype=np.uint8)
