"""Rows of results, and reading them from the JSON file of an evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

FORMAT = "jepa_kit evaluation/2"

ENCODER_NAMES: tuple[Literal["target"], Literal["context"]] = ("target", "context")
UNTRAINED = "untrained"
BASELINES = (UNTRAINED, "pixels", "patches")

_CONTENT_TYPES: tuple[tuple[str, Any, str], ...] = (
    ("checkpoint", dict | None, "a mapping or null"),
    ("config", dict, "a mapping"),
    *((f"data.{part}.{name}", str, "text") for part in ("train", "test") for name in ("shards", "index_sha256")),
    ("seeds.run", int, "an int"),
    ("seeds.protocols", int, "an int"),
    ("rows", list, "a list"),
)
"""What a file of results must have: (name, type, what a message calls it)."""
_ROW_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("network", "protocol", "label", "variant", "metric"), (str, "text")),
    **dict.fromkeys(("settings", "options"), (dict, "a mapping")),
    **dict.fromkeys(("layers", "pooling"), (str | None, "text or null")),
    "seed": (int | None, "an int or null"),
    **dict.fromkeys(("accuracy", "standard_error", "chance"), (int | float, "a finite number")),
}


@dataclass(frozen=True)
class Row:
    """Result of one network under one protocol on one label; figures in [0, 1].

    Args:
        network: see ``Network``.
        layers: the layer set, or those that the protocol chose from, as "last, last4"; None if there are none.
        pooling: how an encoder's tokens became features; None if there are no features, or the encoder was trained.
        seed: of the weights of an untrained network.
        width: of its features (the widest layer set).
        label: name of the classes; ``mask`` for segmentation.
        seconds: duration of the protocol.
        options: all options of the protocol, with its defaults.
        variant: as in ``ProbeResult``; also options, if the evaluation has the protocol more than once.
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
        """Return the heading of its figure in a table."""
        return self.label if self.metric == "accuracy" else f"{self.label} {self.metric}"

    @property
    def title(self) -> str:
        """Return the name of its protocol in a table."""
        return f"{self.protocol} {self.variant}".strip()


def read_results(file: str | Path) -> dict[str, Any]:
    """Return the content of a file that ``write_results`` wrote.

    Raises:
        ValueError: if it is not JSON, has another format, or is incomplete or damaged.
        FileNotFoundError: if there is no such file.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} has format (={found!r}), but this release reads {FORMAT!r}: evaluate again")
    for name, kind, right in _CONTENT_TYPES:
        part: Any = content
        for key in name.split("."):
            if not isinstance(part, dict) or key not in part:
                raise ValueError(f"{file} has no {name}: it is incomplete; evaluate again")
            part = part[key]
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
    required = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(Row)}
    for name, needed in required.items():
        if needed and name not in row:
            raise ValueError(f"{called} has no {name!r}")
    for name, value in row.items():
        if name not in required:
            raise ValueError(f"{called} has {name!r}, which this release does not know")
        kind, right = _ROW_TYPES.get(name, (object, ""))
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value) and right):
            raise ValueError(f"{called} has {name} (={value!r:.60}), which must be {right}")
