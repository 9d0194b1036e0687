"""Raw YAML against the schemas: every mistake becomes a line, and nothing is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jepa_kit.config.renamed import RELEASED_CROP
from jepa_kit.config.sections import SECTIONS, between_sections, range_problem
from jepa_kit.config.typed import DoesNotFitError, convert, describe
from jepa_kit.errors import ConfigError
from jepa_kit.registry import LOSSES, REQUIRED, SLOTS, Option, PartRegistry, did_you_mean, signature_options

META = ("imports", "_BASE_", "versions")
"""Top-level keys that are neither a slot nor a section."""

WEIGHT = Option("weight", float, 1.0)
"""The key that every term of the loss takes beside its part's own."""


@dataclass(frozen=True)
class Part:
    """A checked choice for a slot.

    Args:
        name: as registered.
        options: every option of the part, converted, with the defaults that were not given.
    """

    name: str
    options: Mapping[str, Any]


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
"""Name of an option of any part -> its largest value: what is larger is a slip, and building it would never end."""

MOST_PATCHES = 2**20
"""Of an image."""


def _square(value: Any) -> Any:
    return [value, value] if type(value) is int else value


SHORTHANDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "data.image_size": (_square, ", or one int for a square"),
    "data.transforms": (lambda value: [RELEASED_CROP] if value is None else value, ", or null for the released crop"),
}
"""Path -> (what makes the full value of the short one, how a message names the short one)."""


def check_value(path: str, value: Any, option: Option, problems: list[str]) -> Any:
    """The converted value; None, with a new line in ``problems``, where it does not fit."""
    full, short = SHORTHANDS.get(path, (lambda x: x, ""))
    try:
        return convert(full(value), option.annotation)
    except DoesNotFitError:
        right = describe(option.annotation) + short
        if right == "an int" and type(value) is float and value.is_integer():
            right += f": write {int(value)}"
        problems.append(f"{path} (={value!r}) must be {right}")
        return None


def check_options(
    path: str, raw: Mapping[Any, Any], options: Mapping[str, Option], owner: str, problems: list[str]
) -> dict[str, Any]:
    """Every option with its converted value or its default; what is missing or wrong becomes a line.

    Args:
        path: of the mapping.
        raw: the mapping, without keys that are unknown.
        options: the schema.
        owner: who takes the options, for messages.
        problems: gets the lines.
    """
    values: dict[str, Any] = {}
    for name, option in options.items():
        at = f"{path}.{name}"
        if name in raw:
            values[name] = check_value(at, raw[name], option, problems)
            if isinstance(values[name], int) and values[name] > LARGEST.get(name, math.inf):
                problems.append(f"{at} (={values[name]}) must be at most {LARGEST[name]:,}")
        elif option.default is REQUIRED:
            right = describe(option.annotation) + SHORTHANDS.get(at, (None, ""))[1]
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


def _takes(options: Iterable[str]) -> str:
    return f"It takes: {', '.join(options) or 'nothing'}"


def unknown_key(path: str, key: Any, name: str, options: Mapping[str, Option], registry: PartRegistry) -> str:
    """The line about a key that a part does not take."""
    at = f"{path}.{key}"
    if key in registry.supplied:
        return f"{at} is supplied by the recipe ({registry.supplied[key]}); take it out"
    others = [repr(n) for n in registry.names() if n != name and key in registry.options(n)]
    hint = f"; it belongs to {', '.join(others)}." if others else did_you_mean(str(key), options)
    return f"{at} is not an option of {name!r}{hint} {_takes(options)}"


def check_part(path: str, raw: Any, registry: PartRegistry, problems: list[str]) -> Part | None:
    """A slot's mapping as a part; None, with lines in ``problems``, where its name is not known."""
    registered = f"Registered: {', '.join(registry.names()) or 'none'}"
    if not isinstance(raw, dict):
        problems.append(f"{path} (={raw!r}) must be a mapping with a name. {registered}")
        return None
    if "name" not in raw:
        problems.append(f"{path}.name is missing. {registered}")
        return None
    name = raw["name"]
    if not isinstance(name, str) or name not in registry:
        problems.append(f"{path}.name: {registry.unknown(name)}")
        return None
    options = registry.options(name)
    given = {k: v for k, v in raw.items() if k != "name"}
    problems.extend(unknown_key(path, key, name, options, registry) for key in given if key not in options)
    values = check_options(path, given, options, repr(name), problems)
    for option, slot in getattr(registry.get(name), "nested", {}).items():
        values[option] = _check_nested(f"{path}.{option}", values[option], SLOTS[slot], problems)
    return Part(name, values)


def _check_nested(path: str, raw: Any, registry: PartRegistry, problems: list[str]) -> list[Any]:
    """Parts that another part lists (its class names such options in ``nested``), with their defaults written out."""
    parts = [check_part(f"{path}[{i}]", part, registry, problems) for i, part in enumerate(raw or [])]
    return [{"name": part.name, **part.options} for part in parts if part is not None]


def check_losses(raw: Any, problems: list[str]) -> list[tuple[Part, float]]:
    """The terms of the loss with their weights, from one mapping or a list of them."""
    if raw == []:
        problems.append(f"loss (=[]) must hold at least one loss. Registered: {', '.join(LOSSES.names())}")
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


def check_section(name: str, raw: Any, problems: list[str]) -> Any:
    """A section's mapping as its dataclass; None, with lines in ``problems``, where something is wrong."""
    schema = SECTIONS[name]
    options = signature_options(schema)
    if not isinstance(raw, dict):
        problems.append(f"{name} (={raw!r}) must be a mapping, or left out. {_takes(options)}")
        return None
    found: list[str] = []
    found.extend(
        f"{name}.{key} is not an option{did_you_mean(str(key), options)} {_takes(options)}"
        for key in raw
        if key not in options
    )
    values = check_options(name, raw, options, repr(name), found)
    for field in dataclasses.fields(schema):
        registry, given = field.metadata.get("parts"), values.get(field.name)
        if registry and given:
            parts = _check_nested(f"{name}.{field.name}", given, registry, found)
            values[field.name] = (
                tuple(parts) if len(parts) == len(given) else None
            )  # the others have their lines already
    ranges = (range_problem(schema, k, values[k]) for k in values)
    found.extend(f"{name}.{p}" for p in ranges if p)
    section = None
    if not found:
        try:
            section = schema(**values)
        except ConfigError as error:  # relations between values that are right alone
            found.extend(f"{name}.{p}" for p in error.problems)
    problems.extend(found)
    return section


def _too_many_patches(image_size: tuple[int, int], side: Any) -> list[str]:
    if type(side) is not int or side < 1:
        return []
    patches = (image_size[0] // side) * (image_size[1] // side)
    if patches <= MOST_PATCHES:
        return []
    return [
        f"data.image_size (={list(image_size)}) over encoder.patch_size (={side}) gives {patches:,} patches; "
        f"they must be at most {MOST_PATCHES:,}"
    ]


def check_config(raw: Mapping[Any, Any], problems: list[str]) -> dict[str, Any]:
    """The whole config: slots (five parts), losses and sections, as ``Config`` takes them."""
    known = [*SLOTS, *SECTIONS, *META]
    problems.extend(
        f"{key} is neither a slot nor a section{did_you_mean(str(key), known)} A config takes: {', '.join(known)}"
        for key in raw
        if key not in known
    )
    slots: dict[str, Part] = {}
    losses: list[tuple[Part, float]] = []
    for slot, registry in SLOTS.items():
        if slot not in raw:
            problems.append(
                f"{slot} is missing: give it a mapping with a name. Registered: {', '.join(registry.names()) or 'none'}"
            )
        elif slot == LOSSES.slot:
            losses = check_losses(raw[slot], problems)
        elif (part := check_part(slot, raw[slot], registry, problems)) is not None:
            slots[slot] = part
    sections = {name: check_section(name, raw.get(name, {}), problems) for name in SECTIONS}
    if sections["data"] and "encoder" in slots:
        problems.extend(_too_many_patches(sections["data"].image_size, slots["encoder"].options.get("patch_size")))
    if sections["optim"] and sections["train"]:
        problems.extend(between_sections(sections["optim"], sections["train"]))
    return {"slots": slots, "losses": losses, **sections}
