"""What a program needs to know of an evaluation: one JSON file for each call.

A file names the checkpoint (its bytes' digest), the config, the data (digests of their indexes), the seeds, the
versions, and for each row the protocol with its settings, the network, its layers and pooling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jepa_kit.config import Config, versions
from jepa_kit.data.shards import ShardDataset
from jepa_kit.evaluation.features import LoadedRun, latest_checkpoint
from jepa_kit.evaluation.networks import sha256
from jepa_kit.evaluation.store import identity

FORMAT = "jepa_kit evaluation/2"


def results(
    rows: Sequence[Any],
    *,
    run: LoadedRun,
    checkpoint: str | Path,
    train: ShardDataset,
    test: ShardDataset,
    seed: int,
) -> dict[str, Any]:
    """The content of a file about a run, as plain values for JSON.

    Args:
        rows: from ``evaluate``.
        run: that was evaluated.
        checkpoint: the file (or run folder) that it was read from.
        train, test, seed: as given to ``evaluate``.
    """
    file = latest_checkpoint(checkpoint)
    about = {"file": str(file), "sha256": sha256(file), "step": run.step}
    return config_results(rows, config=run.config, checkpoint=about, train=train, test=test, seed=seed)


def config_results(
    rows: Sequence[Any],
    *,
    config: Config,
    checkpoint: Mapping[str, Any] | None,
    train: ShardDataset,
    test: ShardDataset,
    seed: int,
) -> dict[str, Any]:
    """As ``results``; for a config without a run, ``checkpoint`` is None."""
    return {
        "format": FORMAT,
        "checkpoint": None if checkpoint is None else dict(checkpoint),
        "config": config.to_dict(),
        "data": {
            "image_size": list(config.data.image_size),
            "decoder": config.data.decoder,
            "train": identity(train),
            "test": identity(test),
        },
        "seeds": {"run": config.train.seed, "protocols": seed},
        "precision": config.train.precision,
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


def read_results(file: str | Path) -> dict[str, Any]:
    """The content of a file that ``write_results`` wrote.

    Raises:
        ValueError: it is not JSON, or of another kind.
        FileNotFoundError: there is no such file.
    """
    text = Path(file).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} has format (={found!r}), but this release reads {FORMAT!r}: evaluate again")
    return content
