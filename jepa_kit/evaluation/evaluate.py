"""Any number of networks, protocols and labels in one table.

Each image is read and decoded once, each network sees it once, and all protocols and labels share the features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa_kit.config import DataConfig
from jepa_kit.data.images import MAX_PIXELS
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms.decoders import DecoderName
from jepa_kit.distributed.collectives import World, all_gather_object, run_on_all_ranks
from jepa_kit.evaluation.feature_cache import Arrays, FeatureStore, bar, say
from jepa_kit.evaluation.feature_sources import ENCODERS, Network
from jepa_kit.evaluation.feature_sources import run_networks as run_networks
from jepa_kit.evaluation.protocols import (
    Features,
    Images,
    Part,
    Probe,
    ProbeResult,
    Spec,
    Task,
    build_protocols,
)
from jepa_kit.evaluation.tables.results import Row as Row
from jepa_kit.evaluation.tables.results import results as results
from jepa_kit.evaluation.tables.results import write_results as write_results
from jepa_kit.rng import IntArray
from jepa_kit.structures import Precision

DEFAULT: tuple[Spec, ...] = ({"name": "logistic", "subsets": ["all"]}, "knn")
"""Protocols without settings of training, for a first look."""
MASK = "mask"
"""What stands for a label in rows of protocols that take masks."""


_FROM_PROBE = {field.name for field in fields(ProbeResult)} & {field.name for field in fields(Row)}


class _Job(NamedTuple):
    name: str
    options: dict[str, Any]
    variant: str
    probe: Probe
    network: Network
    label: str


def evaluate(
    networks: Sequence[Network],
    train: ShardDataset,
    test: ShardDataset,
    *,
    image_size: tuple[int, int],
    protocols: Sequence[Spec] = DEFAULT,
    labels: Sequence[str] | None = None,
    layers: str = "last",
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    mean: Sequence[float] = DataConfig.mean,
    std: Sequence[float] = DataConfig.std,
    decoder: DecoderName = "pillow",
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    store: FeatureStore | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
    progress: bool = False,
) -> list[Row]:
    """Every network under every protocol on every label.

    Args:
        networks: what features come from.
        train, test: labelled shards. Settings of a protocol are chosen inside ``train``.
        image_size: (h, w) of the centre crop.
        protocols: names in ``PROTOCOLS``, or mappings with ``name`` and options.
        labels: of the shards; None takes all of them. A protocol that is about one label takes that one, and one that
            takes masks takes these.
        layers: the layer set of protocols that do not choose one themselves.
        seed: of the protocols.
        batch_size, num_workers: of the reading.
        mean, std: of the channels, for protocols that train an encoder.
        decoder, max_pixels: of the reading, see ``jepa_kit.data.transforms.View``.
        precision: of the matrix products, for protocols that train an encoder.
        store: where features are kept; None keeps them for this call.
        device: where protocols work.
        world: of several processes, each takes its share of the jobs, and all get all rows.
        progress: says on stderr what is being done.

    Returns:
        Rows by protocol, then network, then label.

    Raises:
        ValueError: no network or label, or two networks of one name; an unknown protocol or label; classes that
            differ between ``train`` and ``test``; what a protocol refuses, named with its label and network. All
            processes raise where one does.
    """
    built = build_protocols(protocols)
    _check_networks(networks, seed)
    world = world or World()
    jobs, known = _jobs(built, networks, train, test, labels)
    images = Images(
        image_size=image_size,
        mean=mean,
        std=std,
        batch_size=batch_size,
        num_workers=num_workers,
        decoder=decoder,
        max_pixels=max_pixels,
        precision=precision,
    )
    for job in jobs:
        check = getattr(job.probe, "check", None)
        if check is not None and job.label in known:
            with _named(job):
                check(known[job.label][0], train.key)
    for label, (ours, theirs) in known.items():
        if len(unknown := np.setdiff1d(theirs, ours)):
            name = train.classes[label][unknown[0]]
            raise ValueError(f"label (={label!r}): {test.path} has samples of {name!r}, and {train.path} none")
    wanted = list(dict.fromkeys(view for job in jobs for view in _views(job, layers)))
    store = store or FeatureStore()
    arrays = [
        store.extract(
            wanted,
            part,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            decoder=decoder,
            max_pixels=max_pixels,
            progress=progress and world.is_main,
        )
        if wanted
        else {}
        for part in (train, test)
    ]

    def ask(job: _Job) -> list[Row]:
        parts = [
            Part(_features(job, layers, held), known[job.label][k] if job.label in known else None, dataset)
            for k, (held, dataset) in enumerate(zip(arrays, (train, test), strict=True))
        ]
        task = Task(
            train=parts[0],
            test=parts[1],
            layers=layers,
            seed=seed,
            device=torch.device(device),
            encoder=job.network.encoder,
            images=images,
        )
        start = time.perf_counter()
        with _named(job):
            found = job.probe(task)
        seconds = time.perf_counter() - start
        figures = ", ".join(f"{one.variant} {100 * one.accuracy:.1f} %".strip() for one in found)
        say(f"{job.name}, {job.label}, {job.network.name}: {figures}, {seconds:.1f} s", progress)
        return [_row(job, layers, task, one, seconds) for one in found]

    found = [
        job
        for share in all_gather_object(run_on_all_ranks(lambda: _share(jobs, ask, world, progress)))
        for job in share
    ]
    return _in_order([row for _, rows in sorted(found, key=lambda one: one[0]) for row in rows])


@contextmanager
def _named(job: _Job) -> Iterator[None]:
    """What a protocol refuses, with the question that it was asked."""
    try:
        yield
    except ValueError as error:
        asked = f"protocol {job.name!r}, label {job.label!r}, {job.network.name}"
        raise ValueError(f"{asked}: {error}") from error


def _share(
    jobs: Sequence[_Job], ask: Callable[[_Job], list[Row]], world: World, progress: bool
) -> list[tuple[int, list[Row]]]:
    """(place, rows) of the jobs of this process."""
    rows = []
    mine = range(world.rank, len(jobs), world.size)
    with bar("protocols", len(mine), "question", progress) as shown:
        for place in mine:
            rows.append((place, ask(jobs[place])))
            shown.update()
    return rows


def _check_networks(networks: Sequence[Network], seed: int) -> None:
    names = [network.name for network in networks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"networks (={names}) must be at least one, with names of their own")
    if seed < 0:
        raise ValueError(f"seed (={seed}) must be at least 0")


def _jobs(
    built: Sequence[tuple[str, dict[str, Any], Probe]],
    networks: Sequence[Network],
    train: ShardDataset,
    test: ShardDataset,
    labels: Sequence[str] | None,
) -> tuple[list[_Job], dict[str, tuple[IntArray, IntArray]]]:
    """The questions, and label -> the classes of the training and of the test samples."""
    asked = [*train.classes, *train.conflicts] if labels is None else list(labels)
    jobs, needed = [], []
    for (name, options, probe), variant in zip(built, _variants(built), strict=True):
        if probe.takes == "masks":
            for part in (train, test):
                if part.mask_conflict:
                    raise ValueError(f"protocol {name!r} needs masks, but {part.mask_conflict}")
                if not part.has_masks:
                    raise ValueError(f"protocol {name!r} needs masks, and the shards in {part.path} carry none")
            mine = [MASK]
        else:
            mine = asked if probe.label is None else [probe.label]
            if not mine:
                raise ValueError(f"labels (=[]) must name at least one; the shards in {train.path} carry none")
            needed += mine
        fitting = [n for n in networks if n.encoder is not None or not probe.trains_encoder]
        if not fitting:
            raise ValueError(f"protocol {name!r} trains an encoder, and {', '.join(n.name for n in networks)} has none")
        jobs += [_Job(name, dict(options), variant, probe, network, label) for network in fitting for label in mine]
    return jobs, _labels(train, test, list(dict.fromkeys(needed)))


def _variants(built: Sequence[tuple[str, dict[str, Any], Probe]]) -> list[str]:
    """For protocols that are asked for several times, the options that tell them apart; else nothing."""
    return [told_apart(options, [theirs for other, theirs, _ in built if other == name]) for name, options, _ in built]


def told_apart(options: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The options that differ from those of any other, as ``k=5 temperature=0.1``."""
    told = {key: json.dumps(value) for key, value in options.items()}
    differing = [key for key in told if any(json.dumps(theirs.get(key)) != told[key] for theirs in others)]
    return " ".join(f"{key}={told[key]}" for key in differing).replace('"', "")


def _labels(train: ShardDataset, test: ShardDataset, labels: Sequence[str]) -> dict[str, tuple[IntArray, IntArray]]:
    known = {label: (train.labels(label), test.labels(label)) for label in labels}
    for label in known:
        ours, theirs = train.classes[label], test.classes[label]
        if theirs != ours[: len(theirs)]:  # foreign test shards may lack the last classes
            raise ValueError(
                f"label (={label!r}) must have the same classes in both: "
                f"{train.path} has {_some(ours)}, {test.path} has {_some(theirs)}"
            )
        if (count := len(np.unique(known[label][0]))) < 2:
            raise ValueError(
                f"label (={label!r}) must have samples of at least 2 classes in {train.path}, which has those of "
                f"{count}; --label with the others leaves it out"
            )
    return known


def _some(classes: Sequence[str], most: int = 5) -> str:
    rest = ", ..." if len(classes) > most else ""
    return f"{len(classes)} ({', '.join(classes[:most])}{rest})"


def _views(job: _Job, layers: str) -> Iterator[tuple[Network, Any]]:
    try:
        for wanted in job.probe.wanted(layers):
            yield from ((job.network, view) for view in job.network.views(*wanted))
    except ValueError as error:
        fits = "--layers last" if job.probe.takes_layers else f"--protocol '{{name: {job.name}, layers: [last]}}'"
        raise ValueError(f"protocol {job.name!r}, {job.network.name}: {error}; {fits} fits any encoder") from error


def _features(job: _Job, layers: str, arrays: Arrays) -> dict[Any, Features]:
    return {
        wanted: Features(*(arrays[job.network.name, view] for view in job.network.views(*wanted)))
        for wanted in job.probe.wanted(layers)
    }


def _row(job: _Job, layers: str, task: Task, found: ProbeResult, seconds: float) -> Row:
    sets = job.probe.wanted(layers)
    has_layers = job.network.depth > 0
    return Row(
        network=job.network.name,
        layers=", ".join(one.layers for one in sets) if has_layers and sets else None,
        pooling=sets[0].pooling if has_layers and sets else None,
        seed=job.network.seed,
        width=max((features.width for features in task.train.features.values()), default=0),
        label=job.label,
        seconds=round(seconds, 3),
        options=job.options,
        **(
            {name: getattr(found, name) for name in _FROM_PROBE} | {"variant": f"{found.variant} {job.variant}".strip()}
        ),
    )


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """By protocol and variant, then network, then label, each in the order in which it comes first."""
    titles, networks = list(dict.fromkeys(r.title for r in rows)), list(dict.fromkeys(r.network for r in rows))
    return sorted(rows, key=lambda r: (titles.index(r.title), networks.index(r.network)))


def format_table(rows: Sequence[Row]) -> str:
    """Figures in percent with their errors, as a table that is also Markdown; a cell without a figure is empty.

    The error is that of the test set's length, or, where a figure is the mean of several draws, their deviation.
    """
    columns = list(dict.fromkeys(row.column for row in rows))
    cells = {(row.title, row.network, row.column): row for row in rows}
    lines = [["protocol", "features", "width", *columns]]
    for title, network in dict.fromkeys((row.title, row.network) for row in rows):
        held = [cells.get((title, network, column)) for column in columns]
        first = next(row for row in held if row is not None)
        found = [f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}" if row else "" for row in held]
        lines.append([title, describe(first.network, first.layers), str(first.width or ""), *found])
    chances = [np.unique([round(row.chance, 6) for row in rows if row.column == column]) for column in columns]
    lines.append(["", "chance", "", *(f"{100 * values[0]:.1f}" if len(values) == 1 else "" for values in chances)])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as an aligned table; the first line is the heading."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )


def describe(network: str, layers: str | None) -> str:
    """What a reader calls a network: 'target encoder, last4'."""
    name = f"{network} encoder" if network in ENCODERS else network
    if layers in (None, "last"):
        return name
    return f"{name}, best of {layers}" if "," in str(layers) else f"{name}, {layers}"


def plain_options(built: Sequence[tuple[str, Mapping[str, Any], Probe]]) -> list[dict[str, Any]]:
    """The protocols of a call (from ``build_protocols``) with all their options, the defaults too, for JSON."""
    return [{"name": name} | dict(options) for name, options, _ in built]
