"""Views: from the bytes of an image file to the pixels that an encoder is given, in one call.

A view is a list of transforms. The first one that sets the size says which window of the image it needs before any
pixel is decoded, so that a decoder may leave out what is not needed.

Legend of shapes: B images, n numbers drawn for each, h, w rows and columns of the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.images import MAX_PIXELS, decode
from jepa_kit.data.transforms.crop_geometry import Window, resample
from jepa_kit.data.transforms.crops import CenterCrop, RandomResizedCrop
from jepa_kit.data.transforms.decoders import DECODERS, DecoderName, check_decoder
from jepa_kit.data.transforms.flips import Flip
from jepa_kit.errors import ImageError
from jepa_kit.registry import TRANSFORMS, build_part
from jepa_kit.rng import FloatArray, IntArray, Stream, uniforms


@runtime_checkable
class Transform(Protocol):
    """A step of a view: an RGB image and its own numbers in, an RGB image out.

    Attributes:
        num_draws: how many uniform numbers in [0, 1) it is given for each image.
    """

    num_draws: int

    def __call__(self, image: Image.Image, draws: Sequence[float]) -> Image.Image: ...


@runtime_checkable
class Crop(Transform, Protocol):
    """A transform that sets the size, to (h, w) of the result."""

    def window(self, size: tuple[int, int], draws: Sequence[float]) -> Window:
        """What becomes of an image of size (H, W)."""


@dataclass(frozen=True)
class _Lane:
    """Where a transform's numbers come from: see ``jepa_kit.rng.uniforms``."""

    stream: Stream
    attempt: int


@dataclass(frozen=True)
class _Step:
    """A transform in its place.

    Args:
        name: of the transform.
        transform: what is called.
        part: its numbers among those of an image.
        crop: the transform again, where it sets the size.
        late: whether the size is set, so that it must stay.
    """

    name: str
    transform: Transform
    part: slice
    crop: Crop | None
    late: bool

    def window(self, size: tuple[int, int], draws: Sequence[float], max_pixels: int) -> Window:
        """The crop's, of an image of size (H, W).

        Raises:
            ImageError: a thin image, of which nearly all would be made larger only to be cut away.
        """
        assert self.crop is not None
        window = self.crop.window(size, draws[self.part])
        if window.part is not None and window.size[0] * window.size[1] > max_pixels:
            raise ImageError(
                f"{size[1]} x {size[0]} pixels would become {window.size[0]} x {window.size[1]} before {self.name} "
                f"cuts them, more than max_pixels (={max_pixels}) allows"
            )
        return window

    def __call__(self, image: Image.Image, draws: Sequence[float], max_pixels: int) -> Image.Image:
        """The next image.

        Raises:
            ValueError: what comes out is no RGB image, or of another size though no crop follows.
        """
        if self.crop is not None:
            return resample(image, self.window((image.height, image.width), draws, max_pixels))
        found = self.transform(image, draws[self.part])
        if not isinstance(found, Image.Image):
            raise ValueError(f"transform {self.name!r} gave a {type(found).__name__}, but must give a Pillow image")
        if found.mode != "RGB" or (self.late and found.size != image.size):
            raise ValueError(
                f"transform {self.name!r} gave an image in mode {found.mode!r} of size {found.size}, but must give one "
                f"in mode 'RGB'{f' of size {image.size}, as no crop comes after it' if self.late else ''}"
            )
        return found


class View:
    """Decodes, crops, resizes and augments an image: a pure function of its bytes and its draws.

    Args:
        transforms: (name, transform) in the order in which they are applied; at least one sets the size.
        decoder: ``pillow``, or ``fast``; see decoders.py.
        max_pixels: an image of more rows times columns is refused.

    Raises:
        ValueError: no transform that sets the size, or a decoder that is not installed.
    """

    def __init__(
        self,
        transforms: Sequence[tuple[str, Transform]],
        *,
        decoder: DecoderName = "pillow",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_decoder(decoder)
        if not any(isinstance(transform, Crop) for _, transform in transforms):
            known = [name for name in TRANSFORMS.names() if hasattr(TRANSFORMS.get(name), "window")]
            raise ValueError(
                f"transforms (={[name for name, _ in transforms]}) must hold one that sets the size: {', '.join(known)}"
            )
        self.transforms = [transform for _, transform in transforms]
        self.decoder, self.max_pixels = decoder, max_pixels
        self.lanes = _lanes(transforms)
        ends = [0, *accumulate(transform.num_draws for transform in self.transforms)]
        parts = [slice(*ends[k : k + 2]) for k in range(len(self.transforms))]
        self.num_draws = ends[-1]
        crops = [transform if isinstance(transform, Crop) else None for transform in self.transforms]
        last = max(k for k, crop in enumerate(crops) if crop is not None)
        steps = [_Step(name, transform, parts[k], crops[k], k > last) for k, (name, transform) in enumerate(transforms)]
        self._first = None if crops[0] is None else steps[0]
        self._rest = steps[1:] if self._first else steps
        self._decoder = DECODERS[decoder]

    def draws(self, samples: IntArray, *, seed: int, epoch: int) -> FloatArray:
        """[B, n] uniform numbers in [0, 1), a pure function of (seed, epoch, sample); n is ``num_draws``.

        Each transform has a lane of its own: one more in the list leaves the numbers of the others as they are.
        """
        columns = [np.empty((len(samples), 0))]
        for lane, transform in zip(self.lanes, self.transforms, strict=True):
            if transform.num_draws:
                numbers = uniforms(
                    lane.stream, samples, transform.num_draws, seed=seed, epoch=epoch, attempt=lane.attempt
                )
                columns.append(numbers)
        return np.concatenate(columns, axis=1)

    def __call__(self, data: bytes, draws: FloatArray) -> NDArray[np.uint8]:
        """The view of an image.

        Args:
            data: of an image file.
            draws: [n], the image's row of ``draws``.

        Returns:
            [h, w, 3] uint8.

        Raises:
            ImageError: the bytes are no usable image.
            ValueError: a transform did not keep to its contract.
        """
        numbers = draws.tolist()
        image: Image.Image | NDArray[np.uint8]
        if self._first is None:
            image = decode(data, self.max_pixels)
        else:
            window_of = partial(self._first.window, draws=numbers, max_pixels=self.max_pixels)
            image = self._decoder(data, window_of, self.max_pixels)
        for step in self._rest:
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image = step(image, numbers, self.max_pixels)
        return np.asarray(image)


def _lanes(transforms: Sequence[tuple[str, Transform]]) -> list[_Lane]:
    """Return the lane of each transform: of its ``stream``, or of its name; the second of one name gets the next.

    ``stream_name`` keeps the random numbers of a transform that was renamed.
    """
    lanes: list[_Lane] = []
    names = [name for name, _ in transforms]
    for k, (name, transform) in enumerate(transforms):
        count = names[:k].count(name)
        stream = getattr(transform, "stream", None)
        own = _lane_of(getattr(transform, "stream_name", name), count)
        lane = _Lane(Stream.TRANSFORM, own) if stream is None else _Lane(stream, count)
        if transform.num_draws and any(
            lane == other and rival.num_draws for other, (_, rival) in zip(lanes, transforms, strict=False)
        ):
            raise ValueError(f"transforms: {name!r} has the random numbers of another one; give it another name")
        lanes.append(lane)
    return lanes


def _lane_of(name: str, count: int) -> int:
    """16 bits that are the same everywhere, whatever else is registered."""
    return int.from_bytes(hashlib.sha256(f"{name}.{count}".encode()).digest()[:2], "big")


def build_view(
    transforms: Sequence[Mapping[str, Any]],
    *,
    image_size: tuple[int, int],
    decoder: DecoderName = "pillow",
    max_pixels: int = MAX_PIXELS,
) -> View:
    """A view from a list of names and options, as ``data.transforms`` has it.

    Args:
        transforms: of each its ``name`` and its options.
        image_size: (h, w) of the result.
        decoder, max_pixels: see ``View``.

    Raises:
        ValueError: a name that is not registered, an option that it does not take or a value outside its range.
    """
    built = [
        (part.get("name", ""), build_part(f"transforms[{i}]", part, TRANSFORMS, image_size=image_size))
        for i, part in enumerate(transforms)
    ]
    return View(built, decoder=decoder, max_pixels=max_pixels)


def train_view(
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    decoder: DecoderName = "pillow",
    max_pixels: int = MAX_PIXELS,
) -> View:
    """The released augmentation: a random resized crop and, where asked for, a horizontal flip."""
    parts: list[tuple[str, Transform]] = [
        ("random_resized_crop", RandomResizedCrop(image_size=image_size, scale=scale, ratio=ratio))
    ]
    if flip:
        parts.append(("flip", Flip(p=flip)))
    return View(parts, decoder=decoder, max_pixels=max_pixels)


def eval_view(
    *, image_size: tuple[int, int], share: float = 1.0, decoder: DecoderName = "pillow", max_pixels: int = MAX_PIXELS
) -> View:
    """The evaluation's view: a centre crop, without draws; see ``CenterCrop``."""
    return View(
        [("center_crop", CenterCrop(image_size=image_size, share=share))], decoder=decoder, max_pixels=max_pixels
    )
