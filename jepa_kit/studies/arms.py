"""From factors to arms: each is a config, named by the overrides in which it differs from the others."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jepa_kit.config import Config, load_config
from jepa_kit.config.shipped import find_config
from jepa_kit.errors import ConfigError
from jepa_kit.studies.spec import OWN_KEYS, Overrides, Study, flatten

Level = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train: a config, for every seed.

    Args:
        name: differs from those of all other arms.
        config: with the study's precision and shards; its seed and output folder have no meaning.
    """

    name: str
    config: Config


def combine(study: Study) -> list[tuple[Level, ...]]:
    """Return the levels of each arm: every combination, the last factor's fastest, or the arms that are listed."""
    if study.arms is not None:
        return [(arm,) for arm in study.arms]
    assert study.factors is not None
    return list(itertools.product(*study.factors.values()))


def load_arms(study: Study, folder: Path, machine: Sequence[str], problems: list[str]) -> list[Arm]:
    """Return the arms of a study, the base arm first; mistakes of their configs are added to ``problems``.

    Args:
        study: checked.
        folder: of the study's file, where paths of configs start.
        machine: overrides of options that depend on the machine, for all arms.
        problems: gets a line for each mistake; one that all arms have, once.
    """
    levels = combine(study)
    loaded = [_load_or_mistakes(study, chosen, folder, machine) for chosen in levels]
    configs = [None if isinstance(found, list) else found for found in loaded]
    mistakes = [found if isinstance(found, list) else [] for found in loaded]
    names = arm_names(levels, [None if c is None else c.to_dict() for c in configs])
    for line in dict.fromkeys(line for lines in mistakes for line in lines):
        owners = [name for name, lines in zip(names, mistakes, strict=True) if line in lines]
        where = "" if len(owners) == len(names) > 1 else f"arm{'s' * (len(owners) > 1)} {'; '.join(owners)}: "
        problems.append(where + line)
    loaded_names = [name for name, config in zip(names, configs, strict=True) if config is not None]
    problems += [
        f"{count} arms have the name {name}: leave one out if they are the same, else name their levels"
        for name, count in Counter(loaded_names).items()
        if count > 1
    ]
    return [Arm(name, config) for name, config in zip(names, configs, strict=True) if config is not None]


def _load_or_mistakes(
    study: Study, levels: Sequence[Level], folder: Path, machine: Sequence[str]
) -> Config | list[str]:
    try:
        return _load(study, levels, folder, machine)
    except ConfigError as error:
        return list(error.problems)
    except FileNotFoundError as error:
        return [str(error)]


def _load(study: Study, levels: Sequence[Level], folder: Path, machine: Sequence[str]) -> Config:
    base = next((level["base"] for level in reversed(levels) if "base" in level), study.base)
    overrides = as_texts(study.overrides or {})
    overrides.append(f"train.precision={study.precision}")
    if study.train_shards is not None:
        overrides.append(f"data.shards={json.dumps(study.train_shards)}")
    # names of parts first: a part replaces that of the study's overrides, and not what another factor sets inside it
    own = sorted((item for level in levels for item in _own(level).items()), key=lambda item: not _names_a_part(*item))
    overrides += [text for item in own for text in as_texts(dict([item]))]
    beside = find_config(base, str(folder))
    config = load_config(beside if os.path.exists(beside) else base, [*overrides, *machine])
    if config.train.precision == "auto":
        raise ConfigError(["train.precision (='auto') must be another: it would differ between machines"])
    return replace(config, train=replace(config.train, seed=min(study.seeds)))


def _names_a_part(key: str, value: Any) -> bool:
    return key.endswith(".name") or (isinstance(value, Mapping) and "name" in value)


def _own(level: Level) -> Overrides:
    """Return the overrides of an arm or a level."""
    return {key: value for key, value in level.items() if key not in OWN_KEYS}


def as_texts(overrides: Overrides) -> list[str]:
    """Return overrides as on a command line: ``key=value`` with the value as JSON, which YAML contains."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]


def arm_names(levels: Sequence[Sequence[Level]], configs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return names of arms: of each level its name, or the values of options in which levels of that place differ.

    Args:
        levels: [arm][factor]
        configs: resolved, of each arm; None for one with mistakes.
    """
    found: list[list[str]] = [[] for _ in levels]
    for place in range(len(levels[0])):
        column = [arm[place] for arm in levels]
        keys = list(dict.fromkeys(key for level in column for key in _keys(level)))
        for arm, (level, config) in enumerate(zip(column, configs, strict=True)):
            text = level.get("name") or _describe(level, config, keys)
            if text:
                found[arm].append(text)
    return [", ".join(texts) or "base" for texts in found]


def _keys(level: Level) -> list[str]:
    return (["base"] if "base" in level else []) + list(flatten(_own(level)))


def _describe(level: Level, config: Mapping[str, Any] | None, keys: Sequence[str]) -> str:
    """Return ``masker=random masker.ratio=0.6``: the values of keys that a resolved config has."""
    if config is None:
        given = [level["base"]] if "base" in level else []
        return " ".join([*given, *as_texts(_own(level))]).replace('"', "") or "base"
    texts = [str(level["base"])] if "base" in level else []
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, Mapping) else ...
        if value is not ... and key != "base":
            shown = value["name"] if isinstance(value, Mapping) and "name" in value else value
            texts.append(f"{key.removesuffix('.name')}={_short(shown)}")
    return " ".join(texts) or "base"


def _short(value: Any) -> str:
    """Return a value as in YAML, without quotation marks."""
    return json.dumps(value, ensure_ascii=False).replace('"', "")
