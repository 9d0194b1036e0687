"""A separate recipe and random images on which parts are checked and FLOP are counted, without effect on the run."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from jepa_kit.config import Config
from jepa_kit.config.check import Part
from jepa_kit.data.transforms import Described, build_pipeline
from jepa_kit.from_config import build_masker, build_recipe, patch_grid_of
from jepa_kit.random_state import seeded
from jepa_kit.recipe import Recipe
from jepa_kit.registry import Backend
from jepa_kit.rng import view_seed
from jepa_kit.structures import View
from jepa_kit.trials.part_trial import IMAGES


def trial_recipe(
    config: Config,
    device: torch.device,
    *,
    seed: int | None = None,
    other_seed: int = 1,
    attention: Backend = "reference",
) -> Recipe:
    """Build the recipe of a config as a run does, with its first weights, in training mode, uncompiled.

    Args:
        config: a checked config.
        device: of the parameters.
        seed: of torch's random state; None for that of the run, which gives its first weights.
        other_seed: of numpy's and Python's random states, on which first weights must not depend.
        attention: backend of ``attend``; torch's counter knows the operations of the plain one.
    """
    slots = {
        slot: Part(part.name, {key: value if key != "compile" else False for key, value in part.options.items()})
        for slot, part in config.slots.items()
    }
    train = dataclasses.replace(config.train, attention=attention)
    with seeded(config.train.seed if seed is None else seed, other_seed):
        return build_recipe(dataclasses.replace(config, slots=slots, train=train)).to(device).train()


def trial_views(config: Config, device: torch.device, count: int = IMAGES) -> list[View]:
    """Return the views of a step of a config, of noise with the scale of normalised images, with masks and actions.

    The masks are those of the first ``count`` samples of epoch 0.
    """
    views: list[View] = []
    entries = [entry for _, entry in config.data.entries() for _ in range(entry.count)]
    for k, view in enumerate(entries):
        size, masks = view.image_size or config.data.image_size, None
        if view.masked and "masker" in config.slots:
            masker = build_masker(config, patch_grid_of(config, size) if view.image_size else None)
            masks = masker(np.arange(count), seed=view_seed(config.train.seed, k), epoch=0, step=0)
        action = None
        if view.action:
            pipeline = build_pipeline(view.transforms or config.data.transforms, image_size=size)
            numbers = sum(
                transform.action_size for transform in pipeline.transforms if isinstance(transform, Described)
            )
            action = torch.rand(count, numbers, generator=torch.Generator().manual_seed(k))
        views.append(View(_noise(size, count, seed=k), masks, action).to(device))
    return views


def _noise(size: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))
