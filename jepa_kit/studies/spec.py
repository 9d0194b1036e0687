"""The file of a study: what is compared, how often, at which cost, and by which protocols."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jepa_kit.config.check import check_part, check_section
from jepa_kit.config.load import parse_yaml
from jepa_kit.config.section import Section, at_least, option
from jepa_kit.errors import ConfigError
from jepa_kit.studies.identity import part_essentials

Match = Literal["none", "steps", "images", "flops"]
Overrides = Mapping[str, Any]
"""Keys of a config, with dots if they are inside a section or part, and their values."""

OWN_KEYS = ("name", "base")
"""Keys of an arm or a level that are not overrides."""
DERIVED = ("train.epochs", "train.steps_per_epoch")
"""Options that ``match`` sets."""


@dataclass(frozen=True, kw_only=True)
class Study(Section):
    """A study, as its file has it.

    Args:
        base: a config: a path, relative to the study's file or to the present folder, or the name of one in projects/.
        overrides: of the base, for all arms.
        factors: name -> levels; each level has overrides, and perhaps a ``name`` and another ``base``. Every
            combination of levels is an arm; the first level of each factor is the base arm's.
        arms: instead of factors: the arms themselves, the base arm first.
        seeds: of the runs of each arm.
        match: what all arms have in common with the base arm: "steps", "images" or "flops"; the number of steps of each
            arm follows. "none": each config's own length.
        precision: of matrix products in training and evaluation; ``auto`` would differ between machines.
        train_shards: of all runs and of the protocols' training; None for the configs' ``data.shards``.
        test_shards: of the protocols; None for ``test`` or ``val`` beside the training shards.
        protocols: as for tools/eval_net.py, each with its options; ``layers`` is the layer set of a protocol without an
            option of this name.
        labels: of the shards; None for all.
        baselines: networks that learn nothing, evaluated once; None for all.
        protocol_seed: of the protocols.

    Raises:
        ConfigError: a value is outside its range.
    """

    base: str = option("the name or path of a config", bool)
    overrides: Mapping[str, Any] | None = None
    factors: Mapping[str, Any] | None = option("at least one", bool, None)
    arms: Sequence[Any] | None = option("at least one", bool, None)
    seeds: tuple[int, ...] = option(
        "at least one, different and not negative",
        lambda x: len(x) == len(set(x)) > 0 and min(x) >= 0,
    )
    match: Match = "steps"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    train_shards: str | None = option("a path", bool, None)
    test_shards: str | None = option("a path", bool, None)
    protocols: Sequence[str | Mapping[str, Any]] = option("at least one", bool)
    labels: Sequence[str] | None = option("at least one", bool, None)
    baselines: Sequence[str] | None = None
    protocol_seed: int = at_least(0, 0)

    @classmethod
    def out_of_range(cls, values: Mapping[str, Any]) -> list[str]:
        """Return a message for each value that is out of range, and for each arm or level that is no mapping."""
        problems = super().out_of_range(values)
        for factor, levels in (values.get("factors") or {}).items():
            if isinstance(levels, list | tuple) and levels:
                problems += _level_problems(f"factors.{factor}", factor, levels)
            else:
                right = f"a list of levels, at least one, each {_right_level(factor, levels)}"
                problems.append(f"factors.{factor} (={levels!r}) must be {right}")
        return problems + _level_problems("arms", "", values.get("arms") or ())

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """Return problems between values that are valid alone."""
        problems = []
        if (values["factors"] is None) == (values["arms"] is None):
            problems.append("factors or arms must be given, and not both: what is compared")
        places = {"overrides": values["overrides"] or {}}
        places |= {f"arms[{i}]": arm for i, arm in enumerate(values["arms"] or ())}
        for factor, levels in (values["factors"] or {}).items():
            places |= {f"factors.{factor}[{i}]": level for i, level in enumerate(levels)}
        for place, given in places.items():
            problems += _override_problems(place, given, values["match"])
        return problems + _shared_keys(values["factors"] or {})


def _level_problems(place: str, factor: str, levels: Sequence[Any]) -> list[str]:
    """Return a message for each arm or level that is no mapping."""
    return [
        f"{place}[{i}] (={level!r}) must be {_right_level(factor, level)}"
        for i, level in enumerate(levels)
        if not isinstance(level, Mapping)
    ]


def _right_level(factor: str, wrong: Any) -> str:
    """Return what a level must be, with what ``wrong`` probably means as the example."""
    key, equals, value = wrong.partition("=") if isinstance(wrong, str) else ("", "", "")
    example = f"{key}: {value}" if equals else "masker.ratio: 0.6"
    if "." in factor and isinstance(wrong, str | int | float) and not equals:
        example = f"{factor}: {json.dumps(wrong)}"
    return f"a mapping of overrides, such as {{{example}}}, or {{}} for the base as it is"


def _override_problems(place: str, given: Mapping[Any, Any], match: Match) -> list[str]:
    """Return problems of one mapping of overrides."""
    problems = [
        f"{place}.{key} (={given[key]!r}) must be text"
        for key in OWN_KEYS
        if key in given and (place == "overrides" or not isinstance(given[key], str) or not given[key])
    ]
    for key in flatten({key: value for key, value in given.items() if key not in OWN_KEYS}):
        if key == "train.seed":
            problems.append(f"{place}: train.seed must be left out: seeds are those of the study")
        if key == "train.output_dir":
            problems.append(f"{place}: train.output_dir must be left out: each run has a folder of the study's output")
        if key in DERIVED and match != "none" and place != "overrides":
            problems.append(f"{place}: {key} must be left out, as match (={match}) sets it; match: none keeps it")
    return problems


def _shared_keys(factors: Mapping[str, Sequence[Overrides]]) -> list[str]:
    """Return a message for each key that two factors set to different values, or that one sets inside another's value.

    An arm has a level of each factor, so one of the two would have no effect. Equal values are no mistake: both factors
    may write ``masker.name``.
    """
    problems: dict[tuple[str, ...], str] = {}
    for (one, levels), (other, others) in itertools.combinations(factors.items(), 2):
        for (i, level), (j, beside) in itertools.product(enumerate(levels), enumerate(others)):
            for (key, value), (inner, changed) in itertools.product(_settings(level), _settings(beside)):
                if (value != changed) if key == inner else _hides(key, value, inner) or _hides(inner, changed, key):
                    problems.setdefault(
                        (one, other, key, inner),
                        f"factors.{one}[{i}] sets {key} (={value!r}) and factors.{other}[{j}] sets {inner} "
                        f"(={changed!r}), but an arm can have only one of them: set it in one factor, or list the arms "
                        "(arms) in place of factors",
                    )
    return list(problems.values())


def _settings(level: Overrides) -> list[tuple[str, Any]]:
    """Return the dotted keys that a level sets, ``base`` too, with their values."""
    return [*flatten({key: value for key, value in level.items() if key != "name"}).items()]


def _hides(key: str, value: Any, other: str) -> bool:
    """Return whether a value has no place for another key: null and lists have none, and {} leaves the base's."""
    return value != {} and other.startswith(f"{key}.")


def flatten(overrides: Overrides, above: str = "") -> dict[str, Any]:
    """Return all values by dotted keys: {"train": {"epochs": 1}, "optim.lr": 1} -> train.epochs and optim.lr."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        path = f"{above}{key}"
        found |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found


@dataclass(frozen=True)
class Protocol:
    """A protocol of a study.

    Args:
        title: what a table calls it.
        spec: its name with the options that the study gives.
        core: its name with the options that differ from their defaults.
        layers: the layer set, for a protocol that takes one.
        wanted: (layer set, pooling) of the features that it needs.
        takes_masks: whether it needs shards with masks.
        trains_encoder: whether it needs an encoder, and so leaves out raw pixels.
    """

    title: str
    spec: Mapping[str, Any]
    core: Mapping[str, Any]
    layers: str
    wanted: Sequence[tuple[str, str]]
    takes_masks: bool
    trains_encoder: bool


METHODS = {"logistic": "logistic regression", "linear": "linear probe", "knn": "nearest neighbours"}
"""What a title calls a protocol, if not by its name."""
NUMBERS = dict(enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine"), 2))


def protocol_title(spec: Mapping[str, Any], layers: str | None) -> str:
    """Return what a table calls a protocol: "logistic regression on the last four layers, all labels".

    Args:
        spec: its name with the options that a study gives.
        layers: the layer set; None for a protocol that takes none.
    """
    title = METHODS.get(spec["name"], spec["name"].replace("_", " "))
    if layers is not None:
        count = layers.removeprefix("last")
        named = f"the last {NUMBERS.get(int(count), count)} layers" if count.isdigit() else f"layers {layers}"
        title += " on the last layer" if layers in ("last", "last1") else f" on {named}"
    given = [
        "all labels" if (key, value) == ("subsets", ["all"]) else f"{key} {_plain_list(value)}"
        for key, value in spec.items()
        if key != "name"
    ]
    return ", ".join([title, *given])


def _plain_list(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read_study(file: str | os.PathLike[str]) -> Study:
    """Read and check the file of a study, without its configs.

    Raises:
        ConfigError: with every mistake.
        FileNotFoundError: there is no such file.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a study is a YAML file (docs/studies.md)")
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    problems: list[str] = []
    study: Study | None = check_section("study", raw, problems, Study)
    if study is None:
        raise ConfigError([problem.removeprefix("study.") for problem in problems], str(path))
    return study


def study_protocols(study: Study, problems: list[str]) -> list[Protocol]:
    """Return the protocols of a study; mistakes are added to ``problems``."""
    from jepa_kit.evaluation.protocols import PROTOCOLS, build_protocols  # it imports scikit-learn

    found: list[Protocol] = []
    for number, entry in enumerate(study.protocols):
        spec = {"name": entry} if isinstance(entry, str) else dict(entry)
        path, layers = f"protocols[{number}]", "last"
        name = spec.get("name")
        if isinstance(name, str) and name in PROTOCOLS and "layers" not in PROTOCOLS.options(name):
            layers = spec.pop("layers", layers)
        own: list[str] = []
        part = check_part(path, spec, PROTOCOLS, own)
        if part is None or own:
            problems += own
            continue
        try:
            built = build_protocols([spec])[0]
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        if layers != "last" and not built.probe.takes_layers:
            problems.append(f"{path}.layers (={layers!r}) has no effect: {name!r} does not take layers")
        title = protocol_title(spec, layers if built.probe.takes_layers else None)
        if title in [protocol.title for protocol in found]:
            problems.append(f"{path} (={title}) is in the list already")
        core = part_essentials(PROTOCOLS, part)
        wanted = [(one.layers, one.pooling) for one in built.probe.wanted(layers)]
        masks = built.probe.takes == "masks"
        found.append(Protocol(title, spec, core, layers, wanted, masks, built.probe.trains_encoder))
    return found
