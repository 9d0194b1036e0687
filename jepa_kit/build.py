"""From a config to its masker and its recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jepa_kit.config import Config, Part, located
from jepa_kit.errors import ConfigError
from jepa_kit.interfaces import Masker
from jepa_kit.recipe import JEPA
from jepa_kit.registry import SLOTS, TRANSFORMS
from jepa_kit.structures import Grid

CHANNELS = 3
"""Channels of every image of the data."""


def build_masker(config: Config, grid: Grid | None = None) -> Masker:
    """Return the masker of a config.

    Args:
        config: checked.
        grid: (H, W) of the encoder's patches; found by ``patch_grid_of`` if it is None.

    Raises:
        ConfigError: a part refuses its options; one line each, beginning with the slot.
    """
    with every_problem(config):
        return _build(config.slots["masker"], "masker", grid=grid or patch_grid_of(config))


def build_recipe(config: Config) -> JEPA:
    """Return the recipe of a config, with weights drawn from torch's current random state.

    Raises:
        ConfigError: a part refuses its options (one line each, beginning with the slot), or the weights do not fit into
            the host's memory.
    """
    with every_problem(config):
        return _build_recipe(config)


def _build_recipe(config: Config) -> JEPA:
    if torch.empty(0).device.type != "meta":
        _check_memory(config)
    for slot in ("encoder", "target"):
        channels = config.slots[slot].options.get("in_chans", CHANNELS)
        if channels != CHANNELS:
            with located(slot):
                raise ValueError(f"in_chans (={channels}) must be {CHANNELS}: the data are colour images")
    encoder = _build_encoder(config)
    target = _build(
        config.slots["target"],
        "target",
        embed_dim=encoder.embed_dim,
        depth=encoder.depth,
        patch_size=encoder.patch_size,
    )
    predictor = _build(
        config.slots["predictor"],
        "predictor",
        embed_dim=encoder.embed_dim,
        out_dim=target.out_dim,
        grid=encoder.grid,
        attention=config.train.attention,
    )
    losses = [(part.name, _build(part, "loss"), weight) for part, weight in config.losses]
    update = _build(config.slots["target_update"], "target_update")
    with located("target_update"):
        return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=update)


def patch_grid_of(config: Config) -> Grid:
    """Return (H, W), the patch grid of a config's images; the encoder is built on the meta device to find it."""
    with torch.device("meta"):
        return _build_encoder(config).grid


def _build_encoder(config: Config) -> Any:
    part = config.slots["encoder"]
    return _build(part, "encoder", image_size=config.data.image_size, attention=config.train.attention)


ATTRIBUTES = {
    "encoder": ("grid", "patch_size", "embed_dim", "depth"),
    "target": ("out_dim",),
    "target_update": ("tied", "stop_gradient"),
}
"""Slot -> attributes that the recipe reads."""


def _build(part: Part, slot: str, **supplied: object) -> Any:
    with located(slot):
        try:
            built = SLOTS[slot].build(part.name, part.options, **supplied)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if SLOTS[slot].get(part.name).__module__.startswith("jepa_kit."):
                raise
            raise ValueError(f"{part.name!r} failed in its constructor: {type(error).__name__}: {error}") from error
        if missing := [name for name in ATTRIBUTES.get(slot, ()) if not hasattr(built, name)]:
            raise ValueError(f"{part.name!r} must have the attribute {', '.join(missing)}, which the recipe reads")
        return built


def _check_memory(config: Config) -> None:
    """Raise ConfigError if the matrices of a transformer's blocks alone exceed this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    problems = []
    for slot, name in (("encoder", "embed_dim"), ("predictor", "width")):
        options = config.slots[slot].options
        depth, width, ratio = (options.get(key) for key in ("depth", name, "mlp_ratio"))
        if type(depth) is int and type(width) is int:
            needed = 4.0 * depth * width**2 * (4 + 2 * (ratio if isinstance(ratio, float) else 0))
            if needed > memory:
                problems.append(
                    f"{slot}: depth (={depth}) blocks of {name} (={width}) need {needed / 1e9:,.0f} GB for their "
                    f"weights, but this machine has {memory / 1e9:,.0f} GB of memory"
                )
    if problems:
        raise ConfigError(problems)


@contextmanager
def every_problem(config: Config) -> Iterator[None]:
    """If a part is refused inside, report what all parts and transforms of the config refuse.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        yield
    except ConfigError as error:
        problems = part_problems(config)
        raise ConfigError([*(p for p in error.problems if p not in problems), *problems]) from error


BUILD_ERRORS = (ArithmeticError, RuntimeError, TypeError)
"""Raised by parts that cannot be built on the meta device, or have other errors; the real build reports those."""


def part_problems(config: Config) -> list[str]:
    """Return one line for each part or transform that refuses its options; everything is built on the meta device.

    A part that needs a value from a refused part is given a plausible one.
    """
    problems: list[str] = []

    def tried(part: Part, slot: str, **supplied: object) -> Any:
        try:
            with torch.device("meta"):
                return _build(part, slot, **supplied)
        except ConfigError as error:
            problems.extend(error.problems)
        except BUILD_ERRORS:
            pass
        return None

    slots, size = config.slots, config.data.image_size
    given = {name: value for name, value in slots["encoder"].options.items() if type(value) is int and value > 0}
    encoder = tried(slots["encoder"], "encoder", image_size=size, attention=config.train.attention)
    width, depth, p = (
        getattr(encoder, name, given.get(name, default))
        for name, default in (("embed_dim", 64), ("depth", 12), ("patch_size", 16))
    )
    grid = getattr(encoder, "grid", (max(4, size[0] // p), max(4, size[1] // p)))
    tried(slots["masker"], "masker", grid=grid)
    target = tried(slots["target"], "target", embed_dim=width, depth=depth, patch_size=p)
    out_dim = getattr(target, "out_dim", width)
    supplied = {"embed_dim": width, "out_dim": out_dim, "grid": grid, "attention": config.train.attention}
    tried(slots["predictor"], "predictor", **supplied)
    for part, _ in config.losses:
        tried(part, "loss")
    tried(slots["target_update"], "target_update")
    for i, transform in enumerate(config.data.transforms):
        options = {key: value for key, value in transform.items() if key != "name"}
        try:
            with located(f"data: transforms[{i}]"):
                TRANSFORMS.build(transform["name"], options, image_size=size)
        except ConfigError as error:
            problems.extend(error.problems)
        except BUILD_ERRORS:
            pass
    return problems
