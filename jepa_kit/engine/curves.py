"""``curves.png``: the lines of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_kit.engine.telemetry import Record, read_metrics

PANELS = (
    ("lr", "learning rate", 1.0),
    ("weight_decay", "weight decay", 1.0),
    ("momentum", "momentum", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("images_per_second", "images / s", 1.0),
    ("share_of_peak", "share of matrix peak, %", 100.0),
    ("data_wait", "waited for images, % of time", 100.0),
    ("peak_memory_gib", "peak memory, GiB", 1.0),
)
"""Value, title, and by what it is multiplied."""

OWN = ("loss", "data")
"""First words of names that are no hook's."""
COLUMNS = 4


def plot_curves(folder: Path) -> Path | None:
    """Draws ``curves.png`` from ``metrics.jsonl``: loss and its terms, what the steps ran with, speed, hooks' values.

    Returns:
        the picture's path, or None where there is no line to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    records = read_metrics(folder)
    if not records:
        return None
    given = {key for record in records for key in record}
    panels = [panel for panel in PANELS if panel[0] in given]
    hooks = sorted(key for key in given if "/" in key and key.split("/")[0] not in OWN)
    rows, hook_rows = -(-len(panels) // COLUMNS), -(-len(hooks) // COLUMNS)
    figure = Figure(figsize=(12, 3.4 + 1.9 * (rows + hook_rows)), layout="constrained")
    grid = figure.add_gridspec(1 + rows + hook_rows, COLUMNS, height_ratios=[1.8, *[1] * (rows + hook_rows)])
    last = max(record["step"] for record in records) + 1

    loss = figure.add_subplot(grid[0, :])
    terms = sorted(key for key in given if key.startswith("loss/"))
    for key in ["loss", *(terms if len(terms) > 1 else [])]:
        loss.plot(*_points(records, key), linewidth=1.2, label=key.removeprefix("loss/"))
    loss.set_title("loss")
    loss.set_xlabel("update")
    if len(terms) > 1:
        loss.legend(frameon=False)
    _finish(loss, last, ticks=10)
    for number, (key, title, factor) in enumerate(panels):
        panel = figure.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS])
        _small(panel, records, key, title, factor, last)
    for number, key in enumerate(hooks):
        panel = figure.add_subplot(grid[1 + rows + number // COLUMNS, number % COLUMNS])
        _small(panel, records, key, key, 1.0, last, color="tab:orange", marker=".")
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    return path


def _points(records: Sequence[Record], key: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """(updates, values) of the lines that have a value."""
    having = [record for record in records if key in record]
    return [record["step"] + 1 for record in having], [factor * record[key] for record in having]


def _small(
    panel: Any,
    records: Sequence[Record],
    key: str,
    title: str,
    factor: float,
    last: float,
    *,
    color: str = "tab:gray",
    marker: str | None = None,
) -> None:
    panel.plot(*_points(records, key, factor), linewidth=1.2, color=color, marker=marker)
    panel.set_title(title, fontsize="medium")
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.tick_params(labelsize="small")
    if key in ("images_per_second", "share_of_peak", "data_wait", "peak_memory_gib"):
        most = max(record[key] for record in records if key in record)
        panel.set_ylim(0, 1.08 * factor * most or 1)  # how much it is matters, and not only how it moves
    _finish(panel, last, ticks=4)


def _finish(panel: Any, last: float, *, ticks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.3)
    panel.set_xlim(0, max(last, 2))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))
