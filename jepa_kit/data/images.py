"""Decode image files of every kind to upright RGB pixels, or raise ``ImageError`` with the reason.

Decoders, by name:

``pillow``  Pillow: the reference, which defines the result.
``fast``    simplejpeg (libjpeg-turbo without Pillow's copies) for JPEGs that need no rotation; Pillow for the rest and
            for damaged files, so that both decoders accept and reject the same files.

docs/data.md, "Speed", has the measurements.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from jepa_kit.errors import ImageError

try:
    import simplejpeg
except ImportError:  # the extra `fast`
    simplejpeg = None

DecoderName = Literal["pillow", "fast"]
Pixels = NDArray[np.uint8]
"""RGB, [H, W, 3]."""

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
"""Formats whose files go into a shard unchanged, and the extension there. (MPO is a JPEG with more images after it.)"""

DECODE_ERRORS = (
    OSError,  # base of UnidentifiedImageError
    SyntaxError,
    ValueError,  # base of ImageError
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,  # AVIF; base of NotImplementedError, which DDS and BLP raise
    TypeError,  # TIFF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's plug-ins raise for a file that is damaged or not an image."""

MAX_PIXELS = 89_478_485
"""Default limit of rows times columns; above it, Pillow warns of a decompression bomb."""

UPRIGHT = 1
"""Value of the EXIF orientation of an image that is displayed as stored."""
DEPTHS = (8, 12, 16)
"""Bits that grey pixels of 16 or 32 stored bits may use."""

_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ORIENTATION = 0x0112
_PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS
_UNUSED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""PNG chunks that change no pixel: text and a colour profile. Pillow rejects files in which they are large."""
_XMP = b"XML:com.adobe.xmp\0\0"
"""Start of an uncompressed text that may contain the orientation."""
_XMP_LIMIT = 1 << 20
"""Bytes; Pillow rejects a longer text."""
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_APP1, _SCAN = 0xE1, 0xDA
"""Markers of JPEG segments: application data, which EXIF uses, and the start of the scan."""
_COLOURS = ("YCbCr", "RGB", "Gray")
"""Colour spaces of a JPEG that simplejpeg decodes as Pillow does."""
_logged: set[str] = set()
log = logging.getLogger(__name__)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Convert whatever Pillow raises for a damaged file to ``ImageError``."""
    try:
        yield
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(str(error) or type(error).__name__) from error


def open_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the size, mode and metadata of an image file, without decoding pixels.

    Raises:
        ImageError: Pillow does not know the format, or the image has more than ``max_pixels`` rows times columns.
    """
    if not data:
        raise ImageError("the file is empty")
    with _image_errors():
        Image.MAX_IMAGE_PIXELS = None  # max_pixels, which may be higher, is checked below
        try:
            image = Image.open(io.BytesIO(_strip_png(data) if data.startswith(_PNG) else data))
        except UnidentifiedImageError as error:  # its message contains a memory address
            raise ImageError(_unknown_format(data)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = _PILLOWS_LIMIT
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width} x {image.height} pixels are more than max_pixels (={max_pixels}) allows: it is not decoded"
        )
    return image


def _strip_png(data: bytes) -> bytes:
    """Remove text and colour profile from a PNG, because Pillow rejects large ones; verify the checksums of the pixels.

    Returns:
        the data unchanged if there is nothing to remove, or if a chunk of text or profile is damaged.

    Raises:
        ImageError: the checksum of the pixels is wrong.
    """
    kept, at, copied = [], len(_PNG), 0  # pieces to keep; start of this chunk; end of the last chunk removed
    while at + 12 <= len(data):  # a chunk: length (4 bytes), kind (4), content, CRC-32 (4)
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if (kind == b"IDAT" or kind in _UNUSED_CHUNKS) and end <= len(data):
            content = memoryview(data)[at + 8 : end - 4]
            damaged = zlib.crc32(content, zlib.crc32(kind)).to_bytes(4, "big") != data[end - 4 : end]
            if kind == b"IDAT":
                if damaged:  # Pillow does not verify checksums of pixels
                    raise ImageError(f"its pixels are damaged: the checksum of the chunk at byte {at} differs")
                at = end
                continue
            if damaged:
                return data  # Pillow reports it
            if not (content[: len(_XMP)] == _XMP and length < _XMP_LIMIT):
                kept.append(data[copied:at])
                copied = end
        at = end
    return b"".join([*kept, data[copied:]]) if kept else data


def _unknown_format(data: bytes) -> str:
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not an image"
    return f"no image format that Pillow knows; the file begins with {data[:12]!r}"


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to its end, in the mode of the file.

    Raises:
        ImageError: it is not an image, is damaged or cut short, or has more than ``max_pixels`` rows times columns.
    """
    image = open_header(data, max_pixels)
    with _image_errors():
        image.load()
    return image


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if there is none, or it cannot be read."""
    if "exif" not in image.info:
        return UPRIGHT
    try:
        mark = image.getexif().get(_ORIENTATION, UPRIGHT)
    except DECODE_ERRORS:  # the pixels are intact, so damaged metadata does not make the image useless
        return UPRIGHT
    return mark if mark in range(1, 9) else UPRIGHT


def _log_once(note: str) -> None:
    if note not in _logged:
        _logged.add(note)
        log.warning("an image has %s (more such images are not reported); see docs/data.md, Kinds of images", note)


def eight_bits(image: Image.Image, note: Callable[[str], None]) -> Image.Image:
    """Scale a grey image of integers with more than 8 bits to 8 bits.

    No file format stores the number of bits in use. It is derived from the largest value: 8, 12 or 16.

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
    """Convert a decoded image to RGB: rotated upright, deep grey scaled to 8 bits, alpha dropped.

    Args:
        image: decoded.
        note: called with a message on how pixels were interpreted; by default, each message is logged once.

    Raises:
        ImageError: a mode without RGB, such as floating point numbers of an unknown range.
    """
    with _image_errors():
        if orientation(image) != UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.mode in _DEEP_MODES:  # Pillow's convert would clip everything above 255 to white
            image = eight_bits(image, note)
        if image.mode == "F":
            raise ImageError("its pixels are floating point numbers of unknown range")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return ``to_rgb(open_image(data, max_pixels))``."""
    return to_rgb(open_image(data, max_pixels))


def decode_fast(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image | Pixels:
    """Return ``decode(data, max_pixels)``, or the pixels [H, W, 3] of a JPEG that simplejpeg decoded.

    Raises:
        ImageError: as ``decode``.
    """
    if data.startswith(_JPEG) and _has_no_exif(data):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in _COLOURS and height * width <= max_pixels:
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:  # damaged: Pillow decides whether it is usable
            pass
    return decode(data, max_pixels)


def _has_no_exif(data: bytes) -> bool:
    """Return whether the segments of a JPEG lead to its scan and none of them is EXIF, which may have an orientation.

    Reading the header with Pillow, or searching the whole file, would take a tenth of a millisecond per image.
    """
    at = 2  # after the marker of the start; then segments: 0xFF, marker, length (2 bytes, which it includes), content
    while at + 10 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == _SCAN:
            return True
        if data[at + 1] == _APP1 and data[at + 4 : at + 10] == _EXIF:
            return False
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False


DECODERS: dict[DecoderName, Callable[[bytes, int], Image.Image | Pixels]] = {"pillow": decode, "fast": decode_fast}


def check_decoder(name: str) -> None:
    """Raise ValueError if a decoder is unknown or not installed."""
    if name not in DECODERS:
        raise ValueError(f"decoder (={name!r}) must be one of {', '.join(map(repr, DECODERS))}")
    if name == "fast" and simplejpeg is None:
        raise ValueError("decoder (='fast') needs simplejpeg: pip install 'jepa_kit[fast]'")


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=4)
    return out.getvalue()
