"""From a config to its masker and its recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from jepa_kit.config import Config
from jepa_kit.config.check import Part
from jepa_kit.errors import ConfigError
from jepa_kit.interfaces import Masker
from jepa_kit.recipe import JEPA
from jepa_kit.registry import SLOTS, TRANSFORMS, located
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
        return _build(config.slots["masker"], "masker", {"grid": grid or patch_grid_of(config)})


def build_recipe(config: Config) -> JEPA:
    """Return the recipe of a config, with weights drawn from torch's current random state.

    Raises:
        ConfigError: a part refuses its options (one line each, beginning with the slot), or the weights do not fit into
            the host's memory.
    """
    with every_problem(config):
        if torch.empty(0).device.type != "meta":
            _check_memory(config)
        for slot in ("encoder", "target"):
            channels = config.slots[slot].options.get("in_chans", CHANNELS)
            if channels != CHANNELS:
                raise ConfigError([f"{slot}: in_chans (={channels}) must be {CHANNELS}: the data are colour images"])
        parts, losses = _build_parts(config, _build, RECIPE)
        with located("target_update"):
            return JEPA(**parts, losses=losses)


def patch_grid_of(config: Config) -> Grid:
    """Return (H, W), the patch grid of a config's images; the encoder is built on the meta device to find it."""
    with torch.device("meta"):
        return _build_parts(config, _build, ("encoder",))[0]["encoder"].grid


ATTRIBUTES = {
    "encoder": ("grid", "patch_size", "embed_dim", "depth"),
    "target": ("out_dim",),
    "target_update": ("tied", "stop_gradient"),
}
"""Slot -> attributes that the recipe reads."""

RECIPE = ("encoder", "target", "predictor", "loss", "target_update")
"""The slots of a recipe in the order in which its parts are built, and draw their weights."""


def _build_parts(
    config: Config, build: Callable[[Part, str, Mapping[str, Any]], Any], slots: Sequence[str]
) -> tuple[dict[str, Any], list[tuple[str, Any, float]]]:
    """Build the parts of some slots in this order.

    Args:
        config: of the parts.
        build: builds a part from (part, slot, supplied values); if it returns None, later parts that need a value of
            this one are supplied with a plausible one.
        slots: an encoder or a target must come before the parts that need its attributes.

    Returns:
        slot -> part, and the terms of the loss (name, module, weight).
    """
    image_size = config.data.image_size
    given = {k: v for k, v in config.slots["encoder"].options.items() if type(v) is int and v > 0}
    width, side = given.get("embed_dim", 64), given.get("patch_size", 16)
    supplied: dict[str, Any] = {
        "image_size": image_size,
        "attention": config.train.attention,
        "embed_dim": width,
        "out_dim": width,
        "depth": given.get("depth", 12),
        "patch_size": side,
        "grid": tuple(max(4, pixels // side) for pixels in image_size),
    }
    parts: dict[str, Any] = {}
    losses = []
    for slot in slots:
        if slot == "loss":
            losses = [(part.name, build(part, slot, supplied), weight) for part, weight in config.losses]
            continue
        parts[slot] = built = build(config.slots[slot], slot, supplied)
        supplied |= {name: getattr(built, name) for name in ATTRIBUTES.get(slot, ()) if hasattr(built, name)}
    return parts, losses


def _build(part: Part, slot: str, supplied: Mapping[str, Any]) -> Any:
    registry = SLOTS[slot]
    with located(slot):
        try:
            built = registry.build(part.name, part.options, **{k: supplied[k] for k in registry.supplied})
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if registry.get(part.name).__module__.startswith("jepa_kit."):
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

    def build(*arguments: Any) -> Any:
        with _collecting(problems):
            return _build(*arguments)

    _build_parts(config, build, ("encoder", "masker", *RECIPE[1:]))
    for i, transform in enumerate(config.data.transforms):
        options = {key: value for key, value in transform.items() if key != "name"}
        with _collecting(problems), located(f"data: transforms[{i}]"):
            TRANSFORMS.build(transform["name"], options, image_size=config.data.image_size)
    return problems


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Add the problems of a part that is built inside, on the meta device, to ``problems``."""
    try:
        with torch.device("meta"):
            yield
    except ConfigError as error:
        problems.extend(error.problems)
    except BUILD_ERRORS:
        pass
