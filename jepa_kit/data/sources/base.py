"""The protocol of a source, and how its images are encoded for shards."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from jepa_kit.data.images import DECODE_ERRORS, KEPT_FORMATS, encode_png, open_image, to_rgb
from jepa_kit.data.segmentation import decode_mask, encode_mask
from jepa_kit.data.shards.writing import Sample
from jepa_kit.rng import IntArray

DEFAULT_QUALITY = 95
"""JPEG quality of images that are resized, if no quality is given."""


class Refused(Exception):
    """A sample cannot be written into a shard; the message is the reason."""


class Source(Protocol):
    """Samples by number, and the classes of their labels.

    The order of the samples does not depend on the machine, and any sample can be made at any time. So several
    processes can make samples at once, and an interrupted run can resume.
    """

    classes: dict[str, tuple[str, ...]]
    """Label name -> the names of its classes."""
    mask_classes: tuple[str, ...] = ()
    """Names of the classes of masks; empty if there are no masks or their names are unknown."""
    splits: dict[str, IntArray]
    """Subfolder of the output -> numbers of its samples; one entry, '', if the source has no splits."""
    mixed: bool = False
    """Whether the samples are in random order already."""
    notes: Sequence[str] = ()
    """Messages for the user, a line each."""

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def name(self, i: int) -> str:
        """Return the name of sample i in reports."""

    def sample(self, i: int) -> Sample:
        """Make sample i.

        Raises:
            Refused: it cannot be made.
        """

    def fingerprint(self) -> str:
        """Return a digest of the samples' names, sizes and labels."""


def single_split(n: int) -> dict[str, IntArray]:
    """Return the ``splits`` of a source of n samples without splits."""
    return {"": np.arange(n)}


def fingerprint(parts: Iterable[object]) -> str:
    """Return a short digest of values, by their `str`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Recode:
    """How images are encoded for shards; by default JPEG and PNG files keep their bytes, and others become PNG.

    Args:
        shorter_side: images with a longer shorter side are resized to it, in pixels (Pillow's bicubic filter). A JPEG
            becomes a JPEG, any other image a PNG.
        quality: every image becomes a JPEG of this quality, 1 to 100 (Pillow's scale), with 4:2:0 subsampling.

    Raises:
        ValueError: a value out of range.
    """

    shorter_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ValueError(f"shorter_side (={self.shorter_side}) must be at least 1 pixel")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality (={self.quality}) must be 1 to 100")

    def sample(self, key: str, data: bytes, labels: dict[str, int], mask: bytes | None = None) -> Sample:
        """Return the sample of an image file.

        The image is decoded as in training, so that a bad one is refused now.

        Args:
            key: of the sample.
            data: bytes of the image file.
            labels: of the sample.
            mask: bytes of its mask, or None.

        Raises:
            Refused: the image or the mask cannot be decoded, or their sizes differ.
        """
        if not data:
            raise Refused("empty file")
        try:
            image = open_image(data)
            notes: list[str] = []
            pixels = to_rgb(image, notes.append)
        except DECODE_ERRORS as error:
            raise Refused(f"not a decodable image: {error or type(error).__name__}") from error
        extension = KEPT_FORMATS.get(image.format or "")
        small = self._shrink(pixels)
        if self.quality is not None or (small is not pixels and extension == "jpg"):
            out = io.BytesIO()
            small.save(out, format="JPEG", quality=self.quality or DEFAULT_QUALITY, subsampling="4:2:0")
            extension, data = "jpg", out.getvalue()
        elif small is not pixels or extension is None:
            extension, data = "png", encode_png(small)
        small_mask = None if mask is None else self._shrink_mask(mask, pixels, small)
        return Sample(key, extension, data, labels, small_mask, "".join(notes))

    def _shrink(self, pixels: Image.Image) -> Image.Image:
        short = min(pixels.size)
        if self.shorter_side is None or short <= self.shorter_side:
            return pixels
        width, height = (max(1, round(side * self.shorter_side / short)) for side in pixels.size)
        return pixels.resize((width, height), Image.Resampling.BICUBIC)

    def _shrink_mask(self, data: bytes, pixels: Image.Image, small: Image.Image) -> bytes:
        """Return the mask of an image in the size of the shrunk image."""
        try:
            mask = Image.fromarray(decode_mask(data))
        except DECODE_ERRORS as error:
            raise Refused(f"not a decodable mask: {error or type(error).__name__}") from error
        if mask.size != pixels.size:
            raise Refused(f"mask of {mask.size} pixels for an image of {pixels.size}: width and height must agree")
        if small is pixels:
            return data
        return encode_mask(np.asarray(mask.resize(small.size, Image.Resampling.NEAREST)))
