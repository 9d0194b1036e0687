"""Pipelines: from image files to batches of pixels, and the normalisation of batches.

A pipeline is a list of transforms, of which at least one is a crop that sets the size of the result.

Shapes: B images, n random numbers for each, h, w rows and columns of the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jepa_kit.data.images import DECODERS, MAX_PIXELS, DecoderName, Pixels, check_decoder
from jepa_kit.data.transforms.crops import (
    CenterCrop,
    Crop,
    Described,
    HorizontalFlip,
    RandomResizedCrop,
    Transform,
    apply_crop,
)
from jepa_kit.registry import TRANSFORMS, build_part
from jepa_kit.rng import FloatArray, IntArray, Stream, uniforms


class Lane(NamedTuple):
    """Source of a transform's random numbers: the arguments of ``jepa_kit.rng.uniforms``."""

    stream: Stream
    attempt: int


class Pipeline:
    """Decode, crop, resize and augment images: a pure function of their bytes and draws.

    Args:
        transforms: (name, transform) in the order in which they are applied; at least one is a ``Crop``.
        decoder: ``pillow`` or ``fast``, see ``jepa_kit.data.images``.
        max_pixels: an image of more rows times columns is rejected.

    Raises:
        ValueError: no crop, a decoder that is not installed, or two transforms with the same random numbers.
    """

    def __init__(
        self,
        transforms: Sequence[tuple[str, Transform]],
        *,
        decoder: DecoderName = "pillow",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_decoder(decoder)
        crops = [k for k, (_, transform) in enumerate(transforms) if isinstance(transform, Crop)]
        if not crops:
            known = [name for name in TRANSFORMS.names() if hasattr(TRANSFORMS.get(name), "window")]
            raise ValueError(
                f"transforms (={[name for name, _ in transforms]}) must have one that sets the size: {', '.join(known)}"
            )
        self.names = [name for name, _ in transforms]
        self.transforms = [transform for _, transform in transforms]
        self.decoder, self.max_pixels = decoder, max_pixels
        self.lanes = _lanes(transforms)
        ends = [0, *accumulate(transform.num_draws for transform in self.transforms)]
        self.num_draws = ends[-1]
        self._steps: list[tuple[slice, Callable[[Any, Sequence[float]], Any]]] = []
        """Columns of ``draws`` for each transform, and the transform with its checks."""
        for k, (name, transform) in enumerate(transforms):
            if isinstance(transform, Crop):
                step: Callable[[Any, Sequence[float]], Any] = partial(apply_crop, transform, name, max_pixels)
            else:
                step = partial(_apply, transform, name, k > crops[-1])
            self._steps.append((slice(ends[k], ends[k + 1]), step))
        self.takes_arrays = crops[0] == 0
        """Whether the first transform is a crop, which takes the arrays of the fast decoder."""

    def draws(self, samples: IntArray, *, seed: int, epoch: int, seeds: Mapping[str, int] | None = None) -> FloatArray:
        """Return [B, n] uniform numbers in [0, 1), a pure function of (seed, epoch, sample); n is ``num_draws``.

        Each transform has its own lane, so adding one to the list does not change the numbers of the others.

        Args:
            samples: [B] number of each image in its data set.
            seed, epoch: see ``jepa_kit.rng.uniforms``.
            seeds: name of a transform -> its own seed.
        """
        columns = [np.empty((len(samples), 0))]
        for name, lane, transform in zip(self.names, self.lanes, self.transforms, strict=True):
            if transform.num_draws:
                own = (seeds or {}).get(name, seed)
                numbers = uniforms(
                    lane.stream, samples, transform.num_draws, seed=own, epoch=epoch, attempt=lane.attempt
                )
                columns.append(numbers)
        return np.concatenate(columns, axis=1)

    def check_described(self) -> None:
        """Raise ValueError if a transform does not describe what its draws do."""
        without = [
            name
            for name, transform in zip(self.names, self.transforms, strict=True)
            if not isinstance(transform, Described)
        ]
        if without:
            raise ValueError(f"action (=True) needs transforms with action and action_size, which {without[0]} lacks")

    def apply(self, image: Image.Image | Pixels, draws: Sequence[float], action: list[float] | None = None) -> Pixels:
        """Return the pixels [h, w, 3] uint8 of a decoded image, which does not change.

        Args:
            image: RGB, from the decoder.
            draws: n numbers, the image's row of ``draws``.
            action: is extended by what each transform says that its draws do.

        Raises:
            ImageError: see ``apply_crop``.
            ValueError: a transform violates its contract.
        """
        for (columns, step), transform in zip(self._steps, self.transforms, strict=True):
            if action is not None:
                action += cast(Described, transform).action(draws[columns], _size(image))
            image = step(image, draws[columns])
        return np.asarray(image)

    def __call__(self, data: bytes, draws: FloatArray) -> Pixels:
        """Return the pixels [h, w, 3] uint8 of one image.

        Args:
            data: bytes of an image file.
            draws: [n], the image's row of ``draws``.

        Raises:
            ImageError: the file is not a usable image.
            ValueError: a transform violates its contract.
        """
        decode = DECODERS[self.decoder if self.takes_arrays else "pillow"]
        return self.apply(decode(data, self.max_pixels), draws.tolist())


def _size(image: Image.Image | Pixels) -> tuple[int, int]:
    """Return (H, W)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])


def _apply(
    transform: Transform, name: str, keep_size: bool, image: Image.Image | Pixels, draws: Sequence[float]
) -> Image.Image:
    """Return the image after a transform that is not a crop.

    Raises:
        ValueError: the result is not an RGB image, or has another size although no crop follows.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    found = transform(image, draws)
    if not isinstance(found, Image.Image):
        raise ValueError(f"transform {name!r} gave a {type(found).__name__}, but must give a Pillow image")
    if found.mode != "RGB" or (keep_size and found.size != image.size):
        raise ValueError(
            f"transform {name!r} gave an image in mode {found.mode!r} of size {found.size}, but must give one "
            f"in mode 'RGB'{f' of size {image.size}, as no crop comes after it' if keep_size else ''}"
        )
    return found


def _lanes(transforms: Sequence[tuple[str, Transform]]) -> list[Lane]:
    """Return the lane of each transform, from its ``stream`` or its name; the second one of either gets the next lane.

    The attribute ``stream_name`` keeps the random numbers of a transform that was renamed.
    """
    lanes: list[Lane] = []
    streams = [getattr(transform, "stream", None) for _, transform in transforms]
    names = [name for name, _ in transforms]
    for k, ((name, transform), stream) in enumerate(zip(transforms, streams, strict=True)):
        if stream is None:
            lane = Lane(Stream.TRANSFORM, _hash16(getattr(transform, "stream_name", name), names[:k].count(name)))
        else:
            lane = Lane(stream, streams[:k].count(stream))
        if transform.num_draws and any(
            lane == other and rival.num_draws for other, (_, rival) in zip(lanes, transforms, strict=False)
        ):
            raise ValueError(f"transforms: {name!r} has the random numbers of another one; give it another name")
        lanes.append(lane)
    return lanes


def _hash16(name: str, count: int) -> int:
    """Return 16 bits that do not depend on the machine or on other registered transforms."""
    return int.from_bytes(hashlib.sha256(f"{name}.{count}".encode()).digest()[:2], "big")


def build_pipeline(
    transforms: Sequence[Mapping[str, Any]],
    *,
    image_size: tuple[int, int],
    decoder: DecoderName = "pillow",
    max_pixels: int = MAX_PIXELS,
) -> Pipeline:
    """Return the pipeline of a config's ``data.transforms``.

    Args:
        transforms: ``name`` and options of each.
        image_size: (h, w) of the result.
        decoder, max_pixels: see ``Pipeline``.

    Raises:
        ValueError: an unregistered name, an unknown option, a value outside its range, or a transform without
            ``num_draws``.
    """
    built = [
        (part.get("name", ""), build_part(f"transforms[{i}]", part, TRANSFORMS, image_size=image_size))
        for i, part in enumerate(transforms)
    ]
    for i, (name, transform) in enumerate(built):
        if not hasattr(transform, "num_draws"):
            raise ValueError(
                f"transforms[{i}]: {name!r} must have the attribute num_draws, how many random numbers it needs for an "
                "image"
            )
    return Pipeline(built, decoder=decoder, max_pixels=max_pixels)


def train_pipeline(
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    decoder: DecoderName = "pillow",
    max_pixels: int = MAX_PIXELS,
) -> Pipeline:
    """Return the released augmentation: a random resized crop, then a horizontal flip with probability ``flip``."""
    parts: list[tuple[str, Transform]] = [
        ("random_resized_crop", RandomResizedCrop(image_size=image_size, scale=scale, ratio=ratio))
    ]
    if flip:
        parts.append(("horizontal_flip", HorizontalFlip(p=flip)))
    return Pipeline(parts, decoder=decoder, max_pixels=max_pixels)


def eval_pipeline(
    *, image_size: tuple[int, int], share: float = 1.0, decoder: DecoderName = "pillow", max_pixels: int = MAX_PIXELS
) -> Pipeline:
    """Return the pipeline of an evaluation: a centre crop, without random numbers; see ``CenterCrop``."""
    return Pipeline(
        [("center_crop", CenterCrop(image_size=image_size, share=share))], decoder=decoder, max_pixels=max_pixels
    )


def stack(images: Sequence[NDArray[np.uint8] | Image.Image]) -> Tensor:
    """Return [B, 3, h, w] uint8, channels last in memory, of RGB images [h, w, 3] of one size."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images / 255 - mean) / std, [B, 3, h, w] float32, contiguous, on the device of the images.

    Args:
        images: [B, 3, h, w] uint8, in any memory format.
        mean, std: of each channel, for values in [0, 1].
    """
    centre, scale = _statistics(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0).sub_(centre).div_(scale)


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # cached, because creating them synchronises with the device
    return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))  # type: ignore[return-value]
