"""Check a raw config against the signatures of its parts and against the sections.

Nothing is built; each problem becomes a line with its path, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from jepa_kit.config.data_section import DataConfig
from jepa_kit.config.renamed import RELEASED_CROP
from jepa_kit.config.section import Section
from jepa_kit.config.sections import (
    CheckpointConfig,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
    between_sections,
)
from jepa_kit.config.typed import DoesNotFitError, convert, describe
from jepa_kit.registry import (
    LOSSES,
    RECIPES,
    REQUIRED,
    SLOTS,
    Option,
    PartRegistry,
    did_you_mean,
    not_an_option,
    registry_of,
    signature_options,
    takes,
)

SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "evaluate": EvaluateConfig,
}
"""Key in YAML -> schema. A new section needs an entry here and a field of ``Config``."""

META = ("imports", "_BASE_", "versions")
"""Top-level keys that are neither a slot nor a section."""

DEFAULT_RECIPE = {"name": "jepa"}

WEIGHT = Option("weight", float, 1.0)
"""Option of every term of the loss, besides those of its part."""

LARGEST = {
    "depth": 1024,
    "embed_dim": 65_536,
    "num_contexts": 1024,
    "num_heads": 4096,
    "num_masks": 1024,
    "num_targets": 1024,
    "patch_size": 4096,
    "width": 65_536,
}
"""Option of any part -> its largest value; a larger one is a typing error that would take forever to build."""

MOST_PATCHES = 2**20
"""Largest number of patches in an image."""

_SQUARE = (lambda value: [value] * 2 if type(value) is int else value, ", or one int for a square")
SHORTHANDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "data.image_size": _SQUARE,
    "data.views[].image_size": _SQUARE,
    "data.transforms": (lambda value: [RELEASED_CROP] if value is None else value, ", or null for the released crop"),
}
"""Path without numbers -> (function that expands a short value, its description for messages)."""


@dataclass(frozen=True)
class Part:
    """The checked part of a slot.

    Args:
        name: as registered.
        options: every option of the part, converted, with its default if it was not given.
    """

    name: str
    options: Mapping[str, Any]


def check_config(raw: Mapping[Any, Any], problems: list[str]) -> dict[str, Any]:
    """Check a whole config and return the arguments of ``Config``: recipe, slots, losses and sections."""
    raw = {key: value for key, value in raw.items() if value is not None or not _is_slot(key)}
    recipe = check_part(RECIPES.slot, raw.get(RECIPES.slot, DEFAULT_RECIPE), RECIPES, problems)
    wanted = [slot for slot in raw if _is_slot(slot)] if recipe is None else RECIPES.slots(recipe.name)
    known = [RECIPES.slot, *wanted, *SECTIONS, *META]
    for key in raw:
        if key in known:
            continue
        if _is_slot(key):
            of = "" if recipe is None else f" {recipe.name!r}"
            has = ", ".join(wanted)
            problems.append(f"{key} is a slot that the recipe{of} does not have; take it out. It has: {has}")
        else:
            close = did_you_mean(str(key), known)
            problems.append(f"{key} is neither a slot nor a section{close} A config takes: {', '.join(known)}")
    slots: dict[str, Part] = {}
    losses: list[tuple[Part, float]] = []
    for slot in wanted:
        registry = cast(PartRegistry, registry_of(slot))
        if slot not in raw and recipe is not None and slot in RECIPES.optional_slots(recipe.name):
            continue
        if slot not in raw:
            problems.append(f"{slot} is missing: give it a mapping with a name. {_registered(registry)}")
        elif slot == LOSSES.slot:
            losses = check_losses(raw[slot], problems)
        elif (part := check_part(slot, raw[slot], registry, problems)) is not None:
            slots[slot] = part
    sections = {name: check_section(name, raw.get(name, {}), problems) for name in SECTIONS}
    if sections["optim"] and sections["train"]:
        problems.extend(between_sections(sections["optim"], sections["train"]))
    if sections["data"]:
        if recipe is not None:
            _check_views(recipe, sections["data"], problems)
        if "encoder" in slots:
            _check_sizes(sections["data"], slots["encoder"].options.get("patch_size"), problems)
    return {"recipe": recipe, "slots": slots, "losses": losses, **sections}


def _is_slot(key: object) -> bool:
    return isinstance(key, str) and registry_of(key) is not None


def _check_views(recipe: Part, data: DataConfig, problems: list[str]) -> None:
    """Check that the recipe gets as many views as it takes, and masks if it needs them."""
    cls, count = RECIPES.get(recipe.name), data.num_views
    fewest, most = cls.num_views
    if count < fewest or (most is not None and count > most):
        right = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        problems.append(
            f"data.views (={count} in all) must give {right} to the recipe {recipe.name!r}; each entry counts "
            "``count`` times, and without data.views there is one"
        )
    masked = [path for path, view in data.entries() if view.masked]
    if cls.masked and not masked:
        problems.append(f"data.views must have an entry with masked: true, for the masker of {recipe.name!r}")
    if not cls.masked and data.views is not None:
        problems.extend(
            f"{path}.masked (=True) must be left out: the recipe {recipe.name!r} has no masker" for path in masked
        )


def _check_sizes(data: DataConfig, side: Any, problems: list[str]) -> None:
    """Check the size of each view against the side of the encoder's patches, if that is an option."""
    if type(side) is not int or side < 1:
        return
    sizes = {"data": data.image_size} | {path: view.image_size or data.image_size for path, view in data.entries()}
    for path, size in sizes.items():
        patches = (size[0] // side) * (size[1] // side)
        if patches > MOST_PATCHES:
            problems.append(
                f"{path}.image_size (={list(size)}) over encoder.patch_size (={side}) gives {patches:,} patches; they "
                f"must be at most {MOST_PATCHES:,}"
            )
        elif size != data.image_size and (size[0] % side or size[1] % side):  # the encoder checks its own size
            problems.append(f"{path}.image_size (={list(size)}) must be divisible by encoder.patch_size (={side})")


def check_part(path: str, raw: Any, registry: PartRegistry, problems: list[str]) -> Part | None:
    """Return the part of a slot's mapping; None, after adding to ``problems``, if its name is not registered."""
    if not isinstance(raw, dict):
        problems.append(f"{path} (={raw!r}) must be a mapping with a name. {_registered(registry)}")
        return None
    if "name" not in raw:
        problems.append(f"{path}.name is missing. {_registered(registry)}")
        return None
    name = raw["name"]
    if not isinstance(name, str) or name not in registry:
        problems.append(f"{path}.name: {registry.unknown(name)}")
        return None
    options = registry.options(name)
    given = {k: v for k, v in raw.items() if k != "name"}
    problems.extend(_unknown_key(path, key, name, options, registry) for key in given if key not in options)
    values = check_options(path, given, options, repr(name), problems)
    for option, slot in getattr(registry.get(name), "nested", {}).items():
        values[option] = _check_nested(f"{path}.{option}", values[option], SLOTS[slot], problems)
    return Part(name, values)


def _check_nested(path: str, raw: Any, registry: PartRegistry, problems: list[str]) -> Any:
    """Return a part, or a list of parts, inside an option (in the attribute ``nested`` of a class) with all defaults.

    A part with mistakes, which are added to ``problems``, is None or is left out of the list. An option may be None.
    """
    if raw is None:
        return None
    if isinstance(raw, dict):
        part = check_part(path, raw, registry, problems)
        return None if part is None else {"name": part.name, **part.options}
    parts = [check_part(f"{path}[{i}]", part, registry, problems) for i, part in enumerate(raw)]
    return [{"name": part.name, **part.options} for part in parts if part is not None]


def nested_parts(slot: str, name: str, options: Mapping[str, Any]) -> list[Any]:
    """Return the class of a part, and those of all parts inside its checked options."""
    registry = registry_of(slot)
    assert registry is not None, slot
    cls = registry.get(name)
    found = [cls]
    for option, inner in getattr(cls, "nested", {}).items():
        inside = options[option] or []
        for part in inside if isinstance(inside, list) else [inside]:
            found += nested_parts(inner, part["name"], part)
    return found


def _unknown_key(path: str, key: Any, name: str, options: Mapping[str, Option], registry: PartRegistry) -> str:
    at = f"{path}.{key}"
    if key in registry.supplied:
        return f"{at} is supplied by the recipe ({registry.supplied[key]}); take it out"
    others = [repr(n) for n in registry.names() if n != name and key in registry.options(n)]
    hint = f"; it belongs to {', '.join(others)}." if others else None
    return not_an_option(at, f" of {name!r}", options, hint)


def check_losses(raw: Any, problems: list[str]) -> list[tuple[Part, float]]:
    """Return the terms of the loss with their weights, from one mapping or a list of mappings."""
    if raw == []:
        problems.append(f"loss (=[]) must have at least one loss. {_registered(LOSSES)}")
    terms = raw if isinstance(raw, list) else [raw]
    losses: list[tuple[Part, float]] = []
    for i, term in enumerate(terms):
        path = f"loss[{i}]" if isinstance(raw, list) else "loss"
        if isinstance(term, dict):
            weight = check_value(f"{path}.weight", term.get("weight", WEIGHT.default), WEIGHT, problems)
            if weight is not None and not 0 <= weight < math.inf:
                problems.append(f"{path}.weight (={weight}) must be at least 0 and finite: the sum is minimised")
            term = {k: v for k, v in term.items() if k != "weight"}
        part = check_part(path, term, LOSSES, problems)
        if part is None:
            continue
        if any(part.name == other.name for other, _ in losses):
            problems.append(f"{path}.name (={part.name!r}) is in the list already; give one term both weights' sum")
        if "weight" in LOSSES.options(part.name):
            problems.append(
                f"{path}: {part.name!r} has an option 'weight', the key of a term's weight: rename the option"
            )
        losses.append((part, weight))
    if losses and all(weight == 0 for _, weight in losses):
        problems.append("loss: the weight of at least one term must be above 0")
    return losses


def check_section(name: str, raw: Any, problems: list[str], schema: type[Section] | None = None) -> Any:
    """Return a section's mapping as its dataclass; None, after adding to ``problems``, if it has mistakes.

    Args:
        name: of the section, or the path of another mapping with a schema.
        raw: the mapping.
        problems: gets a line for each mistake.
        schema: of the mapping; by default that of the section.
    """
    schema = schema or SECTIONS[name]
    options = signature_options(schema)  # type: ignore[arg-type]
    if not isinstance(raw, dict):
        problems.append(f"{name} (={raw!r}) must be a mapping, or left out. {takes(options)}")
        return None
    found = [not_an_option(f"{name}.{key}", "", options) for key in raw if key not in options]
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    lists = {key: fields[key].metadata["items"] for key in raw if key in fields and fields[key].metadata.get("items")}
    values = check_options(name, {k: v for k, v in raw.items() if k not in lists}, options, repr(name), found)
    for key, items in lists.items():
        values[key] = _check_list(f"{name}.{key}", raw[key], items, found)
    for key, field in fields.items():
        registry, given = field.metadata.get("parts"), values.get(key)
        if registry and given:
            parts = _check_nested(f"{name}.{key}", given, registry, found)
            # None if a part has mistakes: they are reported already
            values[key] = tuple(parts) if len(parts) == len(given) else None
    found.extend(f"{name}.{p}" for p in schema.out_of_range(values))
    if not found:  # every value is valid alone
        found = [f"{name}.{p}" for p in schema.relations(values)]
    problems.extend(found)
    return None if found else schema(**values)


def _check_list(path: str, raw: Any, schema: type[Section], problems: list[str]) -> tuple[Any, ...] | None:
    """Return a list of mappings as dataclasses; None for null, or if one has mistakes."""
    if raw is not None and not isinstance(raw, list):
        options = signature_options(schema)  # type: ignore[arg-type]
        problems.append(f"{path} (={raw!r}) must be a list of mappings, or null. {takes(options)}")
        return None
    items = [check_section(f"{path}[{i}]", item, problems, schema) for i, item in enumerate(raw or [])]
    return None if raw is None or None in items else tuple(items)


def check_options(
    path: str, raw: Mapping[Any, Any], options: Mapping[str, Option], owner: str, problems: list[str]
) -> dict[str, Any]:
    """Return every option with its converted value or its default.

    Args:
        path: of the mapping.
        raw: the mapping; unknown keys are ignored.
        options: the schema.
        owner: of the options, for messages.
        problems: gets a line for each option that is missing or has the wrong type.
    """
    values: dict[str, Any] = {}
    for name, option in options.items():
        at = f"{path}.{name}"
        if name in raw:
            values[name] = check_value(at, raw[name], option, problems)
            if isinstance(values[name], int) and values[name] > LARGEST.get(name, math.inf):
                problems.append(f"{at} (={values[name]}) must be at most {LARGEST[name]:,}")
        elif option.default is REQUIRED:
            right = describe(option.annotation) + _shorthand(at)[1]
            problems.append(f"{at} is missing: {owner} needs it; it must be {right}")
        else:
            try:
                values[name] = convert(option.default, option.annotation)
            except DoesNotFitError:
                problems.append(
                    f"{at}: the default (={option.default!r}) of {owner} is not of the type that its constructor "
                    f"declares: {describe(option.annotation)}"
                )
    return values


def check_value(path: str, value: Any, option: Option, problems: list[str]) -> Any:
    """Return the converted value; None, after adding to ``problems``, if its type is wrong."""
    full, short = _shorthand(path)
    try:
        return convert(full(value), option.annotation)
    except DoesNotFitError:
        right = describe(option.annotation) + short
        if right == "an int" and type(value) is float and value.is_integer():
            right += f": write {int(value)}"
        problems.append(f"{path} (={value!r}) must be {right}")
        return None


def _shorthand(path: str) -> tuple[Callable[[Any], Any], str]:
    return SHORTHANDS.get(re.sub(r"\[\d+\]", "[]", path), (lambda x: x, ""))


def _registered(registry: PartRegistry) -> str:
    return f"Registered: {', '.join(registry.names()) or 'none'}"
