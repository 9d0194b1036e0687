"""The views of a batch: each image file is read and decoded once, and every view transforms what was decoded.

Shapes: B samples, of which K can be used; h, w rows and columns of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from jepa_kit.data.images import DECODERS
from jepa_kit.data.transforms import Pipeline
from jepa_kit.errors import ImageError, SampleError
from jepa_kit.interfaces import Masker
from jepa_kit.rng import FloatArray, IntArray, view_seed
from jepa_kit.structures import View


@dataclass(frozen=True, kw_only=True)
class ViewMaker:
    """How a view of each sample is made.

    Args:
        pipeline: the transforms.
        masker: draws the masks, on the grid of this view; None for none.
        same_draws: names of transforms that get the random numbers of the first view.
        action: whether the view has an action, which says how it was made; then each transform must be ``Described``.
    """

    pipeline: Pipeline
    masker: Masker | None = None
    same_draws: tuple[str, ...] = ()
    action: bool = False


class Loaded(NamedTuple):
    """Result of ``load_images``.

    Attributes:
        images: [K, 3, h, w] uint8 of each view, channels last in memory; none if K is 0.
        actions: [K, A] float32 of each view that has one, else None; A is the sum of its transforms' ``action_size``.
        kept: [K] positions of the images among the files, ascending.
        errors: position -> why a file cannot be used, for all others.
    """

    images: list[Tensor]
    actions: list[Tensor | None]
    kept: list[int]
    errors: dict[int, SampleError | ImageError]


def draws_of(makers: Sequence[ViewMaker], samples: IntArray, *, seed: int, epoch: int) -> list[FloatArray]:
    """Return the random numbers [B, n] of each view: those of view k are a function of (seed, k, epoch, sample)."""
    return [
        maker.pipeline.draws(samples, seed=view_seed(seed, k), epoch=epoch, seeds=dict.fromkeys(maker.same_draws, seed))
        for k, maker in enumerate(makers)
    ]


def check_views(makers: Sequence[ViewMaker]) -> None:
    """Raise ValueError if there is no view, views would decode an image in different ways, or one has no action."""
    if not makers:
        raise ValueError("views (=[]) must be at least one")
    decoders = sorted({(maker.pipeline.decoder, maker.pipeline.max_pixels) for maker in makers})
    if len(decoders) > 1:
        raise ValueError(f"views must have one decoder and max_pixels, as an image is decoded once, not {decoders}")
    for maker in makers:
        if maker.action:
            maker.pipeline.check_described()


def load_images(
    makers: Sequence[ViewMaker], files: Sequence[Callable[[], bytes]], draws: Sequence[FloatArray]
) -> Loaded:
    """Read, decode and transform the image files of a batch, one after another.

    Args:
        makers: of the views, see ``check_views``.
        files: each returns the bytes of an image file, or raises SampleError; each is called once.
        draws: [B, n] of each view, as from ``Pipeline.draws``.

    Raises:
        ValueError: a transform violates its contract.
    """
    first = makers[0].pipeline
    decode = DECODERS[first.decoder if any(maker.pipeline.takes_arrays for maker in makers) else "pillow"]
    images: list[Tensor] = []
    kept: list[int] = []
    errors: dict[int, SampleError | ImageError] = {}
    numbers = [array.tolist() for array in draws]
    actions: list[list[list[float]]] = []  # [K, views, A]
    for b, read in enumerate(files):
        try:
            decoded = decode(read(), first.max_pixels)
            made: list[list[float]] = [[] for _ in makers]
            pixels = [
                maker.pipeline.apply(decoded, rows[b], action if maker.action else None)
                for maker, rows, action in zip(makers, numbers, made, strict=True)
            ]
        except (SampleError, ImageError) as error:
            errors[b] = error
            continue
        if not images:
            images = [_empty((len(files), *view.shape)) for view in pixels]
            arrays = [view.numpy() for view in images]
        for array, view in zip(arrays, pixels, strict=True):
            array[len(kept)] = view
        actions.append(made)
        kept.append(b)
    return Loaded(
        [view[: len(kept)].permute(0, 3, 1, 2) for view in images],
        [torch.tensor([made[k] for made in actions]) if maker.action else None for k, maker in enumerate(makers)],
        kept,
        errors,
    )


def make_views(
    makers: Sequence[ViewMaker], loaded: Loaded, samples: IntArray, *, seed: int, epoch: int, step: int
) -> tuple[View, ...]:
    """Return the views of images that were loaded, with their masks and actions.

    Args:
        makers: of the views.
        loaded: their images; at least one.
        samples: [K] the numbers of the images in their data set.
        seed, epoch, step: of the masks.
    """
    views = []
    for k, (maker, x, action) in enumerate(zip(makers, loaded.images, loaded.actions, strict=True)):
        draw = maker.masker
        masks = None if draw is None else draw(samples, seed=view_seed(seed, k), epoch=epoch, step=step)
        views.append(View(x, masks, action))
    return tuple(views)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Allocate uint8; in a loader worker, in shared memory, so that sending the batch does not copy it."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
