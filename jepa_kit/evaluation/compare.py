"""Results of any number of runs in one table and one figure; runs that differ by their seed alone become one.

A run is a folder (its ``evaluation`` folder, and ``results.json`` in it or beside it) or a file of results.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_kit.evaluation.report import Row, describe, markdown
from jepa_kit.evaluation.results import read_results

NEVER_TELLS = (
    ("train", "seed"),
    ("train", "output_dir"),
    ("train", "log_every"),
    ("train", "checkpoint"),
    ("train", "checkpoint_dir"),
    ("train", "checkpoint_every"),
    ("train", "keep_checkpoints"),
    ("train", "keep_every"),
    ("train", "tensorboard"),
    ("train", "wandb"),
    ("train", "device"),
    ("train", "attention"),
    ("data", "num_workers"),
    ("data", "prefetch"),
    ("data", "shards"),
    ("data", "cache"),
    ("data", "cache_gb"),
    ("data", "retries"),
    ("data", "backoff"),
    ("data", "timeout"),
)
"""What a config may differ in and still be the same recipe; and in all of ``evaluate``, which never touches a run."""
BASELINES = ("untrained", "pixels")


class Run(NamedTuple):
    """The rows of one run: its name, what its recipe and its data are, its seed, and rows with their step."""

    name: str
    recipe: str
    seed: int
    rows: list[tuple[str, Row]]


class Key(NamedTuple):
    """What a figure is about; runs of one group that agree in it are averaged."""

    group: str
    data: str
    protocol: str
    features: str
    column: str


@dataclass(frozen=True)
class Cell:
    """A figure over seeds, in [0, 1].

    Args:
        mean: over the runs.
        deviation: over the runs (n - 1 below); None for one run.
        standard_error: of one run's figure, as its row has it (the mean over runs).
        runs: how many.
        chance: the best constant answer's.
    """

    mean: float
    deviation: float | None
    standard_error: float
    runs: int
    chance: float

    def text(self) -> str:
        """In percent, with the deviation over seeds, or for one run its standard error in brackets."""
        if self.deviation is None:
            return f"{100 * self.mean:.1f} ({100 * self.standard_error:.1f})"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


def load(path: str | Path) -> Run:
    """A run's results; where two files answer one question, the newer one.

    Raises:
        ValueError: no results there, or results of runs of different recipes in one folder.
        FileNotFoundError: there is no such file or folder.
    """
    path = Path(path)
    files = _files(path)
    contents = [read_results(file) for file in files]
    recipes = {_recipe(content) for content in contents}
    if len(recipes) > 1:
        raise ValueError(f"{path} holds results of {len(recipes)} recipes; name their files one by one")
    newest: dict[tuple[Any, ...], tuple[str, Row]] = {}
    for content in contents:
        data = _data(content)
        for raw in content["rows"]:
            row = Row(**raw)
            newest[data, row.title, row.network, row.layers, row.seed, row.column] = (data, row)
    return Run(_name(path), recipes.pop(), contents[0]["seeds"]["run"], list(newest.values()))


def _name(path: Path) -> str:
    """The run's folder, as a reader calls it."""
    place = path.resolve()
    place = place.parent if place.is_file() else place
    while place.name in ("run", "evaluation"):
        place = place.parent
    return place.name or str(path)


def _files(path: Path) -> list[Path]:
    """Files of results, the oldest first."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a run is a folder or a file of results")
    places = [*path.glob("evaluation/*.json"), *path.glob("results.json"), *path.glob("run/evaluation/*.json")]
    if not places:
        raise ValueError(f"{path} holds no results (evaluation/*.json or results.json): tools/eval_net.py makes them")
    return sorted(places, key=lambda file: (file.stat().st_mtime_ns, file.name))


def _recipe(content: dict[str, Any]) -> str:
    """What runs that differ by their seed alone have in common."""
    config = json.loads(json.dumps(content["config"]))
    config.pop("versions", None)
    config.pop("evaluate", None)
    for section, key in NEVER_TELLS:
        config.get(section, {}).pop(key, None)
    step = (content["checkpoint"] or {}).get("step")
    return json.dumps({"config": config, "step": step}, sort_keys=True)


def _data(content: dict[str, Any]) -> str:
    """The test data, as a reader calls it: the folder, without `test` or `val`."""
    path = Path(content["data"]["test"]["shards"])
    return path.parent.name if path.name in ("test", "val") and path.parent.name else path.name


def compare(runs: Sequence[Run]) -> dict[Key, Cell]:
    """Every figure, averaged over runs of one recipe; in the order of the runs.

    Raises:
        ValueError: no run, or one run's seed twice in a group.
    """
    if not runs:
        raise ValueError("runs (=[]) must be at least one")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    found: dict[Key, list[Row]] = {}
    for members in groups.values():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(run.name for run in members)
            raise ValueError(f"runs {names} have one recipe and seeds {seeds}: each seed may be there once")
        group = _common([run.name for run in members])
        for run in members:
            for data, row in run.rows:
                key = Key(group, data, row.title, describe(row.network, row.layers), row.column)
                found.setdefault(key, []).append(row)
    return {key: _cell(rows) for key, rows in found.items()}


def _common(names: Sequence[str]) -> str:
    """One name for several: what they begin with, as ``scenes_seed*``."""
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
    """One table: a line for each run (or seeds of one), protocol and network; a column for each label of each data."""
    columns = list(dict.fromkeys((key.data, key.column) for key in cells))
    several = len({data for data, _ in columns}) > 1
    heads = [f"{data}: {column}" if several else column for data, column in columns]
    lines = [["run", "protocol", "features", *heads]]
    for start in dict.fromkeys((key.group, key.protocol, key.features) for key in cells):
        held = [cells.get(Key(start[0], data, start[1], start[2], column)) for data, column in columns]
        lines.append([*start, *(cell.text() if cell else "" for cell in held)])
    chances = [{round(c.chance, 4) for k, c in cells.items() if (k.data, k.column) == one} for one in columns]
    lines.append(["", "", "chance", *(f"{100 * c.pop():.1f}" if len(c) == 1 else "" for c in chances)])
    return markdown(lines)


def to_csv(cells: dict[Key, Cell]) -> str:
    """A line for each figure, with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*Key._fields, "mean", "deviation", "standard_error", "runs", "chance"])
    for key, cell in cells.items():
        deviation = "" if cell.deviation is None else cell.deviation
        writer.writerow([*key, cell.mean, deviation, cell.standard_error, cell.runs, cell.chance])
    return out.getvalue()


def figure(cells: dict[Key, Cell], file: str | Path) -> Path:
    """One panel for each label of each data set: a mark for each run and network, by protocol; chance as a line.

    Bars are the deviation over seeds, or for one run its standard error.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((key.data, key.column) for key in cells))
    names = list(dict.fromkeys(_series(key) for key in cells))
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    protocols = {one: list(dict.fromkeys(k.protocol for k in cells if (k.data, k.column) == one)) for one in panels}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.2 + 0.42 * max(len(found) for found in protocols.values()) + 0.1 * len(names)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, height * rows + 0.5), squeeze=False)
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
        chances = {round(c.chance, 4) for k, c in cells.items() if (k.data, k.column) == one}
        for value in chances if len(chances) == 1 else ():
            ax.axvline(100 * value, color="0.6", ls=":", lw=1)
        ax.set_yticks(list(places.values()), list(places))
        ax.set_ylim(-len(places) + 0.5, 0.5)
        ax.set_title(f"{one[0]}: {one[1]}", fontsize=10)
        ax.set_xlabel("%")
        ax.grid(axis="x", color="0.9")
        for k in range(1, len(places)):
            ax.axhline(0.5 - k, color="0.92", lw=0.8)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, len(handles)), fontsize=9)
    fig.tight_layout(rect=(0, 0.35 / fig.get_figheight() * -(-len(handles) // 4) + 0.02, 1, 1))
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=130)
    plt.close(fig)
    return file


def _series(key: Key) -> str:
    """What one mark stands for: the run and the network, whatever layers a protocol took."""
    return f"{key.group}: {key.features.partition(',')[0]}"
