"""From a config to its masker and its recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from jepa_kit.config import Config
from jepa_kit.config.check import Part
from jepa_kit.errors import ConfigError
from jepa_kit.interfaces import Encoder, Masker
from jepa_kit.recipe import Recipe
from jepa_kit.registry import (
    ENCODERS,
    HEADS,
    LOSSES,
    MASKERS,
    PREDICTORS,
    RECIPES,
    TARGET_UPDATES,
    TARGETS,
    TRANSFORMS,
    PartRegistry,
    located,
    registry_of,
)
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
        if "masker" not in config.slots:
            raise ConfigError([f"the recipe {config.recipe.name!r} has no masker: its views have no masks"])
        encoder = _encoder_of(config)
        supplied = {"grid": grid or encoder.grid, "patch_size": encoder.patch_size}
        return _build(config.slots["masker"], "masker", supplied)


def masker_of(config: Config) -> Masker | None:
    """Return the masker of a config, as ``build_masker``; None if its recipe has none."""
    return build_masker(config) if "masker" in config.slots else None


def build_recipe(config: Config) -> Recipe:
    """Return the recipe of a config, with weights drawn from torch's current random state.

    Raises:
        ConfigError: a part refuses its options (one line each, beginning with the slot), or the weights do not fit into
            the host's memory.
    """
    with every_problem(config):
        if torch.empty(0).device.type != "meta":
            _check_memory(config)
        for slot in ("encoder", "target"):
            part = config.slots.get(slot)
            channels = CHANNELS if part is None else part.options.get("in_chans", CHANNELS)
            if channels != CHANNELS:
                raise ConfigError([f"{slot}: in_chans (={channels}) must be {CHANNELS}: the data are colour images"])
        parts = _build_parts(config, _build, build_order(config))
        name = config.recipe.name
        with located("recipe"):
            with _constructor_of(RECIPES, name):
                recipe: Recipe = RECIPES.get(name)(**parts, **config.recipe.options)
            followers = getattr(recipe, "_followers", ())
            if missing := [network for network in followers if not hasattr(recipe, f"target_{network}")]:
                raise ValueError(
                    f"{name!r} must keep self.follow({missing[0]!r}) as self.target_{missing[0]}, where it is updated"
                )
            return recipe


def patch_grid_of(config: Config, image_size: tuple[int, int] | None = None) -> Grid:
    """Return (H, W), the patch grid of a config's images, or of images of another size (h, w).

    The encoder is built on the meta device to find it.
    """
    encoder = _encoder_of(config)
    if image_size is None:
        return encoder.grid
    return image_size[0] // encoder.patch_size, image_size[1] // encoder.patch_size


def _encoder_of(config: Config) -> Encoder:
    with torch.device("meta"):
        encoder: Encoder = _build_parts(config, _build, ("encoder",))["encoder"]
        return encoder


ATTRIBUTES = {
    "encoder": ("grid", "patch_size", "embed_dim", "depth"),
    "target": ("out_dim",),
    "head": ("out_dim",),
    "target_update": ("tied", "stop_gradient"),
}
"""Slot -> attributes that recipes and other parts read."""

ORDER = (ENCODERS, TARGET_UPDATES, TARGETS, PREDICTORS, HEADS, LOSSES)
"""Registries in the order in which their parts are built, and draw their weights; targets have a teacher's width."""


def build_order(config: Config) -> list[str]:
    """Return the slots of a config but the masker, in the order in which their parts are built."""
    slots = [slot for slot in RECIPES.slots(config.recipe.name) if slot in config.slots or slot == LOSSES.slot]
    return [slot for registry in ORDER for slot in slots if registry_of(slot) is registry]


def _build_parts(
    config: Config, build: Callable[[Part, str, Mapping[str, Any]], Any], slots: Sequence[str]
) -> dict[str, Any]:
    """Build the parts of some slots in this order; return the arguments of the recipe by name.

    Args:
        config: of the parts.
        build: builds a part from (part, slot, supplied values); if it returns None, later parts that need a value of
            this one are supplied with a plausible one.
        slots: parts that supply values must come before those that need them.
    """
    image_size = config.data.image_size
    options = config.slots["encoder"].options if "encoder" in config.slots else {}
    given = {k: v for k, v in options.items() if type(v) is int and v > 0}
    width, side = given.get("embed_dim", 64), given.get("patch_size", 16)
    encoder: dict[str, Any] = {
        "embed_dim": width,
        "depth": given.get("depth", 12),
        "patch_size": side,
        "grid": tuple(max(4, pixels // side) for pixels in image_size),
    }
    head_inputs = RECIPES.get(config.recipe.name).head_inputs
    widths: dict[str, int] = {}  # slot -> width of its output
    teacher: Mapping[str, Any] = {}  # sizes of the target encoder that differ from the encoder's

    def first_width(*names: str) -> int:
        return next((widths[name] for name in names if name in widths), encoder["embed_dim"])

    parts: dict[str, Any] = {}
    for slot in slots:
        supplied = {"image_size": image_size, "attention": config.train.attention, **encoder}
        supplied |= {"mean": config.data.mean, "std": config.data.std, "action_size": config.data.action_size}
        prefix = slot.removesuffix("predictor")
        supplied["out_dim"] = first_width(f"{prefix}target", "target", *(["head"] if slot == "loss" else []))
        supplied["in_dim"] = first_width(head_inputs.get(slot, ""))
        if registry_of(slot) is TARGETS:
            supplied |= teacher
        if slot == LOSSES.slot:
            parts["losses"] = [(part.name, build(part, slot, supplied), weight) for part, weight in config.losses]
            continue
        parts[slot] = built = build(config.slots[slot], slot, supplied)
        if slot == ENCODERS.slot:
            encoder |= {name: getattr(built, name) for name in ATTRIBUTES[slot] if hasattr(built, name)}
        elif slot == TARGET_UPDATES.slot:
            teacher = getattr(built, "sizes", {})
        elif hasattr(built, "out_dim"):
            widths[slot] = built.out_dim
    return parts


def _build(part: Part, slot: str, supplied: Mapping[str, Any]) -> Any:
    registry = registry_of(slot)
    assert registry is not None, slot
    with located(slot):
        with _constructor_of(registry, part.name):
            built = registry.build(part.name, part.options, **{k: supplied[k] for k in registry.supplied})
        made = isinstance(built, nn.Module) and "_modules" in vars(built)
        if not made and (isinstance(built, nn.Module) or registry not in (MASKERS, TARGET_UPDATES)):
            raise ValueError(f"{part.name!r} must be a torch.nn.Module whose constructor calls super().__init__()")
        if made and any(is_lazy(p) for p in built.parameters()):
            raise ValueError(
                f"{part.name!r} has parameters whose shape is unknown before its first call: give its layers all "
                "sizes, nn.Linear in place of nn.LazyLinear"
            )
        if missing := [name for name in ATTRIBUTES.get(registry.slot, ()) if not hasattr(built, name)]:
            raise ValueError(f"{part.name!r} must have the attribute {', '.join(missing)}, which the recipe reads")
        return built


@contextmanager
def _constructor_of(registry: PartRegistry, name: str) -> Iterator[None]:
    """Raise ValueError, with the name, in place of an error in the constructor of a user-defined part."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if registry.get(name).__module__.startswith("jepa_kit."):
            raise
        raise ValueError(f"{name!r} failed in its constructor: {type(error).__name__}: {error}") from error


def _check_memory(config: Config) -> None:
    """Raise ConfigError if the matrices of a transformer's blocks alone exceed this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    problems = []
    for slot, name in (("encoder", "embed_dim"), ("predictor", "width")):
        options = config.slots[slot].options if slot in config.slots else {}
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

    order = build_order(config)
    after_encoder = ["masker"] if "masker" in config.slots else []
    _build_parts(config, build, [*order[:1], *after_encoder, *order[1:]])
    lists = {path: (view.transforms, view.image_size) for path, view in config.data.entries()}
    for path, (transforms, size) in ({"data": (config.data.transforms, config.data.image_size)} | lists).items():
        for i, transform in enumerate(transforms or ()):
            options = {key: value for key, value in transform.items() if key != "name"}
            with _collecting(problems), located(f"{path}: transforms[{i}]"):
                TRANSFORMS.build(transform["name"], options, image_size=size)
    return problems


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Add the problems of a part that is built inside, on the meta device, to ``problems``."""
    try:
        with torch.device("meta"):
            yield
    except ConfigError as error:
        problems.extend(error.problems)
    except FileNotFoundError as error:  # weights of a part, such as a teacher
        problems.append(str(error))
    except BUILD_ERRORS:
        pass
