"""Digests that identify cells, baselines and evaluations: the same on every machine.

They are of configs before values that depend on the machine are resolved, and without options that are equal to their
defaults: writing a default out, another order of keys, or a new option of a later release changes no digest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_kit.config import Config
from jepa_kit.config.check import SECTIONS, Part
from jepa_kit.config.section import Section
from jepa_kit.config.typed import DoesNotFitError, convert, plain
from jepa_kit.files import sha256_of
from jepa_kit.registry import LOSSES, RECIPES, REQUIRED, SLOTS, PartRegistry, registry_of

CHANGES_NUMBERS = (
    "data.max_skipped",
    "train.accumulate",
    "train.init_from",
    "train.nonfinite_limit",
    "train.on_nonfinite",
)
"""Options that may change at a resume, but may give other weights if a run has them from its start."""
LENGTH = 12
"""Hexadecimal digits of a digest: among a million cells, two have the same with a probability of 0.2 %."""


@functools.cache
def machine_options() -> frozenset[str]:
    """Return the options that are no part of an arm: those of the machine and of logs, and the seed."""
    from jepa_kit.engine.checkpoint.resume import FREE  # here, because many modules import this one

    return FREE - {*CHANGES_NUMBERS} | {"train.seed"}


def digest(value: Any) -> str:
    """Return the digest of plain values, whatever the order of keys."""
    text = json.dumps(plain(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def essentials(config: Config) -> dict[str, Any]:
    """Return what distinguishes a config from the defaults, without the seed and what depends on the machine."""
    found: dict[str, Any] = {RECIPES.slot: part_essentials(RECIPES, config.recipe)}
    for slot, part in config.slots.items():
        registry = registry_of(slot)
        assert registry is not None, slot
        found[slot] = _without_machine(slot, part_essentials(registry, part))
    if config.losses:
        weights = [{} if weight == 1 else {"weight": weight} for _, weight in config.losses]
        found[LOSSES.slot] = [part_essentials(LOSSES, p) | w for (p, _), w in zip(config.losses, weights, strict=True)]
    for name in SECTIONS:
        found[name] = _without_machine(name, _section(getattr(config, name)))
    if config.imports:
        found["imports"] = [_module(name) for name in config.imports]
    return {key: _with_contents(plain(value)) for key, value in found.items()}


def _with_contents(value: Any) -> Any:
    """Return plain values with the digest of its contents in place of each path of a file or folder that exists.

    Teachers, tokenizers and weights to start from are files: another one at the same path makes another cell.
    """
    if isinstance(value, dict):
        return {key: _with_contents(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_contents(inner) for inner in value]
    if not isinstance(value, str) or not (Path(value).suffix or "/" in value):
        return value  # a word of the config, such as the name of a norm
    path = Path(value).expanduser()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not path.exists() or not files:
        return value
    return digest([[str(file.relative_to(path)), sha256_of(file)] for file in files])


def _without_machine(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if f"{section}.{key}" not in machine_options()}


def part_essentials(registry: PartRegistry, part: Part | Mapping[str, Any]) -> dict[str, Any]:
    """Return a part's name and the options that differ from their defaults, also in parts inside it."""
    name = part.name if isinstance(part, Part) else part["name"]
    options = part.options if isinstance(part, Part) else part
    nested = getattr(registry.get(name), "nested", {})
    found = {"name": name}
    for key, known in registry.options(name).items():
        if key not in options:
            continue
        value, default = options[key], known.default
        if default is not REQUIRED:
            try:
                default = convert(default, known.annotation)
            except DoesNotFitError:  # a default that its own annotation forbids: kept as it is
                default = known.default
        if key in nested:
            value, default = (_inside(SLOTS[nested[key]], x) for x in (value, default))
        if default is REQUIRED or plain(value) != plain(default):
            found[key] = value
    return found


def _inside(registry: PartRegistry, value: Any) -> Any:
    """Return a part, or a list of parts, without defaults; any other value as it is."""
    if isinstance(value, Mapping) and "name" in value:
        return part_essentials(registry, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_inside(registry, entry) for entry in value]
    return value


def _section(section: Section) -> dict[str, Any]:
    """Return the values of a section that differ from their defaults."""
    found = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value, default = getattr(section, field.name), field.default
        registry = field.metadata.get("parts")
        if registry is not None:
            value, default = (_inside(registry, x) for x in (value, default))
        if field.metadata.get("items") and value is not None:
            value = [_section(entry) for entry in value]
        if default is dataclasses.MISSING or plain(value) != plain(default):
            found[field.name] = value
    return found


def _module(name: str) -> str:
    """Return a dotted module as it is, and for a file a digest of its text, because its path depends on the machine."""
    path = Path(name)
    return digest(path.read_text(encoding="utf-8")) if path.suffix == ".py" and path.is_file() else name


def cell_digest(config: Config, data: Mapping[str, Any]) -> str:
    """Return the identity of a trained network: of the config with its seed, and of the training data's contents.

    Args:
        config: with ``train.steps_per_epoch``, and a precision other than ``auto``.
        data: ``samples`` and ``digest`` of the training shards (jepa_kit/data/shards/index.py).
    """
    assert config.train.precision != "auto"
    return digest({"config": essentials(config), "seed": config.train.seed, "data": data["digest"]})


def baseline_digest(name: str, config: Config, *, of_patches: bool = False) -> str:
    """Return the identity of a baseline's features; the images of the data are part of that of the evaluation.

    Args:
        name: of the baseline.
        config: its images, and the encoder of an untrained network.
        of_patches: whether a protocol needs features of single patches, so that the side of a patch counts.
    """
    core = essentials(config)
    data = {key: value for key, value in core["data"].items() if key in ("image_size", "decoder", "mean", "std")}
    own: dict[str, Any] = {"baseline": name, "data": data}
    if of_patches:
        own["patch_size"] = core["encoder"].get("patch_size")
    if name == "untrained":
        own |= {"encoder": core["encoder"], "seed": config.train.seed, "precision": config.train.precision}
    return digest(own)


def evaluation_digest(
    protocol: Mapping[str, Any], layers: str, seed: int, labels: Sequence[str] | None, data: Mapping[str, Any]
) -> str:
    """Return the identity of an evaluation.

    Args:
        protocol: its name, and the options that differ from their defaults.
        layers: the layer set of a protocol that takes one.
        seed: of the protocol.
        labels: that are evaluated; None for all.
        data: the identities ``train`` and ``test`` of the shards.
    """
    shards = {name: data[name]["digest"] for name in ("train", "test")}
    chosen = None if labels is None else sorted(labels)
    return digest({"protocol": protocol, "layers": layers, "seed": seed, "labels": chosen, "data": shards})
