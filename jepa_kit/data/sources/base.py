"""What a source is, and what happens to each image on its way into a shard."""

from __future__ import annotations

import hashlib
import io
import os
import re
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
"""Of JPEG files that must be made anew because they are made smaller, where no quality is asked for."""


class Refused(Exception):
    """A sample that cannot go into a shard; the text is the reason."""


class Source(Protocol):
    """Samples by number, and the classes of their labels.

    A source lists its samples in an order that does not depend on the machine, and makes any of them at any time, so
    that several processes can make different samples at once, and a run that was interrupted can go on.
    """

    classes: dict[str, tuple[str, ...]]
    """Label name -> the names of its classes."""
    mask_classes: tuple[str, ...]
    """Names of the classes of masks; empty where there are none, or nobody named them."""
    splits: dict[str, IntArray]
    """Folder under the output -> numbers of its samples. One entry, '', where the source has no splits of its own."""
    mixed: bool
    """Whether the samples are in random order already."""
    notes: list[str]
    """What the user should know about what was found, a line each."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a report calls sample i."""

    def sample(self, i: int) -> Sample:
        """Makes sample i.

        Raises:
            Refused: it cannot be made.
        """

    def fingerprint(self) -> str:
        """Another text for other samples, as far as their names, sizes and labels tell."""


def whole(n: int) -> dict[str, IntArray]:
    """The ``splits`` of a source of n samples that has none of its own."""
    return {"": np.arange(n)}


def fingerprint(parts: Iterable[object]) -> str:
    """A short digest of the texts of some values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Recode:
    """Whether images are made anew on their way into a shard, and how; by default JPEG and PNG files keep their bytes.

    Args:
        shorter_side: images whose shorter side is longer than this are made smaller, so that it is this many pixels
            (Pillow's bicubic filter). A JPEG becomes a JPEG, anything else a PNG.
        quality: every image becomes a JPEG of this quality, 1 to 100 (Pillow's scale), colour at half resolution.
    """

    shorter_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ValueError(f"shorter_side (={self.shorter_side}) must be at least 1 pixel")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality (={self.quality}) must be 1 to 100")

    def sample(self, key: str, data: bytes, labels: dict[str, int], mask: bytes | None = None) -> Sample:
        """The sample of an image file; the image is decoded, so that a bad one is refused now and not in training.

        Args:
            key: of the sample.
            data: bytes of a file that Pillow reads; what is neither JPEG nor PNG becomes a PNG.
            labels: of the sample.
            mask: bytes of its mask, or none.

        Raises:
            Refused: the image or the mask cannot be decoded, or their sizes differ.
        """
        if not data:
            raise Refused("empty file")
        try:
            image = open_image(data)
            notes: list[str] = []
            pixels = to_rgb(
                image, notes.append
            )  # what reading the shard will do, so that nothing fails then that did not fail now
        except DECODE_ERRORS as error:
            raise Refused(f"not a decodable image: {error or type(error).__name__}") from error
        extension = KEPT_FORMATS.get(image.format or "")
        small = self._shrunk(pixels)
        if self.quality is not None or (small is not pixels and extension == "jpg"):
            extension, data = "jpg", _encode_jpeg(small, self.quality or DEFAULT_QUALITY)
        elif small is not pixels or extension is None:
            extension, data = "png", encode_png(small)
        small_mask = None if mask is None else self._mask(mask, pixels, small)
        return Sample(key, extension, data, labels, small_mask, "".join(notes))

    def _shrunk(self, pixels: Image.Image) -> Image.Image:
        short = min(pixels.size)
        if self.shorter_side is None or short <= self.shorter_side:
            return pixels
        width, height = (max(1, round(side * self.shorter_side / short)) for side in pixels.size)
        return pixels.resize((width, height), Image.Resampling.BICUBIC)

    def _mask(self, data: bytes, pixels: Image.Image, small: Image.Image) -> bytes:
        try:
            mask = Image.fromarray(decode_mask(data))
        except DECODE_ERRORS as error:
            raise Refused(f"not a decodable mask: {error or type(error).__name__}") from error
        if mask.size != pixels.size:
            raise Refused(f"mask of {mask.size} pixels for an image of {pixels.size}: width and height must agree")
        if small is pixels:
            return data
        return encode_mask(np.asarray(mask.resize(small.size, Image.Resampling.NEAREST)))


def _encode_jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def unique_keys(names: Sequence[str]) -> list[str]:
    """WebDataset keys: paths without extension, with no dot in the last part, each once."""
    stems = []
    for name in names:
        folder, slash, base = name.encode("utf-8", "replace").decode().rpartition("/")
        stems.append(f"{folder}{slash}{os.path.splitext(base)[0].replace('.', '_')}")
    return each_once(stems)


def each_once(keys: Iterable[str]) -> list[str]:
    """The keys, with a number behind those that were there before; none absolute, or taken for metadata."""
    unique: list[str] = []
    taken: set[str] = set()
    following: dict[str, int] = {}  # the smaller numbers are taken
    for text in keys:
        # a path from the root or upwards is not safe to unpack; WebDataset takes __x__ for metadata
        key = re.sub(r"^(?:\.{0,2}/+)+", "", text)
        key = re.sub(r"^__", "_", key)
        candidate, k = key, following.get(key, 1)
        while candidate in taken:
            candidate, k = f"{key}_{k}", k + 1
        following[key] = k
        taken.add(candidate)
        unique.append(candidate)
    return unique
