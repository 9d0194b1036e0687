"""A separate recipe and random images on which parts are checked and FLOP are counted, without effect on the run."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from jepa_kit.build import build_recipe
from jepa_kit.config import Config
from jepa_kit.config.check import Part
from jepa_kit.random_state import seeded
from jepa_kit.recipe import Recipe

IMAGES = 4


def trial_recipe(config: Config, device: torch.device, *, other_seed: int = 1) -> Recipe:
    """Build the recipe of a config as a run does, with its first weights, in training mode, uncompiled.

    Attention uses the plain backend, whose operations torch's counter knows.

    Args:
        config: a checked config.
        device: of the parameters.
        other_seed: of numpy's and Python's random states, on which first weights must not depend.
    """
    slots = {
        slot: Part(part.name, {key: value if key != "compile" else False for key, value in part.options.items()})
        for slot, part in config.slots.items()
    }
    train = dataclasses.replace(config.train, attention="reference")
    with seeded(config.train.seed, other_seed):
        return build_recipe(dataclasses.replace(config, slots=slots, train=train)).to(device).train()


def trial_images(config: Config, device: torch.device, count: int = IMAGES) -> Tensor:
    """Return [count, 3, h, w] noise with the scale of normalised images."""
    noise = torch.randn(count, 3, *config.data.image_size, generator=torch.Generator().manual_seed(0))
    return noise.to(device)
