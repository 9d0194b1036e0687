"""From the bytes of an image file to RGB pixels, in one place: whatever kind of file it is, or why it is none."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
"""Formats whose bytes go into a shard as they are, and the extension of their members. (MPO: a JPEG, then more.)"""

DECODE_ERRORS = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,  # ImageError is one
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,  # AVIF; NotImplementedError, which DDS and BLP raise, is one
    TypeError,  # TIFF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's plug-ins raise on a file that is broken or not an image."""

MAX_PIXELS = 89_478_485
"""Rows times columns that an image may have, where nothing else is said; above it, Pillow warns of a bomb."""

_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ORIENTATION = 0x0112
UPRIGHT = 1
"""The orientation mark of an image that is shown as it is stored."""
_PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS


class ImageError(ValueError):
    """The bytes of a file are no usable image; the text is the reason."""


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever Pillow raises on a broken file, as an ``ImageError``."""
    try:
        yield
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(str(error) or type(error).__name__) from error


def open_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a file's bytes with its size, mode and marks, and no pixel decoded yet.

    Raises:
        ImageError: no image that Pillow knows, or one of more than ``max_pixels`` rows times columns.
    """
    if not data:
        raise ImageError("the file is empty")
    with _reasons():
        Image.MAX_IMAGE_PIXELS = None  # our own limit is checked below, with a reason, and may be higher
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:  # its own text names an address in memory
            raise ImageError(_what_it_is(data)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = _PILLOWS_LIMIT
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width} x {image.height} pixels are more than max_pixels (={max_pixels}) allows: it is not decoded"
        )
    return image


def _what_it_is(data: bytes) -> str:
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not an image"
    return f"no image format that Pillow knows; the file begins with {data[:12]!r}"


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a file's bytes, decoded whole, in the mode of the file.

    Raises:
        ImageError: the bytes are not an image that can be decoded to its end, or it has too many pixels.
    """
    return load(open_header(data, max_pixels))


def load(image: Image.Image) -> Image.Image:
    """The image with its pixels decoded, to the end of the file.

    Raises:
        ImageError: they cannot be.
    """
    with _reasons():
        image.load()
    return image


def orientation(image: Image.Image) -> int:
    """The camera's orientation mark, 1 (upright) to 8; 1 where there is none, or none that can be read."""
    if "exif" not in image.info:
        return UPRIGHT
    try:
        mark = image.getexif().get(_ORIENTATION, UPRIGHT)
    except DECODE_ERRORS:  # the pixels are whole: an unreadable mark does not make them useless
        return UPRIGHT
    return mark if mark in range(1, 9) else UPRIGHT


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright: a camera's orientation mark is obeyed, 16-bit grey keeps its upper 8 bits, alpha is dropped.

    Raises:
        ImageError: a mode that has no RGB, such as floating point numbers of an unknown range.
    """
    with _reasons():
        if orientation(image) != UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.mode in _DEEP_MODES:  # Pillow's convert would clip everything above 255 to white
            image = Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8))
        if image.mode == "F":
            raise ImageError("its pixels are floating point numbers, whose range no file tells")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """``to_rgb(open_image(data))``."""
    return to_rgb(open_image(data, max_pixels))


def encode_png(image: Image.Image) -> bytes:
    """Lossless bytes of an image."""
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=4)
    return out.getvalue()
