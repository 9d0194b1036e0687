"""Figures of a study: a forest plot of differences from the base arm, and accuracy over FLOP or side by side."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_kit.plotting import Axes, Figure, colormaps, save_figure
from jepa_kit.studies.cells import Job
from jepa_kit.studies.summary import Outcome, Summary

DPI = 150
PANELS = 3
"""Panels in a row."""
BETTER, WORSE, NEITHER = "#1b7837", "#b2182b", "0.45"
OF_ARMS = "#2166ac"
WIDE = 10
"""Ratio of the largest and the smallest cost from which their axis is logarithmic."""
ALIKE = 1.05
"""Ratio of the largest and the smallest cost up to which they are drawn as one."""
LINES = ("--", ":", "-.", (0, (1, 3)))
"""Line styles of baselines."""


def draw_differences(summary: Summary, file: Path) -> list[Path]:
    """Draw a forest plot with a panel for each outcome: means of paired differences, with their intervals.

    Returns:
        the path; nothing if there is no difference to draw.
    """
    arms = summary.arms[1:]
    outcomes = [x for x in summary.outcomes if any(a.figures[x].against_base for a in arms if x in a.figures)]
    if not outcomes:
        return []
    fig, axes = _panels_of_arms([arm.name for arm in arms], len(outcomes))
    for ax, outcome in zip(axes.flat, outcomes, strict=False):
        for place, arm in enumerate(arms):
            compared = arm.figures[outcome].against_base if outcome in arm.figures else None
            if compared is None:
                continue
            colour = (BETTER if compared.mean > 0 else WORSE) if compared.distinguishable else NEITHER
            if compared.low is not None and compared.high is not None:
                ax.plot([100 * compared.low, 100 * compared.high], [-place] * 2, color=colour, lw=1.6)
            ax.plot(100 * compared.mean, -place, "s", color=colour, ms=5)
        ax.axvline(0, color="black", lw=0.8)
        ax.set_title(summary.heading(outcome, "\n"), fontsize=9)
        ax.set_xlabel("points against the base arm", fontsize=8)
    _hide(list(axes.flat)[len(outcomes) :])
    _head(fig, summary, f"base arm {summary.arms[0].name}, 95 % intervals over seeds")
    return [save_figure(fig, file, dpi=DPI, format=file.suffix[1:])]


def draw_cost(summary: Summary, file: Path) -> list[Path]:
    """Draw accuracy over the TFLOP of a run, with a panel for each outcome, a mark for each arm, lines for baselines.

    If all runs cost the same, arms stand below each other, with their names, and each has its own baselines.

    Returns:
        the path; nothing if there is no figure to draw.
    """
    outcomes = [x for x in summary.outcomes if any(x in arm.figures for arm in summary.arms)]
    if not outcomes:
        return []
    kinds = [job.baseline for job in summary.plan.baselines if job.title in summary.baselines]
    styles = dict(zip(dict.fromkeys(kinds), itertools.cycle(LINES)))
    costs = [arm.tflop for arm in summary.arms]
    columns = min(PANELS, len(outcomes))
    if max(costs) <= ALIKE * min(costs):
        draw, legend_columns = _draw_rows, len(styles)
        fig, axes = _panels_of_arms([arm.name for arm in summary.arms], len(outcomes))
    else:
        draw, legend_columns = _draw_over_cost, columns
        rows = -(-len(outcomes) // columns)
        legend = 0.35 + 0.2 * -(-(len(summary.arms) + len(styles)) // columns)
        fig = Figure(figsize=(0.8 + 3.0 * columns, 2.9 * rows + legend), layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False)
    for ax, outcome in zip(axes.flat, outcomes, strict=False):
        draw(ax, summary, outcome, styles)
        ax.set_title(summary.heading(outcome, "\n"), fontsize=9)
    _hide(list(axes.flat)[len(outcomes) :])
    _head(fig, summary, "accuracy of each seed, mean and standard deviation")
    handles = {name: mark for ax in axes.flat for mark, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=legend_columns, fontsize=8)
    return [save_figure(fig, file, dpi=DPI, format=file.suffix[1:])]


def _draw_rows(ax: Axes, summary: Summary, outcome: Outcome, styles: Mapping[str | None, Any]) -> None:
    """Draw arms in rows of a panel of ``_panels_of_arms``, and baselines in the rows of their arms."""
    for k, values, mean, bar in _accuracies(summary, outcome):
        ax.plot(values, [-k] * len(values), "|", color=NEITHER, ms=7)
        ax.errorbar(mean, -k, xerr=bar, fmt="s", ms=5, color=OF_ARMS)
    for job, accuracy, look in _baselines(summary, outcome, styles):
        places = [place for k in job.arms for place in (-k + 0.5, -k - 0.5, math.nan)]
        ax.plot([accuracy] * len(places), places, **look)
    ax.set_xlabel(f"%, with {summary.arms[0].tflop:.3g} TFLOP a run", fontsize=8)


def _draw_over_cost(ax: Axes, summary: Summary, outcome: Outcome, styles: Mapping[str | None, Any]) -> None:
    """Draw arms over their cost, and baselines as lines."""
    colours = colormaps["tab10" if len(summary.arms) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    costs = [arm.tflop for arm in summary.arms]
    for k, values, mean, bar in _accuracies(summary, outcome):
        colour, form = colours[k % len(colours)], "o" if k < len(colours) else "s"
        ax.plot([costs[k]] * len(values), values, ".", color=colour)
        label = summary.arms[k].name
        ax.errorbar(costs[k], mean, yerr=bar, fmt=form, capsize=3, color=colour, label=label, alpha=0.75)
    for _, accuracy, look in _baselines(summary, outcome, styles):
        ax.axhline(accuracy, **look)
    ax.set_xlabel("TFLOP of a run", fontsize=8)
    ax.set_ylabel("%", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(color="0.92")
    ax.margins(x=0.15)
    if max(costs) > WIDE * min(costs):
        ax.set_xscale("log")


def _accuracies(summary: Summary, outcome: Outcome) -> Iterator[tuple[int, list[float], float, float | None]]:
    """Yield the number of each arm with figures, and in % those of its seeds, their mean and their deviation."""
    for k, arm in enumerate(summary.arms):
        figure = arm.figures.get(outcome)
        if figure is not None:
            bar = None if figure.deviation is None else 100 * figure.deviation
            yield k, [100 * value for value in figure.values.values()], 100 * figure.mean, bar


def _baselines(
    summary: Summary, outcome: Outcome, styles: Mapping[str | None, Any]
) -> Iterator[tuple[Job, float, dict[str, Any]]]:
    """Yield each baseline that has a figure, the figure in %, and how its line looks."""
    for job in summary.plan.baselines:
        row = summary.baselines.get(job.title, {}).get(outcome)
        if row is not None:
            look = {"color": "0.4", "ls": styles[job.baseline], "lw": 1, "label": f"{job.baseline} (baseline)"}
            yield job, 100 * row.accuracy, look


def _panels_of_arms(names: Sequence[str], count: int) -> tuple[Figure, Any]:
    """Return a figure with panels that share rows, one for each arm from the top, at 0, -1, ..., and the panels."""
    columns = min(PANELS, count)
    rows = -(-count // columns)
    names = [textwrap.fill(name, 34) for name in names]
    lines = sum(1 + name.count("\n") for name in names)
    fig = Figure(figsize=(2.6 + 2.7 * columns, rows * (1.4 + 0.26 * lines)), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
    for ax in axes.flat:
        ax.set_yticks([-place for place in range(len(names))], names, fontsize=8)
        ax.set_ylim(-len(names) + 0.4, 0.6)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="x", color="0.92")
    return fig, axes


def _head(fig: Figure, summary: Summary, text: str) -> None:
    fig.suptitle("\n".join(filter(None, [f"{summary.plan.name}: {text}", summary.protocol])), fontsize=9)


def _hide(axes: Sequence[Axes]) -> None:
    for ax in axes:
        ax.axis("off")
