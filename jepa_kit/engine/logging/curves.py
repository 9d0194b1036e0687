"""Draw ``curves.png`` from the lines of a run: loss and its terms, schedules, speed; below them the values of hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jepa_kit.engine.logging.telemetry import Record, read_metrics

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


TRAINING = (
    Panel("learning rate", ("lr",)),
    Panel("weight decay", ("weight_decay",)),
    Panel("momentum", ("momentum",)),
    Panel("gradient norm", ("grad_norm",)),
    Panel("images / s", ("images_per_second",), 1.0, True),
    Panel("mfu, % of the measured matrix peak", ("mfu",), 100.0, True),
    Panel("waited for images, % of time", ("data_wait",), 100.0, True),
    Panel("peak memory, GiB", ("peak_memory_gib", "reserved_memory_gib"), 1.0, True),
)

OWN = ("loss", "figures", "data")
"""Groups of values that are not from hooks."""
COLUMNS = 4


def drawn(what: str, draw: Callable[[], T]) -> T | None:
    """Return the result of ``draw``; if it fails, warn on stderr and return None, so that other results are kept."""
    try:
        return draw()
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"warning: {what} was not drawn: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def plot_curves(folder: Path, panels: Sequence[Panel] = ()) -> Path | None:
    """Draw ``curves.png`` from ``metrics.jsonl``; return its path, or None if there is no line to draw.

    Args:
        folder: of the run.
        panels: see ``curves_figure``.
    """
    figure = curves_figure(folder, panels)
    if figure is None:
        return None
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    return path


def curves_figure(folder: Path, panels: Sequence[Panel] = ()) -> Figure | None:
    """Return the curves of a run, from ``metrics.jsonl``, as a figure; None if there is no line to draw.

    Args:
        folder: of the run.
        panels: for values that hooks return; any other value of a hook gets a panel of its own.
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

    grid = parts[0].add_gridspec(1 + rows, COLUMNS, height_ratios=[1.8, *[1] * rows])
    terms = sorted(key for key in given if key.startswith("loss/"))
    loss = Panel("loss", ("loss", *(terms if len(terms) > 1 else [])))
    _draw(parts[0].add_subplot(grid[0, :]), records, loss, last, small=False)
    for number, panel in enumerate(training):
        _draw(parts[0].add_subplot(grid[1 + number // COLUMNS, number % COLUMNS]), records, panel, last, color="gray")
    if below:
        parts[1].suptitle("evaluation during the run")
        grid = parts[1].add_gridspec(below, COLUMNS)
        for number, panel in enumerate(measured):
            _draw(parts[1].add_subplot(grid[number // COLUMNS, number % COLUMNS]), records, panel, last, marker=".")
    return figure


def _present(panels: Sequence[Panel], given: set[str]) -> list[Panel]:
    """Return the panels restricted to the values that the lines have, without empty panels."""
    present = [panel._replace(keys=tuple(key for key in panel.keys if key in given)) for panel in panels]
    return [panel for panel in present if panel.keys]


def _points(records: Sequence[Record], key: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """Return (updates, values) of the lines that have a value."""
    having = [record for record in records if key in record]
    return [record["step"] + 1 for record in having], [factor * record[key] for record in having]


def _draw(axes: Any, records: Sequence[Record], panel: Panel, last: float, *, small: bool = True, **style: str) -> None:
    """Draw the values of a panel over the updates of a run; the loss is larger than the others."""
    from jepa_kit.plotting import MaxNLocator

    for key in panel.keys:
        label = key.rpartition("/")[2].replace("_", " ")
        axes.plot(*_points(records, key, panel.factor), linewidth=1.2, label=label, **style)
    axes.set_title(panel.title, fontsize="medium" if small else "large")
    axes.tick_params(labelsize="small" if small else "medium")
    if panel.names:
        axes.set_yticks(range(len(panel.names)), [name.replace(" ", "\n") for name in panel.names])
        axes.set_ylim(-0.3, len(panel.names) - 0.7)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if len(panel.keys) > 1 or panel.title.startswith("accuracy"):  # which probe it is, the title does not say
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
