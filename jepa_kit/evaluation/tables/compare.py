"""Compare the results of runs in one table and one figure; runs that differ only in their seed are averaged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.evaluation.tables.runs import Answer, Data, Run
from jepa_kit.evaluation.tables.table import (
    chance_text,
    common_chance,
    differing_options,
    features_title,
    markdown,
)

BASELINES = ("untrained", "pixels")


class Key(NamedTuple):
    """Identity of a figure; figures of a group's runs with equal keys are averaged."""

    group: str
    data: str
    protocol: str
    features: str
    column: str


class Cell(NamedTuple):
    """A figure over seeds, in [0, 1].

    Args:
        mean: over the runs.
        deviation: standard deviation over the runs (with n - 1); None for one run.
        standard_error: of a run's figure, averaged over the runs.
        runs: number of runs.
        chance: accuracy of the best constant answer.
    """

    mean: float
    deviation: float | None
    standard_error: float
    runs: int
    chance: float

    def text(self) -> str:
        """Return the mean in percent with the deviation over seeds, or for one run its standard error in brackets."""
        if self.deviation is None:
            return f"{100 * self.mean:.1f} ({100 * self.standard_error:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


def compare(runs: Sequence[Run]) -> dict[Key, Cell]:
    """Return every figure, averaged over runs of one recipe, in the order of the runs.

    Figures share a column and are averaged if data, label, and protocol with its options and seed are the same. If
    different ones have the same name, the names get what differs.

    Raises:
        ValueError: if there is no run, or two runs of a recipe have the same seed.
    """
    if not runs:
        raise ValueError("runs (=[]) must be at least one")
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe, []).append(run)
    groups = list(by_recipe.values())
    for members in groups:
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            places = ", ".join(str(run.place) for run in members)
            raise ValueError(f"runs {places} have one recipe and seeds {seeds}: seeds must differ")
    answers = [answer for members in groups for run in members for answer in run.rows]
    data_names, titles = _data_names(answers), _titles(answers)
    found: dict[Key, list[Row]] = {}
    for group, members in zip(_first_unique(_group_names(groups)), groups, strict=True):
        for data, _, row, title in ((*a, titles[_protocol(a)]) for run in members for a in run.rows):
            key = Key(group, data_names[data], title, features_title(row.network, row.layers, row.pooling), row.column)
            found.setdefault(key, []).append(row)
    return {key: _cell(rows) for key, rows in found.items()}


def _first_unique(ways: Iterable[list[str]]) -> list[str]:
    """Return the first of several lists of names that has no duplicates."""
    return next(names for names in ways if len(set(names)) == len(names))


def _group_names(groups: Sequence[Sequence[Run]]) -> Iterator[list[str]]:
    """Yield lists of names for groups of runs: ever longer ends of paths, with step and size, or the first file."""
    longest = max(len(run.place.parts) for members in groups for run in members)
    steps = ["" if g[0].step is None else f", step {g[0].step:,}" for g in groups]
    sizes = [f", at {' x '.join(map(str, size))}" if (size := g[0].rows[0].data.size) else "" for g in groups]
    for join in (_common, ", ".join):
        for added in ([""] * len(groups), steps, sizes, [a + b for a, b in zip(steps, sizes, strict=True)]):
            for parts in range(1, longest + 1):
                yield [join([_end(r.place, parts) for r in g]) + add for g, add in zip(groups, added, strict=True)]
    yield [str(members[0].files[0]) for members in groups]


def _data_names(answers: Sequence[Answer]) -> dict[Data, str]:
    """Return names of data: ends of the test folder, with the training folder, or digests.

    The names get the size of images and the decoder if they do not differ otherwise.
    """
    several = list(dict.fromkeys(answer.data for answer in answers))
    tests = [d.test_place.parent if d.test_place.name in ("test", "val") else d.test_place for d in several]
    trains = [d.train_place for d in several]
    longest = max(len(place.parts) for place in (*tests, *trains))
    read = [f" at {' x '.join(map(str, d.size or ['any']))}" for d in several]
    decoded = [f"{at}, {d.decoder}" for at, d in zip(read, several, strict=True)]

    def ways() -> Iterator[list[str]]:
        for added in ([""] * len(several), read, decoded):
            for names in places():
                yield [name + end for name, end in zip(names, added, strict=True)]

    def places() -> Iterator[list[str]]:
        for parts in range(1, longest + 1):
            yield [_end(test, parts) for test in tests]
        for parts in range(1, longest + 1):
            ends = ((_end(test, parts), _end(train, parts)) for test, train in zip(tests, trains, strict=True))
            yield [f"{test} (learned from {train})" for test, train in ends]
        digests = zip(tests, several, strict=True)
        yield [f"{_end(test, 1)} {data.test[:8]} (learned from {data.train[:8]})" for test, data in digests]

    return dict(zip(several, _first_unique(ways()), strict=True))


def _end(path: Path, parts: int) -> str:
    return "/".join(path.parts[-parts:])


def _protocol(answer: Answer) -> tuple[str, str]:
    """Return the title of the protocol, and its options as text."""
    return answer.row.title, json.dumps(answer.options, sort_keys=True)


def _titles(answers: Sequence[Answer]) -> dict[tuple[str, str], str]:
    """Return names of protocols: the title, and the options in which protocols of one title differ."""
    by_title: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        title, text = _protocol(answer)
        by_title.setdefault(title, {})[text] = answer
    found = {}
    for title, ways in by_title.items():
        known = [answer.options for answer in ways.values() if answer.row.options]
        for text, answer in ways.items():
            others = known if answer.row.options else [a.options for a in ways.values()]
            added = differing_options(answer.options, others)
            unknown = "" if answer.row.options or not known else "options unknown"
            found[title, text] = " ".join(filter(None, (title, added, unknown)))
    return found


def _common(names: Sequence[str]) -> str:
    """Return one name for several: their common beginning and ``*``, as ``scenes_seed*``."""
    if len(set(names)) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("0123456789") + "*"


def _cell(rows: Sequence[Row]) -> Cell:
    values = [row.accuracy for row in rows]
    return Cell(
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        float(np.mean([row.standard_error for row in rows])),
        len(values),
        float(np.mean([row.chance for row in rows])),
    )


def to_markdown(cells: dict[Key, Cell]) -> str:
    """Return a Markdown table: lines for groups of runs, protocols and networks, columns for labels and data."""
    columns = list(dict.fromkeys((key.data, key.column) for key in cells))
    several = len({data for data, _ in columns}) > 1
    heads = [f"{data}: {column}" if several else column for data, column in columns]
    lines = [["run", "protocol", "features", *heads]]
    for start in dict.fromkeys((key.group, key.protocol, key.features) for key in cells):
        in_line = [cells.get(Key(start[0], data, start[1], start[2], column)) for data, column in columns]
        lines.append([*start, *(cell.text() if cell else "" for cell in in_line)])
    chances = [chance_text(c.chance for k, c in cells.items() if (k.data, k.column) == one) for one in columns]
    lines.append(["", "", "chance", *chances])
    return markdown(lines)


def to_csv(cells: dict[Key, Cell]) -> str:
    """Return CSV with a line for each figure, with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Key._fields + Cell._fields)
    writer.writerows(key + cell for key, cell in cells.items())
    return out.getvalue()


def figure(cells: dict[Key, Cell], file: str | Path) -> Path:
    """Draw a panel for each label and data: a mark for each run and network, by protocol; return the path.

    Error bars are the deviation over seeds, or for one run its standard error; a dotted line is chance.
    """
    from jepa_kit.plotting import Figure, colormaps, save_figure

    panels = list(dict.fromkeys((key.data, key.column) for key in cells))
    names = list(dict.fromkeys(_series(key) for key in cells))
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    protocols = {one: list(dict.fromkeys(k.protocol for k in cells if (k.data, k.column) == one)) for one in panels}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.2 + 0.42 * max(len(found) for found in protocols.values()) + 0.1 * len(names)
    fig = Figure(figsize=(4.2 * columns, height * rows + 0.5))
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax, one in zip(axes.flat, panels, strict=False):
        places = {protocol: -k for k, protocol in enumerate(protocols[one])}
        for n, name in enumerate(names):
            found = [(k, c) for k, c in cells.items() if (k.data, k.column) == one and _series(k) == name]
            if not found:
                continue
            y = [places[k.protocol] + 0.6 * (0.5 - (n + 0.5) / len(names)) for k, _ in found]
            x = [100 * c.mean for _, c in found]
            bars = [100 * (c.standard_error if c.deviation is None else c.deviation) for _, c in found]
            marker = "o" if not name.endswith(BASELINES) else "s"
            ax.errorbar(
                x, y, xerr=bars, fmt=marker, ms=5, capsize=2, lw=1.2, color=colours[n % len(colours)], label=name
            )
        chance = common_chance(c.chance for k, c in cells.items() if (k.data, k.column) == one)
        if chance is not None:
            ax.axvline(100 * chance, color="0.6", ls=":", lw=1)
        ax.set_yticks(list(places.values()), list(places))
        ax.set_ylim(-len(places) + 0.5, 0.5)
        ax.set_title(f"{one[0]}: {one[1]}", fontsize=10)
        ax.set_xlabel("%")
        ax.grid(axis="x", color="0.9")
        for k in range(1, len(places)):
            ax.axhline(0.5 - k, color="0.92", lw=0.8)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    handles = {name: mark for ax in axes.flat for mark, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, len(handles)), fontsize=9)
    fig.tight_layout(rect=(0, 0.35 / fig.get_figheight() * -(-len(handles) // 4) + 0.02, 1, 1))
    return save_figure(fig, file, dpi=130)


def _series(key: Key) -> str:
    """Return the name of a series of marks: the group and the network, without layers."""
    return f"{key.group}: {key.features.partition(',')[0]}"
