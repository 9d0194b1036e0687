"""From the bytes of an image file to RGB pixels, in one place: whatever kind of file it is, or why it is none."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jepa_kit.errors import ImageError

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


DEPTHS = (8, 12, 16)
"""Bits that grey pixels of 16 or 32 stored bits may use."""
_UNUSED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that move no pixel: texts and a colour profile. Pillow refuses files in which they are large."""
_XMP = b"XML:com.adobe.xmp\0\0"
"""Begins an uncompressed text that may hold the orientation."""
_XMP_LIMIT = 1 << 20
"""Bytes; above it, Pillow refuses a text."""
_PNG = b"\x89PNG\r\n\x1a\n"
_logged: set[str] = set()
log = logging.getLogger(__name__)


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
            image = Image.open(io.BytesIO(_pixels_of_png(data) if data.startswith(_PNG) else data))
        except UnidentifiedImageError as error:  # its own text names an address in memory
            raise ImageError(_what_it_is(data)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = _PILLOWS_LIMIT
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width} x {image.height} pixels are more than max_pixels (={max_pixels}) allows: it is not decoded"
        )
    return image


def _pixels_of_png(data: bytes) -> bytes:
    """A PNG without texts and colour profile; the same bytes if it has none, or if one of them is damaged.

    Raises:
        ImageError: pixels whose checksum is another.
    """
    kept, at, copied = [], len(_PNG), 0
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if (kind == b"IDAT" or kind in _UNUSED_CHUNKS) and end <= len(data):
            content = memoryview(data)[at + 8 : end - 4]
            damaged = zlib.crc32(content, zlib.crc32(kind)).to_bytes(4, "big") != data[end - 4 : end]
            if kind == b"IDAT":
                if damaged:  # Pillow looks at no checksum of pixels
                    raise ImageError(f"its pixels are damaged: the checksum of the chunk at byte {at} is another")
                at = end
                continue
            if damaged:
                return data  # Pillow has the message
            if not (content[: len(_XMP)] == _XMP and length < _XMP_LIMIT):
                kept.append(data[copied:at])
                copied = end
        at = end
    return b"".join([*kept, data[copied:]]) if kept else data


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


def _log_once(note: str) -> None:
    if note not in _logged:
        _logged.add(note)
        log.warning("an image has %s (more such images are not reported); see docs/data.md, Kinds of images", note)


def eight_bits(image: Image.Image, note: Callable[[str], None]) -> Image.Image:
    """Return whole numbers of more than 8 bits, one channel, as 8 bits.

    No file format has a place for the number of bits that are used, so it is that of the largest value: 8, 12 or 16.

    Args:
        image: of a mode in ``_DEEP_MODES``.
        note: called with a message if fewer bits are used than are stored.

    Raises:
        ImageError: a value below 0 or above 65,535.
    """
    values = np.asarray(image, dtype=np.int64)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65535:
        raise ImageError(f"its pixels are whole numbers from {least} to {most}: they must be within 0 to 65535")
    bits = next(bits for bits in DEPTHS if most < 1 << bits)
    if most and bits < DEPTHS[-1]:
        note(f"more than 8 bits stored for a pixel, but no value above {(1 << bits) - 1}: taken for {bits}-bit numbers")
    return Image.fromarray((values >> bits - 8).astype(np.uint8))


def to_rgb(image: Image.Image, note: Callable[[str], None] = _log_once) -> Image.Image:
    """Return an image as RGB, upright: its orientation mark is obeyed, deep grey becomes 8 bits, alpha is dropped.

    Args:
        image: decoded.
        note: called with what a user should know of how its pixels were understood; logs it once by default.

    Raises:
        ImageError: a mode that has no RGB, such as floating point numbers of an unknown range.
    """
    with _reasons():
        if orientation(image) != UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.mode in _DEEP_MODES:  # Pillow's convert would clip everything above 255 to white
            image = eight_bits(image, note)
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
