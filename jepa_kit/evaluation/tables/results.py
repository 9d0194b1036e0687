"""What a program needs to know of an evaluation: one JSON file for each call.

A file names the checkpoint (its bytes' digest), the config, the data (digests of their indexes), the seeds, the
versions, and for each row the protocol with its settings, the network, its layers and pooling.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jepa_kit.config import Config, versions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.identity import brief
from jepa_kit.evaluation.feature_cache import identity, shared_samples
from jepa_kit.evaluation.features import LoadedRun, latest_checkpoint
from jepa_kit.files import sha256_of, write_text

FORMAT = "jepa_kit evaluation/2"
_NEEDED = (
    "checkpoint",
    "config",
    *(f"data.{part}.{name}" for part in ("train", "test") for name in ("shards", "index_sha256")),
    "seeds.run",
    "seeds.protocols",
    "rows",
)
"""What a file of results must have."""
_MAPPING, _TEXT = (dict, "a mapping"), (str, "text")
_TYPES: tuple[tuple[str, Any, str], ...] = (
    ("checkpoint", dict | None, "a mapping or null"),
    ("config", *_MAPPING),
    *((f"data.{part}.{name}", *_TEXT) for part in ("train", "test") for name in ("shards", "index_sha256")),
    ("seeds.run", int, "an int"),
    ("seeds.protocols", int, "an int"),
    ("rows", list, "a list"),
)
"""Types that readers rely on: (name, type, what a message calls it)."""
_ROW_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("network", "protocol", "label", "variant", "metric"), _TEXT),
    **dict.fromkeys(("settings", "options"), _MAPPING),
}


@dataclass(frozen=True)
class Row:
    """One network under one protocol on one label; figures in [0, 1].

    Args:
        network: see ``Network``.
        layers: the layer set, or the ones that the protocol chose from, as "last, last4"; None where there are none.
        pooling: how an encoder's tokens became features; None where there are none, or the encoder was trained.
        seed: of the weights of an untrained network.
        width: of its features (the widest layer set).
        label: whose classes were told apart; ``mask`` for segmentation.
        seconds: that the protocol took, by the clock.
        options: all that the protocol was asked with, the defaults too.
        variant: as in ``ProbeResult``; and options, where a protocol was asked for with others as well.
        protocol, metric, accuracy, standard_error, draws, validation, settings, n_train, n_test, classes,
            chance: see ``ProbeResult``.
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
    validation: float | None
    classes: int
    n_train: int
    n_test: int
    settings: dict[str, Any]
    variant: str = ""
    metric: str = "accuracy"
    draws: int = 1
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def column(self) -> str:
        """The heading of its figure in a table."""
        return self.label if self.metric == "accuracy" else f"{self.label} {self.metric}"

    @property
    def title(self) -> str:
        """What the protocol is called in a table."""
        return f"{self.protocol} {self.variant}".strip()


def results(
    rows: Sequence[Row],
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
    about = about_checkpoint(str(file), sha256_of(file), run)
    return config_results(rows, config=run.config, checkpoint=about, train=train, test=test, seed=seed)


def about_checkpoint(file: str, digest: str, run: LoadedRun) -> dict[str, Any]:
    """What a file of results says of the checkpoint: its training data too, as the checkpoint names them."""
    return {"file": file, "sha256": digest, "step": run.step, "data": None if run.data is None else brief(run.data)}


def config_results(
    rows: Sequence[Row],
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
            "test_samples_in_train": shared_samples(train, test),
        },
        "seeds": {"run": config.train.seed, "protocols": seed},
        "precision": config.train.precision,
        "versions": versions() | {"scikit-learn": version("scikit-learn")},
        "rows": [asdict(row) for row in rows],
    }


def write_results(content: dict[str, Any], file: str | Path) -> Path:
    """Writes JSON in one piece; folders are made where they are missing.

    Raises:
        ValueError: a number is not finite, for which JSON has no word.
    """
    file = Path(file)
    for place, number in _not_finite(content):
        raise ValueError(f"{file} cannot be written: {place} (={number}) is not finite, and JSON has no such number")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return file


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Numbers that are not finite, and where they stand, as ``rows.0.accuracy``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    held = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in held:
        yield from _not_finite(part, f"{place}.{key}".lstrip("."))


def check_output(option: str, file: str | Path) -> None:
    """Raises ValueError, before any work is done, where a file could not be written: ``option`` names it."""
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{option} (={str(file)!r}) must name a file, but is a folder")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{option} (={str(file)!r}) must lie in a folder that can be written to, which {above} is not")


def read_results(file: str | Path) -> dict[str, Any]:
    """The content of a file that ``write_results`` wrote.

    Raises:
        ValueError: it is not JSON, of another kind, or incomplete.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} has format (={found!r}), but this release reads {FORMAT!r}: evaluate again")
    for name in _NEEDED:
        part: Any = content
        for key in name.split("."):
            if not isinstance(part, dict) or key not in part:
                raise ValueError(f"{file} has no {name}: it is incomplete; evaluate again")
            part = part[key]
    for name, kind, right in _TYPES:
        part = content
        for key in name.split("."):
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, kind):
            raise ValueError(f"{file}: {name} (={part!r:.60}) must be {right}: it is damaged; evaluate again")
    step = (content["checkpoint"] or {}).get("step")
    if step is not None and type(step) is not int:
        raise ValueError(f"{file}: checkpoint.step (={step!r:.60}) must be an int: it is damaged; evaluate again")
    for number, row in enumerate(content["rows"], 1):
        _check_row(row, f"{file}: row {number}")
    return content


def _check_row(row: Any, called: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{called} (={row!r:.60}) must be a mapping")
    known = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(Row)}
    for name, needed in known.items():
        if needed and name not in row:
            raise ValueError(f"{called} has no {name!r}")
    for name in row:
        if name not in known:
            raise ValueError(f"{called} has {name!r}, which this release does not know")
    for name, (kind, right) in _ROW_TYPES.items():
        value = row.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{called} has {name} (={value!r:.60}), which must be {right}")
    for name in ("layers", "pooling"):
        if row[name] is not None and not isinstance(row[name], str):
            raise ValueError(f"{called} has {name} (={row[name]!r:.60}), which must be text or null")
    if row["seed"] is not None and not isinstance(row["seed"], int):
        raise ValueError(f"{called} has seed (={row['seed']!r:.60}), which must be an int or null")
    for name in ("accuracy", "standard_error", "chance"):
        if not isinstance(row[name], int | float) or not math.isfinite(row[name]):
            raise ValueError(f"{called} has {name} (={row[name]!r:.60}), which must be a finite number")
