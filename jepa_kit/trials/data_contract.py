"""Check the contract of user-defined transforms and maskers, which the loader calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from jepa_kit.config import Config
from jepa_kit.data.transforms import Described, Window
from jepa_kit.structures import MaskBatch
from jepa_kit.trials.part_trial import IMAGES, Trial


def check_transform(trial: Trial, transform: Any) -> None:
    """Check ``num_draws``, the type of the result, and purity, on an image of noise."""
    count = getattr(transform, "num_draws", None)
    trial.need(type(count) is int and count >= 0, f"has num_draws (={count!r}), not a number of at least 0")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    draws = np.random.default_rng(1).random(count or 0).tolist()
    if isinstance(transform, Described):
        size = transform.action_size
        first, second = trial.twice(lambda: list(transform.action(draws, (48, 64))), pure=True)
        trial.need(
            len(first) == size and all(isinstance(x, float) and math.isfinite(x) for x in first),
            f"gave the action {first}, not as many finite floats as its action_size (={size})",
        )
        trial.same(first, second)
    if hasattr(transform, "window"):
        first, second = trial.twice(lambda: transform.window((48, 64), draws), pure=True)
        trial.need(isinstance(first, Window), f"gave a {type(first).__name__} as its window")
        trial.same(first, second)
        return
    image = Image.fromarray(pixels)
    before = image.tobytes()
    first, second = trial.twice(lambda: transform(image, draws), pure=True)
    trial.need(image.tobytes() == before, "changed the image that it was given, which other views use too")
    trial.need(isinstance(first, Image.Image), f"gave a {type(first).__name__}, not a Pillow image")
    trial.need(first.mode == "RGB", f"gave an image in mode {first.mode!r}, not 'RGB'")
    trial.same((first.size, first.tobytes()), (second.size, second.tobytes()))


def check_masker(trial: Trial, masker: Any, config: Config) -> None:
    """Check the signature, type, grid, sets of every image, and purity."""
    samples, seed = np.arange(IMAGES), config.train.seed
    try:
        inspect.signature(masker).bind(samples, seed=seed, epoch=0, step=0)
    except TypeError as error:
        trial.fail(f"cannot be called with (samples, seed=..., epoch=..., step=...): {error}", error)
    first, second = trial.twice(lambda: masker(samples, seed=seed, epoch=0, step=0), pure=True)
    trial.need(isinstance(first, MaskBatch), f"gave a {type(first).__name__}, not a jepa_kit.structures.MaskBatch")
    p = config.slots["encoder"].options.get("patch_size")
    if isinstance(p, int):
        grid = (config.data.image_size[0] // p, config.data.image_size[1] // p)
        trial.need(first.grid == grid, f"gave masks of the grid {first.grid}, but images have {grid}")
        trial.need_grid(masker, grid)
    for name, sets in (("context", first.context), ("target", first.targets)):
        images = set(sets.image.tolist())
        missing = sorted(set(range(IMAGES)) - images)
        trial.need(not missing, f"gave no {name} set for image {missing[:1]} of {IMAGES}")
        trial.need(images <= set(range(IMAGES)), f"gave a {name} set for image {max(images)}, but there are {IMAGES}")
    trial.same(first, second)
    if not any(getattr(part, "allow_overlap", False) for part in with_members(masker)):
        _check_apart(trial, first)


def with_members(masker: Any) -> Iterator[Any]:
    """Yield a masker and those that it is made of."""
    yield masker
    for member in getattr(masker, "members", ()):
        yield from with_members(member)


def _check_apart(trial: Trial, masks: MaskBatch) -> None:
    """Check that no target patch is in the context that it is predicted from, unless contexts say what is hidden."""
    if masks.context.hidden is not None:
        return
    contexts = masks.context.split()
    for target, of, image in zip(masks.targets.split(), masks.context_of, masks.targets.image, strict=True):
        both = np.intersect1d(target, contexts[of])
        trial.need(
            not len(both),
            f"gave {len(both)} of the {len(target)} patches of a target (first patch {both[:1]} of image {int(image)}) "
            "to the context that it is predicted from, so nothing needs to be predicted there: a masker that means "
            "this declares allow_overlap = True",
        )
