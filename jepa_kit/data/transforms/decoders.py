"""The pixels of a window of an image file: exactly, or faster and a level of 255 away (two where bicubic).

``pillow``  Pillow decodes and resizes: the definition.
``fast``    JPEGs are decoded by simplejpeg (libjpeg-turbo without Pillow's copies) and resized by torch's own kernel
            for bytes, which computes what Pillow's does. Whatever else comes, or is damaged, goes Pillow's way: the
            two decoders accept and refuse the same files.

What was measured, and what was not taken, is in docs/data.md, "Speed".

Legend of shapes: h, w rows and columns of the result, H, W those of an image as decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import decode
from jepa_kit.data.transforms.crop_geometry import Window, resample

try:
    import simplejpeg
except ImportError:  # the extra `fast`
    simplejpeg = None

DecoderName = Literal["pillow", "fast"]
WindowOf = Callable[[tuple[int, int]], Window]
"""The size (H, W) of an upright image -> the window that is wanted of it."""
Pixels = NDArray[np.uint8]

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_APP1, _SCAN = 0xE1, 0xDA
_COLOURS = ("YCbCr", "RGB", "Gray")


def pillow(data: bytes, window_of: WindowOf, max_pixels: int) -> Image.Image:
    """The RGB pixels of a window of an image file.

    Raises:
        ImageError: the bytes are no usable image.
    """
    image = decode(data, max_pixels)
    return resample(image, window_of((image.height, image.width)))


def fast(data: bytes, window_of: WindowOf, max_pixels: int) -> Image.Image | Pixels:
    """As ``pillow``, at most a level away, or two where bicubic; an array [h, w, 3] where the faster way was taken."""
    if data.startswith(_JPEG) and is_unmarked(data):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in _COLOURS and height * width <= max_pixels:
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")  # [H, W, 3]
                return torch_resample(pixels, window_of((height, width)))
        except ValueError:  # damaged somewhere: Pillow says whether it can be used
            pass
    return pillow(data, window_of, max_pixels)


def is_unmarked(data: bytes) -> bool:
    """Whether the segments of a JPEG lead to its scan, one after another, and none holds a camera's marks.

    Pillow's look at a header costs a tenth of a millisecond, and so does a search through a whole file; this does not.
    """
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == _SCAN:
            return True
        if data[at + 1] == _APP1 and data[at + 4 : at + 10] == _EXIF:
            return False
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def torch_resample(pixels: Pixels, window: Window) -> Pixels:
    """``resample`` for an array [H, W, 3]; at most 1 level away from Pillow's, or 2 where bicubic."""
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


DECODERS: dict[DecoderName, Callable[[bytes, WindowOf, int], Image.Image | Pixels]] = {"pillow": pillow, "fast": fast}


def check_decoder(name: str) -> None:
    """Raises ValueError for a decoder that there is not, or that is not installed."""
    if name not in DECODERS:
        raise ValueError(f"decoder (={name!r}) must be one of {', '.join(map(repr, DECODERS))}")
    if name == "fast" and simplejpeg is None:
        raise ValueError("decoder (='fast') needs simplejpeg: pip install 'jepa_kit[fast]'")
