"""Results of cells and baselines: one small JSON file each, which can be committed and continued from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jepa_kit.config.typed import DoesNotFitError, convert
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.files import write_text

FORMAT = "jepa_kit study/1"
CELLS = "cells"
"""Folder of records in the folder of results."""
DATA = "data.json"
"""File in the folder of results: path of shards -> their identity, for reports where the shards are not."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of a cell or baseline.

    Args:
        id: digest; the name of the file.
        kind: ``cell`` or ``baseline``.
        title: of the arm or baseline when it ran; an arm's name may change without a change of its cells.
        seed: of the run, or of an untrained network.
        state: ``failed`` if training or evaluation ended with an error.
        reason: the error of a failed cell, or the health's verdict on a collapsed one; empty if all is well.
        training: cost of a cell: steps, images, tflop, hours.
        health: state, reason and figures of the verdict.
        rows: digest of an evaluation -> its rows.
        config: resolved.
        data: identities of the shards.
        machine: what it ran on.
        versions: of the packages.
    """

    id: str
    kind: Literal["cell", "baseline"]
    title: str
    seed: int
    state: Literal["finished", "failed"] = "finished"
    reason: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    health: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def collapsed(self) -> bool:
        """Return whether the verdict is a collapse."""
        return bool(self.health.get("collapsed"))

    def results(self, evaluation: str) -> list[Row]:
        """Return the rows of an evaluation; none if it was not made."""
        return [Row(**row) for row in self.rows.get(evaluation, ())]


def record_file(results: Path, identity: str) -> Path:
    """Return the file of a record in a folder of results."""
    return results / CELLS / f"{identity}.json"


def write_record(record: Record, results: Path) -> Path:
    """Write a record atomically and return its path."""
    file = record_file(results, record.id)
    write_json({"format": FORMAT, **asdict(record)}, file)
    return file


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write JSON atomically into a folder, which is made if it is missing; raise ValueError for NaN or infinity."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_record(results: Path, identity: str) -> Record | None:
    """Return a record, or None if there is none.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    file = record_file(results, identity)
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        known = {"id": str, "kind": Literal["cell", "baseline"], "state": Literal["finished", "failed"], "seed": int}
        for name, kind in known.items():
            convert(content[name], kind)
        record = Record(**content)
        for evaluation in record.rows:
            record.results(evaluation)
    except (ValueError, TypeError, LookupError, AttributeError, DoesNotFitError) as error:
        raise ValueError(f"{file} is not a record of {FORMAT!r}: delete it, and the cell runs again") from error
    return record


def read_data(results: Path) -> dict[str, Any]:
    """Return path of shards -> identity, as an earlier call recorded it."""
    file = results / DATA
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_data(results: Path, data: Mapping[str, Any]) -> None:
    """Write the identities of the shards of a study."""
    if read_data(results) != data:
        write_json(data, results / DATA)
