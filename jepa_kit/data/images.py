"""From the bytes of an image file to RGB pixels, in one place."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
"""Formats whose bytes go into a shard as they are, and the extension of their members. (MPO: a JPEG, then more.)"""

DECODE_ERRORS = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's plug-ins raise on a file that is broken or not an image."""

_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def open_image(data: bytes) -> Image.Image:
    """The image of a file's bytes, decoded whole, in the mode of the file.

    Raises:
        One of ``DECODE_ERRORS`` where the bytes are not an image that can be decoded to its end.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("no image format that Pillow knows") from error  # its own text names an address
    image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright: a camera's orientation mark is obeyed, 16-bit grey keeps its upper 8 bits, alpha is dropped."""
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:  # Pillow's convert would clip everything above 255 to white
        image = Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """``to_rgb(open_image(data))``."""
    return to_rgb(open_image(data))


def encode_png(image: Image.Image) -> bytes:
    """Lossless bytes of an image."""
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=4)
    return out.getvalue()
