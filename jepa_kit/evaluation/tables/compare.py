"""Arrange the results of runs in one table: a line for each recipe and network, a column for each protocol and label.

Runs that differ only in their seed are one recipe, and their figures are averaged. Baselines have a line of their own,
once: raw pixels and patches do not depend on a run, and an untrained network only on its encoder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jepa_kit.evaluation.tables.cost import Cost, cost_of, mean_cost
from jepa_kit.evaluation.tables.names import data_names, group_names, protocol_of, protocol_titles
from jepa_kit.evaluation.tables.rows import BASELINES, UNTRAINED, Row
from jepa_kit.evaluation.tables.runs import Answer, Run
from jepa_kit.evaluation.tables.table import chance_text, feature_options, markdown, network_title

COST = ("steps", "images", "TFLOP", "hours")
"""Headings of the columns of cost."""


class Line(NamedTuple):
    """A line of a table: the name of a recipe, empty for a baseline of all of them, and a network."""

    recipe: str
    network: str

    @property
    def is_baseline(self) -> bool:
        return self.network in BASELINES


class Column(NamedTuple):
    """A column of a table: data, protocol (with options that differ), layers and pooling if not the default, label."""

    data: str
    protocol: str
    features: str
    label: str

    @property
    def question(self) -> str:
        """Return protocol and features: ``logistic, last4``."""
        return ", ".join(filter(None, (self.protocol, self.features)))

    @property
    def title(self) -> str:
        """Return its heading: ``logistic, last4: count``."""
        return f"{self.question}: {self.label}"


class Cell(NamedTuple):
    """A figure over seeds, in [0, 1].

    Args:
        mean: over the seeds.
        deviation: standard deviation over the seeds (with n - 1); None for one.
        standard_error: of one figure (binomial), averaged over the seeds.
        runs: number of seeds.
        chance: accuracy of the best constant answer.
    """

    mean: float
    deviation: float | None
    standard_error: float
    runs: int
    chance: float

    def text(self) -> str:
        """Return the mean in percent with the deviation over seeds, or for one seed its standard error in brackets."""
        if self.deviation is None:
            return f"{100 * self.mean:.1f} ({100 * self.standard_error:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


@dataclass
class Table:
    """Figures of recipes and baselines.

    Args:
        cells: by line and column; those that were not measured are missing.
        costs: of training, by the name of the recipe, if it is known.
        untrained: the name of a recipe -> the line of its untrained network.
    """

    cells: dict[tuple[Line, Column], Cell] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    untrained: dict[str, Line] = field(default_factory=dict)

    @property
    def lines(self) -> list[Line]:
        """Return recipes in their order, then baselines."""
        found = list(dict.fromkeys(line for line, _ in self.cells))
        rank = {name: k for k, name in enumerate(BASELINES)}
        baselines = sorted((line for line in found if line.is_baseline), key=lambda line: rank[line.network])
        return [line for line in found if not line.is_baseline] + baselines

    @property
    def columns(self) -> list[Column]:
        """Return columns by data and question, in the order of their first figures."""
        found = list(dict.fromkeys(column for _, column in self.cells))
        data, questions = [column.data for column in found], [column.question for column in found]
        return sorted(found, key=lambda column: (data.index(column.data), questions.index(column.question)))

    def chances(self, column: Column) -> list[float]:
        """Return the chance levels of a column's figures."""
        return [cell.chance for (_, one), cell in self.cells.items() if one == column]


def compare(runs: Sequence[Run]) -> Table:
    """Return the table of runs, those of one recipe averaged, in the order of the runs.

    Figures share a column and are averaged if data, label, layers, and protocol with its options and seed are the same.
    If different ones have the same name, the names get what differs.

    Raises:
        ValueError: if there is no run, or two runs of a recipe have the same seed.
    """
    if not runs:
        raise ValueError("runs (=[]) must be at least one")
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe, []).append(run)
    groups = list(by_recipe.values())
    return tabulate(dict(zip(group_names(groups), groups, strict=True)))


def tabulate(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Return the table of runs that are grouped and named already; figures of a group are averaged.

    Raises:
        ValueError: if two runs of a group have the same seed.
    """
    for members in groups.values():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            places = ", ".join(str(run.place) for run in members)
            raise ValueError(f"runs {places} have one recipe and seeds {seeds}: seeds must differ")
    answers = {name: [answer for run in members for answer in run.rows] for name, members in groups.items()}
    columns_of = _Columns([answer for several in answers.values() for answer in several])
    untrained = _untrained_lines({k: v for k, v in groups.items() if any(_is_untrained(a) for a in answers[k])})
    found: dict[tuple[Line, Column], list[Row]] = {}
    for name, several in answers.items():
        for answer in several:
            network = answer.row.network
            line = untrained[name] if _is_untrained(answer) else Line("" if network in BASELINES else name, network)
            for column in columns_of(answer):
                found.setdefault((line, column), []).append(answer.row)
    costs = {name: mean_cost([cost_of(run) for run in members]) for name, members in groups.items()}
    known = {name: cost for name, cost in costs.items() if cost is not None}
    return Table({place: _cell(rows) for place, rows in found.items()}, known, untrained)


def _is_untrained(answer: Answer) -> bool:
    return answer.row.network == UNTRAINED


def _untrained_lines(groups: Mapping[str, Sequence[Run]]) -> dict[str, Line]:
    """Return the line of the untrained network of each recipe; recipes share it if their encoders are equal."""
    by_encoder: dict[str, list[str]] = {}
    for name, members in groups.items():
        config = json.loads(members[0].recipe)["config"]
        data = {key: config.get("data", {}).get(key) for key in ("mean", "std")}
        by_encoder.setdefault(json.dumps([config.get("encoder"), data]), []).append(name)
    several = len(by_encoder) > 1
    found: dict[str, Line] = {}
    for first, *others in by_encoder.values():
        more = f" and {len(others)} more" if others else ""
        found |= dict.fromkeys((first, *others), Line(first + more if several else "", UNTRAINED))
    return found


class _Columns:
    """The columns of a row: one, or for a baseline without layers all of its protocol and pooling.

    Args:
        answers: of the whole table, from which columns get their names.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.data, self.titles = data_names(answers), protocol_titles(answers)
        self.layered: dict[Column, dict[str, str | None]] = {}
        for answer in answers:
            if answer.row.layers is not None:
                column = self._column(answer)
                theirs = self.layered.setdefault(column._replace(features=""), {})
                theirs[column.features] = answer.row.pooling

    def __call__(self, answer: Answer) -> list[Column]:
        own, pooling = self._column(answer), answer.row.pooling
        layered = self.layered.get(own._replace(features=""), {})
        fitting = [features for features, theirs in layered.items() if pooling in (None, theirs)]
        if answer.row.layers is not None or not fitting:
            return [own]
        return [own._replace(features=features) for features in fitting]

    def _column(self, answer: Answer) -> Column:
        row, title = answer.row, self.titles[protocol_of(answer)]
        features = feature_options(row.layers, None if "pooling=" in title else row.pooling)
        return Column(self.data[answer.data], title, features, row.column)


def _cell(rows: Sequence[Row]) -> Cell:
    """Return the figure over seeds; those of one untrained network, or of pixels, are one figure."""
    by_seed: dict[object, list[Row]] = {}
    for k, row in enumerate(rows):
        by_seed.setdefault(row.seed if row.network in BASELINES else f"run {k}", []).append(row)
    values = [float(np.mean([row.accuracy for row in same])) for same in by_seed.values()]
    return Cell(
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        float(np.mean([row.standard_error for row in rows])),
        len(values),
        float(np.mean([row.chance for row in rows])),
    )


def to_markdown(table: Table) -> str:
    """Return a Markdown table: recipes, then baselines, then chance; at the right the cost of training, if known."""
    columns, costs = table.columns, table.costs
    several = len({column.data for column in columns}) > 1
    heads = [f"{column.data}: {column.title}" if several else column.title for column in columns]
    lines = [["run", "features", *heads, *(COST if costs else ())]]
    for line in table.lines:
        cells = [table.cells.get((line, column)) for column in columns]
        lines.append([line.recipe, network_title(line.network), *(cell.text() if cell else "" for cell in cells)])
        if costs:
            known = line.recipe in costs and not line.is_baseline
            lines[-1] += costs[line.recipe].texts() if known else ["" for _ in COST]
    chances = [chance_text(table.chances(column)) for column in columns]
    return markdown([*lines, ["", "chance", *chances, *("" for _ in COST if costs)]])


def to_csv(table: Table) -> str:
    """Return CSV with a line for each figure, with all digits, and the cost of its recipe."""
    out = io.StringIO()
    fields = (*Line._fields, *Column._fields, *Cell._fields, *Cost._fields)
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_rows(table))
    return out.getvalue()


def to_rows(table: Table) -> list[dict[str, Any]]:
    """Return a mapping for each figure, with the cost of its recipe, whose values are None if it is unknown."""
    unknown = dict.fromkeys(Cost._fields)
    return [
        {
            **line._asdict(),
            **column._asdict(),
            **cell._asdict(),
            **(unknown if line.is_baseline or line.recipe not in table.costs else table.costs[line.recipe]._asdict()),
        }
        for (line, column), cell in table.cells.items()
    ]
