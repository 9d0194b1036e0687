"""Rows of an evaluation as a table for a terminal, which is also Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_kit.evaluation.feature_sources import ENCODER_NAMES
from jepa_kit.evaluation.tables.results import Row


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
        lines.append([title, features_title(first.network, first.layers), str(first.width or ""), *found])
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


def features_title(network: str, layers: str | None) -> str:
    """Return the name of a network with its layers, as 'target encoder, last4'."""
    name = f"{network} encoder" if network in ENCODER_NAMES else network
    if layers in (None, "last"):
        return name
    return f"{name}, best of {layers}" if "," in str(layers) else f"{name}, {layers}"


def differing_options(options: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return the options that differ from those of any other, as ``k=5 temperature=0.1``."""
    texts = {key: json.dumps(value) for key, value in options.items()}
    differing = [key for key in texts if any(json.dumps(theirs.get(key)) != texts[key] for theirs in others)]
    return " ".join(f"{key}={texts[key]}" for key in differing).replace('"', "")
