"""From the file of a study to its cells and baselines, all checked before the first one starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from jepa_kit.config import Config
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import brief, identity
from jepa_kit.engine.build import open_shards, training_views
from jepa_kit.errors import ConfigError
from jepa_kit.evaluation.feature_sources import BASELINES
from jepa_kit.evaluation.features import has_class_token, layer_numbers
from jepa_kit.evaluation.shard_choice import Shards, held_out
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Encoder
from jepa_kit.planning.planner import training_flop_per_image
from jepa_kit.registry import did_you_mean
from jepa_kit.studies.arms import Arm, load_arms
from jepa_kit.studies.cells import Job, Plan, place_of
from jepa_kit.studies.identity import baseline_digest, cell_digest, evaluation_digest
from jepa_kit.studies.matching import Length, matched_length, own_length, with_length
from jepa_kit.studies.records import read_data
from jepa_kit.studies.spec import Protocol, Study, read_study, study_protocols
from jepa_kit.trials.contract import check_parts

CPU = torch.device("cpu")


def plan_study(file: str | Path, machine: Sequence[str] = (), results: Path | None = None) -> Plan:
    """Read a study, check all of its cells and return them.

    Args:
        file: of the study.
        machine: overrides of options that depend on the machine.
        results: folder with the identities of shards that are not on this machine.

    Raises:
        ConfigError: with every mistake of the study, of all configs and of all protocols.
    """
    path = Path(file)
    study = read_study(path)
    problems: list[str] = []
    protocols = study_protocols(study, problems)
    problems += [
        f"baselines (={name!r}) must be of {', '.join(BASELINES)}{did_you_mean(name, BASELINES)}"
        for name in study.baselines or ()
        if name not in BASELINES
    ]
    arms = load_arms(study, path.absolute().parent, machine, problems)
    known = read_data(results) if results is not None else {}
    data: dict[str, Any] = {}
    train = test = None
    if arms:
        train = arms[0].config.data.shards
        test = study.test_shards or (None if train is None else held_out(train))
        places = dict.fromkeys([train, test, *(arm.config.data.shards for arm in arms)])
        for place in places:
            if place is None:
                problems.append(
                    "test_shards must name a folder: there is no test or val beside the training shards"
                    if train is not None
                    else "train_shards must name a folder of shards, as the base config has none"
                )
            else:
                _identify(place, arms[0].config, known, data, problems)
    lengths = _check_arms(arms, study, data, protocols, problems)
    if data and test is not None and place_of(test) in data:
        _check_labels(study, protocols, data[place_of(test)], problems)
        if train is not None and data.get(place_of(train)) == data[place_of(test)]:
            problems.append(f"test_shards (={test}) must be others than the training shards, {train}")
    if problems or train is None or test is None:
        raise ConfigError(list(dict.fromkeys(problems)), str(file))
    _check_different(arms, data, problems)
    if problems:
        raise ConfigError(problems, str(file))
    arms = [replace(arm, config=with_length(arm.config, length)) for arm, length in zip(arms, lengths, strict=True)]
    shards = {"train": data[place_of(train)], "test": data[place_of(test)]}
    evaluations = {evaluation_digest(p.core, p.layers, study.protocol_seed, study.labels, shards): p for p in protocols}
    return Plan(
        study=study,
        name=path.stem,
        arms=arms,
        lengths=lengths,
        cells=[_cells(arm, length, study, data, evaluations) for arm, length in zip(arms, lengths, strict=True)],
        baselines=_baselines(arms, study, evaluations),
        train=train,
        test=test,
        data=data,
    )


def _identify(
    place: Shards, config: Config, known: Mapping[str, Any], data: dict[str, Any], problems: list[str]
) -> None:
    """Add the identity of shards to ``data``: as they are here, or as ``known`` if they are elsewhere."""
    try:
        dataset = open_shards(config, place)
    except (ValueError, OSError) as error:
        if place_of(place) in known:
            data[place_of(place)] = known[place_of(place)]
        else:
            problems.append(str(error))
        return
    data[place_of(place)] = identity_of(dataset)


def identity_of(dataset: ShardDataset) -> dict[str, Any]:
    """Return the identity of shards, wherever they are, with their labels and whether they have masks."""
    return {**brief(identity(dataset.shards)), "labels": sorted(dataset.classes), "masks": dataset.has_masks}


def _check_different(arms: Sequence[Arm], data: Mapping[str, Any], problems: list[str]) -> None:
    """Add a line for each arm whose cells are those of an arm before it."""
    before: dict[str, str] = {}
    for arm in arms:
        assert arm.config.data.shards is not None
        cell = cell_digest(arm.config, data[place_of(arm.config.data.shards)])
        first = before.setdefault(cell, arm.name)
        if first != arm.name:
            problems.append(
                f"arm {arm.name} has the same config as {first}: leave one (overrides of a part with "
                "the same name keep its other options)"
            )


def _check_labels(study: Study, protocols: Sequence[Protocol], shards: Mapping[str, Any], problems: list[str]) -> None:
    known = shards["labels"]
    problems += [
        f"labels (={label!r}) must be of the shards': {', '.join(known) or 'none'}"
        for label in study.labels or ()
        if label not in known
    ]
    problems += [
        f"protocol {protocol.title} needs shards with masks, and test_shards have none"
        for protocol in protocols
        if protocol.takes_masks and not shards["masks"]
    ]


def _check_arms(
    arms: Sequence[Arm], study: Study, data: Mapping[str, Any], protocols: Sequence[Protocol], problems: list[str]
) -> list[Length]:
    """Return the lengths of all arms; what their parts refuse, and what cannot be matched, is added to ``problems``."""
    lengths: list[Length] = []
    for arm in arms:
        config = arm.config
        try:
            check_parts(config, CPU)
            training_views(config)
            with torch.device("meta"):
                encoder = cast(Encoder, build_recipe(config).encoder)
            for protocol in protocols:
                _check_features(protocol, encoder)
            place = None if config.data.shards is None else data.get(place_of(config.data.shards))
            if place is not None:
                lengths.append(own_length(config, place["samples"], training_flop_per_image(config)))
        except ConfigError as error:
            problems += [f"arm {arm.name}: {line}" for line in error.problems]
        except ValueError as error:
            problems.append(f"arm {arm.name}: {error}")
    if problems or len(lengths) < len(arms):
        return lengths
    return [_matched(arm, length, lengths[0], study, problems) for arm, length in zip(arms, lengths, strict=True)]


def _check_features(protocol: Protocol, encoder: Encoder) -> None:
    """Raise ValueError for layers or a class token that the encoder does not have."""
    for layers, pooling in protocol.wanted:
        try:
            layer_numbers(layers, encoder.depth)
        except ValueError as error:
            raise ValueError(f"protocol {protocol.title}: {error}") from error
        if pooling == "class" and not has_class_token(encoder):
            raise ValueError(f"protocol {protocol.title}: pooling (='class') needs an encoder with a class token")


def _matched(arm: Arm, length: Length, base: Length, study: Study, problems: list[str]) -> Length:
    try:
        return matched_length(length, base, study.match)
    except ValueError as error:
        problems.append(f"arm {arm.name}: {error}")
        return length


def _cells(
    arm: Arm, length: Length, study: Study, data: Mapping[str, Any], evaluations: Mapping[str, Protocol]
) -> list[Job]:
    assert arm.config.data.shards is not None
    shards, cells = data[place_of(arm.config.data.shards)], []
    for seed in study.seeds:
        config = replace(arm.config, train=replace(arm.config.train, seed=seed))
        cells.append(
            Job(
                id=cell_digest(config, shards),
                kind="cell",
                title=arm.name,
                seed=seed,
                config=config,
                length=length,
                evaluations=evaluations,
            )
        )
    return cells


def _baselines(arms: Sequence[Arm], study: Study, evaluations: Mapping[str, Protocol]) -> list[Job]:
    """Return each baseline once: one network for arms with one encoder, images and first seed."""
    found: dict[str, Job] = {}
    for name in BASELINES if study.baselines is None else study.baselines:
        fitting = {key: p for key, p in evaluations.items() if name == "untrained" or not p.trains_encoder}
        of_patches = any(pooling == "none" for p in fitting.values() for _, pooling in p.wanted)
        for number, arm in enumerate(arms):
            job = Job(
                id=baseline_digest(name, arm.config, of_patches=of_patches),
                kind="baseline",
                title=name,
                baseline=name,
                seed=arm.config.train.seed,
                config=arm.config,
                length=None,
                evaluations=fitting,
            )
            if any(other.baseline == name for other in found.values()):
                job = replace(job, title=f"{name} ({arm.name})")
            job = found.get(job.id, job)
            found[job.id] = replace(job, arms=(*job.arms, number))
    return [job for job in found.values() if job.evaluations]
