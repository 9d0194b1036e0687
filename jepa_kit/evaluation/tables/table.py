"""Tables of results in Markdown, aligned for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jepa_kit.evaluation.tables.rows import ENCODER_NAMES, Row

POOLINGS = {"class": "class token", "quarters": "quarters"}
"""What tables call a pooling that is not the mean over patches."""


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table of figures in percent with their errors; a cell without a figure is empty.

    The error is the standard error due to the size of the test set, or the deviation if a figure is the mean of draws.
    """
    columns = list(dict.fromkeys(row.column for row in rows))
    cells = {(row.title, row.network, row.column): row for row in rows}
    lines = [["protocol", "features", "width", *columns]]
    for title, network in dict.fromkeys((row.title, row.network) for row in rows):
        in_line = [cells.get((title, network, column)) for column in columns]
        first = next(row for row in in_line if row is not None)
        texts = [f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}" if row else "" for row in in_line]
        features = features_title(first.network, first.layers, first.pooling)
        lines.append([title, features, str(first.width or ""), *texts])
    lines.append(["", "chance", "", *(chance_text(r.chance for r in rows if r.column == column) for column in columns)])
    return markdown(lines)


def common_chance(values: Iterable[float]) -> float | None:
    """Return the chance level that all values are equal to (to 6 digits); None if they differ."""
    levels = {round(value, 6) for value in values}
    return levels.pop() if len(levels) == 1 else None


def chance_text(values: Iterable[float]) -> str:
    """Return the common chance level in percent; empty if the values differ."""
    chance = common_chance(values)
    return "" if chance is None else f"{100 * chance:.1f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as an aligned Markdown table; the first line is the heading."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )


def features_title(network: str, layers: str | None, pooling: str | None = None) -> str:
    """Return the name of a network with pooling and layers that are not the default: 'target encoder, last4'."""
    return ", ".join(filter(None, (network_title(network), feature_options(layers, pooling))))


def network_title(network: str) -> str:
    """Return the name of a network in a table: 'target encoder'."""
    return f"{network} encoder" if network in ENCODER_NAMES else network


def feature_options(layers: str | None, pooling: str | None) -> str:
    """Return pooling and layers that are not the default: 'class token, best of last, last4'."""
    tokens = POOLINGS.get(pooling or "", "")
    if layers in (None, "last"):
        return tokens
    return ", ".join(filter(None, (tokens, f"best of {layers}" if "," in str(layers) else layers)))


def differing_options(options: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return the options that differ from those of any other, as ``k=5 temperature=0.1``."""
    texts = {key: json.dumps(value) for key, value in options.items()}
    differing = [key for key in texts if any(json.dumps(theirs.get(key)) != texts[key] for theirs in others)]
    return " ".join(f"{key}={texts[key]}" for key in differing).replace('"', "")
