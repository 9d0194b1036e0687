"""Any number of networks, protocols and labels: one table for people, one file for programs.

Each image is read and decoded once, each network sees it once, and all protocols and labels share the features.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from jepa_kit.config import versions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards import ShardDataset
from jepa_kit.evaluation.features import (
    Float32,
    LoadedRun,
    Source,
    encoder_source,
    extract_all,
    latest_checkpoint,
    pixel_features,
    untrained_encoder,
)
from jepa_kit.evaluation.probes import PROTOCOLS, ProbeResult
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray

BASELINES = ("untrained", "pixels")
ENCODERS: tuple[Literal["target"], Literal["context"]] = ("target", "context")
FORMAT = "jepa_kit evaluation/1"


@dataclass(frozen=True, eq=False)
class Network:
    """What features come from.

    Args:
        name: ``target``, ``context``, ``untrained``, ``pixels``, or any other; one of its own in a table.
        source: images to features [B, D].
        layers, pooling: how an encoder's tokens became a feature; None where there are none.
        seed: of the weights of an untrained network.
    """

    name: str
    source: Source
    layers: str | None = None
    pooling: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Row:
    """One network under one protocol on one label; accuracies in [0, 1].

    Args:
        network, layers, pooling, seed: see ``Network``.
        width: D, of its features.
        protocol, accuracy, validation, settings, n_train, n_test, classes, chance: see ``ProbeResult``.
        standard_error: of the accuracy, over test sets of this length.
        label: whose classes were told apart.
    """

    network: str
    layers: str | None
    pooling: str | None
    seed: int | None
    width: int
    protocol: str
    label: str
    accuracy: float
    standard_error: float
    chance: float
    validation: float
    classes: int
    n_train: int
    n_test: int
    settings: dict[str, Any]


_FROM_PROBE = {field.name for field in fields(ProbeResult)} & {field.name for field in fields(Row)}


def run_networks(
    run: LoadedRun,
    *,
    encoders: Sequence[Literal["target", "context"]] = ("target",),
    layers: str = "last",
    baselines: Sequence[str] = BASELINES,
    untrained_seed: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Network]:
    """The networks of a run, and the baselines beside them.

    Args:
        run: images are normalised as its config says, matrix products have its precision.
        encoders: of ``target`` (the paper's choice) and ``context``.
        layers: see ``extract_features``.
        baselines: of ``untrained`` (the same network with fresh weights) and ``pixels`` (averaged down to 16 x 16).
        untrained_seed: of the fresh weights; None takes the run's, so that they are those that it began with.
        device: where the encoders run.

    Raises:
        ValueError: an unknown encoder or baseline, one given twice, or layers that the encoder does not have.
    """
    for kind, names, known in (("encoders", encoders, ENCODERS), ("baselines", baselines, BASELINES)):
        _check_names(kind, names, known)
    config = run.config
    seed = config.train.seed if untrained_seed is None else untrained_seed
    found: dict[str, tuple[Any, int | None]] = {name: (run.jepa.encoder_for(name), None) for name in encoders}
    if "untrained" in baselines:
        found["untrained"] = untrained_encoder(config, seed), seed
    networks = [
        Network(
            name,
            encoder_source(
                encoder,
                layers=layers,
                device=device,
                precision=config.train.precision,
                mean=config.data.mean,
                std=config.data.std,
            ),
            layers=layers,
            pooling="mean",
            seed=weights_seed,
        )
        for name, (encoder, weights_seed) in found.items()
    ]
    if "pixels" in baselines:
        networks.append(Network("pixels", pixel_features))
    return networks


def evaluate(
    networks: Sequence[Network],
    train: ShardDataset,
    test: ShardDataset,
    *,
    image_size: tuple[int, int],
    protocols: Sequence[str] = ("linear", "knn"),
    labels: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = False,
) -> list[Row]:
    """Frozen features of every network, under every protocol, for every label.

    Args:
        networks: each with a name of its own; ``run_networks`` makes those of a run.
        train, test: the probes learn from the first and are asked about the second.
        image_size: (h, w); images are resized and centre-cropped to it.
        protocols: names in ``PROTOCOLS``.
        labels: names in the shards; None for all.
        seed: of the probes, at least 0.
        batch_size, num_workers: of reading and of the networks; they move no number beyond rounding.
        progress: a bar on a terminal, else lines, on stderr.

    Returns:
        rows by protocol, network and label, in the order given.

    Raises:
        ValueError: an unknown protocol, nothing to do, a label that the shards lack, or whose classes differ between
            training and test shards; what a probe refuses.
    """
    labels = list(train.classes) if labels is None else list(labels)
    _check_names("protocols", protocols, tuple(PROTOCOLS))
    names = [network.name for network in networks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"networks (={names}) must be at least one, with names of their own")
    if seed < 0:
        raise ValueError(f"seed (={seed}) must be at least 0")
    known = _labels(train, test, labels)
    train_features, test_features = (
        _features(networks, dataset, image_size, batch_size, num_workers, progress) for dataset in (train, test)
    )
    jobs = [(protocol, network, label) for protocol in protocols for network in networks for label in labels]
    rows = []
    with _bar("probes", len(jobs), "probe", progress) as bar:
        for protocol, network, label in jobs:
            x, y = train_features[network.name], test_features[network.name]
            found = PROTOCOLS[protocol](x, known[label][0], y, known[label][1], seed=seed)
            rows.append(_row(network, label, x.shape[1], found))
            bar.update()
            _say(f"{protocol}, {label}, {network.name}: {100 * found.accuracy:.1f} %", progress)
    return rows


def _labels(train: ShardDataset, test: ShardDataset, labels: Sequence[str]) -> dict[str, tuple[IntArray, IntArray]]:
    """label -> the classes of the training and of the test samples."""
    if not labels:
        raise ValueError(f"labels (=[]) must name at least one; the shards in {train.path} carry none")
    known = {label: (train.labels(label), test.labels(label)) for label in labels}
    for label in known:
        ours, theirs = train.classes[label], test.classes[label]
        if ours != theirs:
            raise ValueError(
                f"label (={label!r}) must have the same classes in both: "
                f"{train.path} has {_some(ours)}, {test.path} has {_some(theirs)}"
            )
    return known


def _features(
    networks: Sequence[Network],
    dataset: ShardDataset,
    image_size: tuple[int, int],
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> dict[str, Float32]:
    """name -> [N, D] for each network, in one pass over the data."""
    start = time.perf_counter()
    batches = eval_batches(dataset, image_size=image_size, batch_size=batch_size, num_workers=num_workers)
    with _bar(f"features of {dataset.path}", len(dataset), "image", progress) as bar:

        def images() -> Iterator[Tensor]:
            for batch in batches:
                yield batch.images
                bar.update(len(batch))

        features = extract_all(images(), {network.name: network.source for network in networks})
    seconds = time.perf_counter() - start
    _say(f"features of {len(dataset):,} images in {dataset.path}: {seconds:.1f} s", progress)
    return features


def _row(network: Network, label: str, width: int, found: ProbeResult) -> Row:
    return Row(
        network=network.name,
        layers=network.layers,
        pooling=network.pooling,
        seed=network.seed,
        width=width,
        label=label,
        standard_error=found.standard_error,
        **{name: getattr(found, name) for name in _FROM_PROBE},
    )


def _bar(what: str, total: int, unit: str, progress: bool) -> tqdm[Any]:
    show = progress and sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False, disable=not show)


def _say(text: str, progress: bool) -> None:
    """A plain line in place of the bar."""
    if progress and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} (={name!r}) must be of {', '.join(known)}{did_you_mean(name, known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{kind} (={', '.join(names)}) must be different ones")


def _some(classes: Sequence[str], most: int = 5) -> str:
    rest = ", ..." if len(classes) > most else ""
    return f"{len(classes)} ({', '.join(classes[:most])}{rest})"


def format_table(rows: Sequence[Row]) -> str:
    """Accuracies in percent with their standard errors, as a table that is also Markdown.

    Args:
        rows: of one call of ``evaluate``: each protocol and network with every label.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    cells = {(row.protocol, row.network, row.label): row for row in rows}
    lines = [["protocol", "features", "width", *labels]]
    for protocol, network in dict.fromkeys((row.protocol, row.network) for row in rows):
        line = [cells[protocol, network, label] for label in labels]
        found = [f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}" for row in line]
        lines.append([protocol, _describe(line[0]), str(line[0].width), *found])
    chance = [next(row.chance for row in rows if row.label == label) for label in labels]
    lines.append(["", "chance", "", *(f"{100 * value:.1f}" for value in chance)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _describe(row: Row) -> str:
    """What a reader calls a network: 'target encoder, last4'."""
    name = f"{row.network} encoder" if row.network in ENCODERS else row.network
    return name if row.layers in (None, "last") else f"{name}, {row.layers}"


def results(
    rows: Sequence[Row], *, run: LoadedRun, checkpoint: str | Path, train: ShardDataset, test: ShardDataset, seed: int
) -> dict[str, Any]:
    """What a program needs to know of an evaluation, as plain values for JSON.

    Args:
        rows: from ``evaluate``.
        run: that was evaluated.
        checkpoint: the file (or run folder) that it was read from.
        train, test, seed: as given to ``evaluate``.
    """
    file = latest_checkpoint(checkpoint)
    return {
        "format": FORMAT,
        "checkpoint": {"file": str(file), "sha256": sha256(file), "step": run.step},
        "data": {
            "image_size": list(run.config.data.image_size),
            "train": _identity(train),
            "test": _identity(test),
        },
        "seeds": {"run": run.config.train.seed, "probes": seed},
        "precision": run.config.train.precision,
        "versions": versions() | {"scikit-learn": version("scikit-learn")},
        "rows": [asdict(row) for row in rows],
    }


def write_results(content: dict[str, Any], file: str | Path) -> Path:
    """Writes JSON in one piece; folders are made where they are missing."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    return temporary.replace(file)


def _identity(dataset: ShardDataset) -> dict[str, Any]:
    """What tells data sets apart, wherever they lie: their length, and a digest of what their index says of shards."""
    entries = json.dumps([[shard[key] for key in ("file", "samples", "bytes", "sha256")] for shard in dataset.shards])
    return {
        "shards": dataset.path,
        "samples": len(dataset),
        "index_sha256": hashlib.sha256(entries.encode()).hexdigest(),
    }


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
