"""Evaluate any number of networks by any number of protocols on any number of labels.

Each image is read and decoded once, each network sees it once, and all protocols and labels share the features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.distributed.collectives import all_gather_object, run_on_all_ranks
from jepa_kit.evaluation.feature_cache import Arrays, FeatureStore, bar, say
from jepa_kit.evaluation.feature_sources import Feature, Network
from jepa_kit.evaluation.features import has_class_token
from jepa_kit.evaluation.protocols import Built, Spec, build_protocols
from jepa_kit.evaluation.protocols.base import Features, Part, ProbeResult, Task, check_values
from jepa_kit.evaluation.protocols.whitening import Standardising
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.evaluation.tables.table import differing_options
from jepa_kit.rng import IntArray

DEFAULT: tuple[Spec, ...] = ({"name": "logistic", "subsets": ["all"]}, "knn")
"""Protocols without settings of training, for a first look."""
MASK = "mask"
"""The label in rows of protocols that take masks."""

Datasets = tuple[ShardDataset, ShardDataset]
"""Training and test shards."""
Classes = dict[str, tuple[IntArray, IntArray]]
"""Label -> [N] and [M] classes of the training and the test samples."""
_FROM_PROBE = {field.name for field in fields(ProbeResult)} & {field.name for field in fields(Row)}


class _Job(NamedTuple):
    """One protocol for one network and one label; ``variant`` distinguishes protocols of one name."""

    protocol: Built
    variant: str
    network: Network
    label: str


def evaluate(
    networks: Sequence[Network],
    train: ShardDataset,
    test: ShardDataset,
    images: ImageOptions,
    *,
    protocols: Sequence[Spec] = DEFAULT,
    labels: Sequence[str] | None = None,
    layers: str = "last",
    seed: int = 0,
    store: FeatureStore | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[Row]:
    """Evaluate every network by every protocol on every label.

    Args:
        networks: sources of features.
        train, test: labelled shards. Settings of a protocol are chosen on ``train`` alone.
        images: how images are read; ``mean``, ``std`` and ``precision`` are for protocols that train an encoder.
        protocols: names in ``PROTOCOLS``, or mappings with ``name`` and options.
        labels: of the shards; None for all. Protocols of one label, or of masks, do not use it.
        layers: the layer set of protocols that do not choose one themselves.
        seed: of the protocols.
        store: keeps features, and names the processes that share the work: each takes some of the jobs, and all get
            all rows. None keeps features for this call, in one process.
        device: of the protocols' computation.
        progress: print progress to stderr.

    Returns:
        Rows by protocol, then network, then label.

    Raises:
        ValueError: no network or label, two networks of one name, an unknown protocol or label, classes that differ
            between ``train`` and ``test``, or samples that a protocol rejects. Raised on all processes if it is raised
            on one.
    """
    built = build_protocols(protocols)
    names = [network.name for network in networks]
    check_values(
        ("networks", names, 0 < len(names) == len(set(names)), "must be at least one, with names of their own"),
        ("seed", seed, seed >= 0, "must be at least 0"),
    )
    store = store or FeatureStore()
    datasets = train, test
    networks = [one.bind(train, images, store.learned) if one.bind else one for one in networks]
    jobs, classes = _plan(built, networks, datasets, labels)
    _check_jobs(jobs, classes, datasets)
    views = list(dict.fromkeys(view for job in jobs for view in _views(job, layers)))
    show = progress and store.world.is_main
    arrays = [store.extract(views, part, images, progress=show) if views else {} for part in datasets]
    _standardise(views, arrays)
    new_task = partial(Task, layers=layers, seed=seed, device=torch.device(device), images=images)

    def answer_own() -> dict[int, list[Row]]:
        """Return place -> rows of every job of this process: each ``world.size``-th."""
        rows: dict[int, list[Row]] = {}
        known: dict[tuple[object, ...], list[tuple[ProbeResult, float]]] = {}
        own = range(store.world.rank, len(jobs), store.world.size)
        with bar("protocols", len(own), "question", progress) as shown:
            for _, places in groupby(own, lambda place: (id(jobs[place].protocol), jobs[place].network.name)):
                kept: dict[str, Any] = {}
                for place in places:
                    job = jobs[place]
                    parts = [_part(job, layers, datasets[k], arrays[k], classes, k) for k in (0, 1)]
                    task = new_task(train=parts[0], test=parts[1], encoder=job.network.encoder, kept=kept)
                    question = _question(job, layers)
                    if question not in known:
                        known[question] = _answer(job, task, progress)
                    rows[place] = [_row(job, task, *answer) for answer in known[question]]
                    shown.update()
        return rows

    answers = all_gather_object(run_on_all_ranks(answer_own))
    return _sorted([row for _, rows in sorted(pair for own in answers for pair in own.items()) for row in rows])


def _standardise(views: Sequence[tuple[Network, Feature]], arrays: Sequence[Arrays]) -> None:
    """Standardise the features of images of networks that need it, over the training samples."""
    for network, view in views:
        if network.standardised and view.pooling != "none":
            scaled = Standardising(arrays[0][network.name, view])
            for part in arrays:
                part[network.name, view] = scaled(part[network.name, view])


def _part(job: _Job, layers: str, dataset: ShardDataset, arrays: Arrays, classes: Classes, k: int) -> Part:
    """Return the training (k = 0) or test samples (k = 1) as a job's network represents them."""
    features = {
        wanted: Features(*(arrays[job.network.name, view] for view in job.network.views(*wanted)))
        for wanted in job.protocol.probe.wanted(layers)
    }
    return Part(features, classes[job.label][k] if job.label in classes else None, dataset)


def _question(job: _Job, layers: str) -> tuple[object, ...]:
    """Return what decides a job's figures; without layers, poolings that give the same features are one question."""
    name, options, _ = job.protocol
    views = () if job.network.depth else tuple(view for _, view in _views(job, layers))
    asked = {key: value for key, value in options.items() if not (views and key == "pooling")}
    return name, repr(asked), views, job.network.name, job.label


def _answer(job: _Job, task: Task, progress: bool) -> list[tuple[ProbeResult, float]]:
    """Return what a job's protocol finds, and in how many seconds."""
    start = time.perf_counter()
    with _naming(job):
        found = job.protocol.probe(task)
    seconds = time.perf_counter() - start
    figures = ", ".join(f"{one.variant} {100 * one.accuracy:.1f} %".strip() for one in found)
    say(f"{job.protocol.name}, {job.label}, {job.network.name}: {figures}, {seconds:.1f} s", progress)
    return [(one, seconds) for one in found]


@contextmanager
def _naming(job: _Job) -> Iterator[None]:
    """Put a job's protocol, label and network before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        at = f"protocol {job.protocol.name!r}, label {job.label!r}, {job.network.name}"
        raise ValueError(f"{at}: {error}") from error


def _plan(
    built: Sequence[Built], networks: Sequence[Network], datasets: Datasets, labels: Sequence[str] | None
) -> tuple[list[_Job], Classes]:
    """Return the jobs, by protocol, network and label, and the classes of every label that they need."""
    train = datasets[0]
    given = [*train.classes, *train.conflicts] if labels is None else list(labels)
    jobs, needed = [], []
    for one in built:
        name, _, probe = one
        if probe.takes == "masks":
            _check_masks(name, datasets)
            own = [MASK]
        else:
            own = given if probe.label is None else [probe.label]
            if not own:
                raise ValueError(
                    f"labels (=[]) must name at least one; the shards in {train.path} carry none: images in a "
                    "sub-folder for each class have them, and jepa-shards --labels reads them from a table"
                )
            needed += own
        fitting = [n for n in networks if n.encoder is not None or not probe.trains_encoder]
        if not fitting:
            raise ValueError(f"protocol {name!r} trains an encoder, and {', '.join(n.name for n in networks)} has none")
        variant = differing_options(one.options, [other.options for other in built if other.name == name])
        jobs += [_Job(one, variant, network, label) for network in fitting for label in own]
    return jobs, _classes(datasets, list(dict.fromkeys(needed)))


def _check_masks(protocol: str, datasets: Datasets) -> None:
    for part in datasets:
        if part.mask_conflict:
            raise ValueError(f"protocol {protocol!r} needs masks, but {part.mask_conflict}")
        if not part.has_masks:
            raise ValueError(f"protocol {protocol!r} needs masks, and the shards in {part.path} carry none")


def _classes(datasets: Datasets, labels: Sequence[str]) -> Classes:
    train, test = datasets
    known = {label: (train.labels(label), test.labels(label)) for label in labels}
    for label, numbers in known.items():
        ours, theirs = train.classes[label], test.classes[label]
        if theirs != ours[: len(theirs)]:  # foreign test shards may lack the last classes
            raise ValueError(
                f"label (={label!r}) must have the same classes in both: "
                f"{train.path} has {_some(ours)}, {test.path} has {_some(theirs)}"
            )
        if (count := len(np.unique(numbers[0]))) < 2:
            raise ValueError(
                f"label (={label!r}) must have samples of at least 2 classes in {train.path}, which has those of "
                f"{count}; --label with the others leaves it out"
            )
    return known


def _some(classes: Sequence[str], most: int = 5) -> str:
    rest = ", ..." if len(classes) > most else ""
    return f"{len(classes)} ({', '.join(classes[:most])}{rest})"


def _check_jobs(jobs: Sequence[_Job], classes: Classes, datasets: Datasets) -> None:
    """Raise ValueError for labels that a protocol cannot use, before any image is read."""
    train, test = datasets
    for job in jobs:
        check = getattr(job.protocol.probe, "check", None)
        if check is not None and job.label in classes:
            with _naming(job):
                check(classes[job.label][0], train.key)
    for label, (ours, theirs) in classes.items():
        if len(unknown := np.setdiff1d(theirs, ours)):
            name = train.classes[label][unknown[0]]
            raise ValueError(f"label (={label!r}): {test.path} has samples of {name!r}, and {train.path} none")


def _views(job: _Job, layers: str) -> Iterator[tuple[Network, Feature]]:
    """Yield the arrays of features that a job needs."""
    name, _, probe = job.protocol
    fits = "--layers last" if probe.takes_layers else f"--protocol '{{name: {name}, layers: [last]}}'"
    for wanted in probe.wanted(layers):
        if wanted.pooling == "class" and not has_class_token(job.network.encoder):
            fits = "pooling: mean"
        try:
            views = job.network.views(*wanted)
        except ValueError as error:
            raise ValueError(f"protocol {name!r}, {job.network.name}: {error}; {fits} fits any encoder") from error
        yield from ((job.network, view) for view in views)


def _row(job: _Job, task: Task, found: ProbeResult, seconds: float) -> Row:
    sets = job.protocol.probe.wanted(task.layers)
    figures: dict[str, Any] = {name: getattr(found, name) for name in _FROM_PROBE}
    return Row(
        network=job.network.name,
        layers=(", ".join(one.layers for one in sets) or None) if job.network.depth else None,
        pooling=job.network.pooling_of(sets[0].pooling) if sets else None,
        seed=job.network.seed,
        width=max((features.width for features in task.train.features.values()), default=0),
        label=job.label,
        seconds=round(seconds, 3),
        options=dict(job.protocol.options),
        **(figures | {"variant": f"{found.variant} {job.variant}".strip()}),
    )


def _sorted(rows: list[Row]) -> list[Row]:
    """Return rows by protocol and variant, then network, then label, each in order of its first occurrence."""
    titles, networks = list(dict.fromkeys(r.title for r in rows)), list(dict.fromkeys(r.network for r in rows))
    return sorted(rows, key=lambda r: (titles.index(r.title), networks.index(r.network)))
