"""Draw ``curves.png`` from the lines of a run: loss and its terms, schedules, speed; below them the values of hooks.

``plot_curves`` draws one run, also in front of another one in grey; ``plot_runs`` draws several, each in its colour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jepa_kit.engine.logging.telemetry import Record, read_metrics
from jepa_kit.run_folder import METRICS

if TYPE_CHECKING:
    from jepa_kit.plotting import Figure

T = TypeVar("T")


class Panel(NamedTuple):
    """A small plot: its title, the values that it draws, and a factor that they are multiplied by."""

    title: str
    keys: tuple[str, ...]
    factor: float = 1.0
    from_zero: bool = False
    """Whether the axis begins at 0."""
    names: tuple[str, ...] = ()
    """Labels of the values 0, 1, ..., if they are categories."""
    compared: bool = True
    """Whether it is drawn for several runs: speed and memory are those of a machine, schedules those of a config."""


TRAINING = (
    Panel("learning rate", ("lr",), compared=False),
    Panel("weight decay", ("weight_decay",), compared=False),
    Panel("momentum", ("momentum",), compared=False),
    Panel("gradient norm", ("grad_norm",)),
    Panel("images / s", ("images_per_second",), 1.0, True, compared=False),
    Panel("mfu, % of the measured matrix peak", ("mfu",), 100.0, True, compared=False),
    Panel("waited for images, % of time", ("data_wait",), 100.0, True, compared=False),
    Panel("peak memory, GiB", ("peak_memory_gib", "reserved_memory_gib"), 1.0, True, compared=False),
)

OWN = ("loss", "figures", "data")
"""Groups of values that are not from hooks."""
COLUMNS = 4
LINES = ("-", "--", ":", "-.", (0, (5, 1)))
"""Styles of the values of a panel, if colours distinguish runs."""


class Beside(NamedTuple):
    """Another run, drawn in grey: its name and its lines."""

    name: str
    records: Sequence[Record]


def drawn(what: str, draw: Callable[[], T]) -> T | None:
    """Return the result of ``draw``; if it fails, warn on stderr and return None, so that other results are kept."""
    try:
        return draw()
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"warning: {what} was not drawn: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def plot_curves(folder: Path, panels: Sequence[Panel] = (), beside: Beside | None = None) -> Path | None:
    """Draw ``curves.png`` from ``metrics.jsonl``; return its path, or None if there is no line to draw.

    Args:
        folder: of the run.
        panels, beside: see ``curves_figure``.
    """
    figure = curves_figure(folder, panels, beside)
    if figure is None:
        return None
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    return path


def curves_figure(folder: Path, panels: Sequence[Panel] = (), beside: Beside | None = None) -> Figure | None:
    """Return the curves of a run, from ``metrics.jsonl``, as a figure; None if there is no line to draw.

    Args:
        folder: of the run.
        panels: for values that hooks return; any other value of a hook gets a panel of its own.
        beside: a run to compare with, as far as this one goes: its loss, gradients and values of hooks.
    """
    from jepa_kit.plotting import Figure

    records = read_metrics(folder)
    if not records:
        return None
    given = {key for record in records for key in record}
    training, measured = _present(TRAINING, given), _present(panels, given)
    figures = sorted(key for key in given if key.startswith("figures/"))
    training += [Panel(key.removeprefix("figures/").replace("_", " "), (key,)) for key in figures]
    drawn = {key for panel in measured for key in panel.keys}
    others = sorted(key for key in given - drawn if "/" in key and key.split("/")[0] not in OWN)
    measured += [Panel(key, (key,)) for key in others]
    rows, below = -(-len(training) // COLUMNS), -(-len(measured) // COLUMNS)
    heights = [3.4 + 1.9 * rows, *([0.3 + 2.2 * below] if below else [])]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    last = max(record["step"] for record in records) + 1
    if beside:
        beside = beside._replace(records=[record for record in beside.records if record["step"] < last])

    grid = parts[0].add_gridspec(1 + rows, COLUMNS, height_ratios=[1.8, *[1] * rows])
    terms = sorted(key for key in given if key.startswith("loss/"))
    loss = Panel("loss", ("loss", *(terms if len(terms) > 1 else [])))
    _draw(parts[0].add_subplot(grid[0, :]), records, loss, last, beside=beside, small=False)
    for number, panel in enumerate(training):
        place = parts[0].add_subplot(grid[1 + number // COLUMNS, number % COLUMNS])
        theirs, colour = (beside if panel.compared else None), "C0" if beside else "gray"
        _draw(place, records, panel, last, beside=theirs, color=colour)
    if below:
        parts[1].suptitle("evaluation during the run")
        grid = parts[1].add_gridspec(below, COLUMNS)
        for number, panel in enumerate(measured):
            place = parts[1].add_subplot(grid[number // COLUMNS, number % COLUMNS])
            _draw(place, records, panel, last, beside=beside if panel.compared else None, marker=".")
    return figure


def _present(panels: Sequence[Panel], given: set[str]) -> list[Panel]:
    """Return the panels restricted to the values that the lines have, without empty panels."""
    present = [panel._replace(keys=tuple(key for key in panel.keys if key in given)) for panel in panels]
    return [panel for panel in present if panel.keys]


def _points(records: Sequence[Record], key: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """Return (updates, values) of the lines that have a value."""
    having = [record for record in records if key in record]
    return [record["step"] + 1 for record in having], [factor * record[key] for record in having]


def _draw(
    axes: Any,
    records: Sequence[Record],
    panel: Panel,
    last: float,
    *,
    beside: Beside | None = None,
    small: bool = True,
    **style: str,
) -> None:
    """Draw the values of a panel over the updates of a run; the loss is larger than the others."""
    from jepa_kit.plotting import MaxNLocator

    drawn = [key for key in panel.keys if beside and any(key in record for record in beside.records)]
    for key, line in zip(drawn, LINES, strict=False):
        assert beside is not None
        label = None if small or key != panel.keys[0] else beside.name
        theirs: dict[str, Any] = {**style, "color": "0.75", "linestyle": line, "label": label}
        axes.plot(*_points(beside.records, key, panel.factor), linewidth=2, **theirs)
    for key in panel.keys:
        label = "this run" if drawn and key == "loss" else key.rpartition("/")[2].replace("_", " ")
        axes.plot(*_points(records, key, panel.factor), linewidth=1.2, label=label, **style)
    axes.set_title(panel.title, fontsize="medium" if small else "large")
    axes.tick_params(labelsize="small" if small else "medium")
    if panel.names:
        axes.set_yticks(range(len(panel.names)), [name.replace(" ", "\n") for name in panel.names])
        axes.set_ylim(-0.3, len(panel.names) - 0.7)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if (
        len(panel.keys) > 1 or (drawn and not small) or panel.title.startswith("accuracy")
    ):  # which probe it is, the title does not say
        axes.legend(frameon=False, fontsize="x-small" if small else "medium")
    if panel.from_zero:
        most = max(max(_points(records, key, panel.factor)[1]) for key in panel.keys)
        axes.set_ylim(0, 1.08 * most or 1)
    if not small:
        axes.set_xlabel("update")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_xlim(0, max(last, 2))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if small else 10, integer=True))


def plot_runs(runs: Mapping[str, Path], path: Path, panels: Sequence[Panel] = ()) -> Path:
    """Draw loss, gradients and values of hooks of several runs over the images that they have seen.

    Args:
        runs: name -> folder; each gets a colour.
        path: of the picture, whose suffix is its format.
        panels: for values that hooks return.

    Returns:
        the path.

    Raises:
        ValueError: a run has no line to draw.
    """
    from jepa_kit.plotting import Figure, Line2D, MaxNLocator

    lines = {name: read_metrics(folder) for name, folder in runs.items()}
    for name, records in lines.items():
        if not records:
            raise ValueError(f"{name} (={str(runs[name])!r}) has no {METRICS}, or one without lines")
    given = {key for records in lines.values() for record in records for key in record}
    training = [Panel("loss", ("loss",)), *_present(TRAINING, given)]
    present = [panel for panel in (*training, *_present(panels, given)) if panel.compared]
    columns, most = (
        min(COLUMNS, len(present)),
        max(record["samples"] for records in lines.values() for record in records),
    )
    rows = -(-len(present) // columns)
    figure = Figure(
        figsize=(3 * columns + 1, 2.4 * rows + 0.25 * -(-len(lines) // columns) + 0.2), layout="constrained"
    )
    for number, panel in enumerate(present):
        axes = figure.add_subplot(rows, columns, number + 1)
        for run, records in enumerate(lines.values()):
            for key, style in zip(panel.keys, LINES, strict=False):
                having = [record for record in records if key in record]
                images, values = [r["samples"] for r in having], [panel.factor * r[key] for r in having]
                label = key.rpartition("/")[2].replace("_", " ") if run == 0 else None
                axes.plot(images, values, color=f"C{run}", linestyle=style, linewidth=1.2, label=label)
        axes.set_title(panel.title, fontsize="medium")
        axes.tick_params(labelsize="small")
        if panel.names:
            axes.set_yticks(range(len(panel.names)), [name.replace(" ", "\n") for name in panel.names])
            axes.set_ylim(-0.3, len(panel.names) - 0.7)
        if len(panel.keys) > 1:
            axes.legend(frameon=False, fontsize="x-small")
        if number >= len(present) - columns:
            axes.set_xlabel("images seen", fontsize="small")
        axes.set_xlim(0, most)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    handles = [Line2D([], [], color=f"C{run}", label=name) for run, name in enumerate(lines)]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
