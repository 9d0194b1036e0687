"""Draw a comparison: a panel for each protocol and label, a line for each recipe, and baselines across all lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_kit.evaluation.tables.compare import Cell, Column, Line, Table
from jepa_kit.evaluation.tables.table import common_chance, network_title
from jepa_kit.plotting import Figure, save_figure

ENCODER = {"ms": 5.5, "capsize": 2, "lw": 1.3, "zorder": 3}
STYLES: dict[str, dict[str, Any]] = {
    "target": {"fmt": "o", "color": "#1f5fa8", **ENCODER},
    "context": {"fmt": "D", "color": "#d2691e", **ENCODER},
    "untrained": {"fmt": "s", "color": "0.45", "mfc": "white", **ENCODER},
}
"""Marks on the line of a recipe, by network."""
ACROSS = {"pixels": "#8a6d3b", "patches": "#2e8b57"}
"""Colours of baselines that are the same for all recipes: a line across them, with a band of one standard error."""
WIDTH = 44
"""Characters in a line of a panel's title."""
MOST = 4
"""Panels side by side."""


def figure(table: Table, file: str | Path, *, format: str = "png") -> Path:
    """Draw a table, and return the path.

    Error bars are the deviation over seeds, or for one run its standard error; a dotted line is chance. Panels of one
    protocol are a row, if it has no more than ``MOST`` labels.
    """
    recipes = list(dict.fromkeys(line.recipe for line in table.lines if not line.is_baseline)) or [""]
    places = {recipe: -k for k, recipe in enumerate(recipes)}
    panels = _arranged(table.columns)
    width = max(map(len, panels))
    height = 0.75 + 0.27 * len(recipes)
    names = 0.075 * min(max(map(len, recipes)), 60)
    fig = Figure(figsize=(names + 3.0 * width + 0.3, height * len(panels) + 0.6), layout="constrained")
    axes = fig.subplots(len(panels), width, squeeze=False, sharey=True)
    several = len({column.data for column in table.columns}) > 1
    for row, columns in zip(axes, panels, strict=True):
        for ax, column in zip(row, [*columns, *[None] * (width - len(columns))], strict=True):
            if column is None:
                ax.axis("off")
                continue
            _draw(ax, table, column, places)
            title = f"{column.data}: {column.title}" if several else column.title
            ax.set_title("\n".join(textwrap.wrap(title, WIDTH)), fontsize=9)
    axes[0, 0].set_yticks(list(places.values()), [textwrap.shorten(r, 60, placeholder="...") for r in places])
    axes[0, 0].set_ylim(0.6 - len(places), 0.6)
    marks = {name: mark for ax in axes.flat for mark, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    shown = sorted(marks, key=[*map(network_title, STYLES), *ACROSS, "chance"].index)
    in_line = max(2, int(fig.get_figwidth() / 1.5))
    fig.legend(
        [marks[name] for name in shown], shown, loc="outside lower center", ncols=in_line, fontsize=9, frameon=False
    )
    return save_figure(fig, file, dpi=130, format=format)


def _arranged(columns: list[Column]) -> list[list[Column]]:
    """Return rows of panels: those of each question; if one has too many or all have one, they fill the rows."""
    rows: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        rows.setdefault((column.data, column.question), []).append(column)
    most = max(map(len, rows.values()))
    if 1 < most <= MOST:
        return list(rows.values())
    return [columns[k : k + MOST - 1] for k in range(0, len(columns), MOST - 1)]


def _draw(ax: Any, table: Table, column: Column, places: Mapping[str, int]) -> None:
    """Draw the figures of a column."""
    figures = {line: cell for (line, one), cell in table.cells.items() if one == column}
    for recipe, y in places.items():
        mine = {line.network: cell for line, cell in figures.items() if line.recipe == recipe and not line.is_baseline}
        untrained = figures.get(table.untrained.get(recipe, Line("", "")))
        shown = mine | ({"untrained": untrained} if untrained else {})
        for k, (network, cell) in enumerate(shown.items()):
            at = y + 0.22 * ((len(shown) - 1) / 2 - k)
            ax.errorbar(100 * cell.mean, at, xerr=100 * _error(cell), label=network_title(network), **STYLES[network])
    for line, cell in figures.items():
        if line.network in ACROSS:
            colour, x, error = ACROSS[line.network], 100 * cell.mean, 100 * _error(cell)
            ax.axvline(x, color=colour, lw=1.3, ls="--", label=line.network, zorder=2)
            ax.axvspan(x - error, x + error, color=colour, alpha=0.15, lw=0)
    chance = common_chance(table.chances(column))
    if chance is not None:
        ax.axvline(100 * chance, color="0.5", ls=":", lw=1.2, label="chance")
    for y in list(places.values())[1:]:
        ax.axhline(y + 0.5, color="0.92", lw=0.8, zorder=0)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.set_xlabel("%", fontsize=8, labelpad=0)
    ax.grid(axis="x", color="0.92", zorder=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _error(cell: Cell) -> float:
    return cell.standard_error if cell.deviation is None else cell.deviation
