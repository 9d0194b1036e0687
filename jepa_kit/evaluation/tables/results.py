"""Write the results of an evaluation: one JSON file for each call of tools/eval_net.py.

A file has the checkpoint (digest of its bytes), the config, the data (digests of their indexes), the seeds, the
versions, and for each row the protocol with its settings, the network, its layers and pooling.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jepa_kit.config import Config, versions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import brief
from jepa_kit.evaluation.data_identity import identity, shared_samples
from jepa_kit.evaluation.features import LoadedRun, latest_checkpoint
from jepa_kit.evaluation.tables.rows import FORMAT, Row
from jepa_kit.files import sha256_of, write_text


def about_checkpoint(
    checkpoint: str | Path, run: LoadedRun, *, name: str | None = None, digest: str | None = None
) -> dict[str, Any]:
    """Return what results record of a checkpoint: file, digest, step, and the training data that it names.

    Args:
        checkpoint: a file or run folder.
        run: the run that was loaded from it.
        name: to record for the file; by default its path.
        digest: SHA-256 of the file, if it is known already.
    """
    file = latest_checkpoint(checkpoint)
    data = None if run.data is None else brief(run.data)
    return {"file": name or str(file), "sha256": digest or sha256_of(file), "step": run.step, "data": data}


def results(
    rows: Sequence[Row],
    *,
    config: Config,
    checkpoint: Mapping[str, Any] | None,
    train: ShardDataset,
    test: ShardDataset,
    seed: int,
) -> dict[str, Any]:
    """Return the content of a file of results, as plain values for JSON.

    Args:
        rows: from ``evaluate``.
        config: of the run.
        checkpoint: from ``about_checkpoint``; None for a config without a run.
        train, test, seed: the arguments of ``evaluate``.
    """
    return {
        "format": FORMAT,
        "checkpoint": None if checkpoint is None else dict(checkpoint),
        "config": config.to_dict(),
        "data": {
            "image_size": list(config.data.image_size),
            "decoder": config.data.decoder,
            "train": identity(train),
            "test": identity(test),
            "test_samples_in_train": shared_samples(train, test),
        },
        "seeds": {"run": config.train.seed, "protocols": seed},
        "precision": config.train.precision,
        "versions": versions() | {"scikit-learn": version("scikit-learn")},
        "rows": [asdict(row) for row in rows],
    }


def write_results(content: dict[str, Any], file: str | Path) -> Path:
    """Write JSON atomically, make missing folders, and return the path.

    Raises:
        ValueError: if a number is not finite, which JSON cannot represent.
    """
    file = Path(file)
    for place, number in _not_finite(content):
        raise ValueError(f"{file} cannot be written: {place} (={number}) is not finite, and JSON has no such number")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return file


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path (as ``rows.0.accuracy``) and value of each number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        yield from _not_finite(part, f"{place}.{key}".lstrip("."))


def check_output(option: str, file: str | Path) -> None:
    """Raise ValueError if a file cannot be written; ``option`` is its name in the message. Call it before long work."""
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{option} (={str(file)!r}) must name a file, but is a folder")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{option} (={str(file)!r}) must be in a writable folder, but {above} is not one")
