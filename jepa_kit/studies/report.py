"""The report of a study: Markdown to read, CSV and JSON to compute with, and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jepa_kit.evaluation.tables.table import chance_text, markdown
from jepa_kit.files import write_text
from jepa_kit.progress import number_of
from jepa_kit.studies.records import write_json
from jepa_kit.studies.statistics import CONFIDENCE, POWER
from jepa_kit.studies.summary import ArmSummary, Figure, Outcome, Summary

REPORT = "report"
"""Files of the report in the folder of results: report.md, .csv, .json."""
MATCHED = {
    "none": "Each arm has the length of its config",
    "steps": "All arms have the same number of steps",
    "images": "All arms see the same number of images",
    "flops": "All arms have the same FLOP (within 1 %)",
}


def to_markdown(summary: Summary) -> str:
    """Return the report as Markdown."""
    study, arms = summary.plan.study, summary.arms
    done = sum(len(next(iter(arm.figures.values())).values) if arm.figures else 0 for arm in arms)
    cells = len(arms) * len(study.seeds)
    parts = [
        f"# {summary.plan.name}",
        f"{len(arms)} arms, seeds {', '.join(map(str, study.seeds))}; {done} of {cells} cells have figures. Base arm: "
        f"{arms[0].name}. {MATCHED[study.match]}. Matrix products in {study.precision}"
        + (f" on {' and on '.join(summary.machines)}." if summary.machines else "."),
    ]
    if summary.outcomes:
        parts += ["## Figures", _figures_note(summary), markdown(figure_lines(summary))]
    if any(figure.against_base for arm in arms for figure in arm.figures.values()):
        parts += ["## Differences from the base arm", _differences_note(summary), markdown(difference_lines(summary))]
        parts += ["![differences](differences.png)"]
    parts += ["## Cost", markdown(cost_lines(arms))]
    if summary.outcomes:
        parts += ["![accuracy over TFLOP](cost.png)"]
    notes = [*(note for arm in arms for note in arm.notes), *summary.baseline_notes]
    if notes:
        parts += ["## Failed, collapsed, or without a result", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _figures_note(summary: Summary) -> str:
    errors = [100 * f.standard_error for arm in summary.arms for f in arm.figures.values()]
    size = " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(errors), max(errors)))) if errors else "unknown"
    heading = f"{summary.protocol[0].upper()}{summary.protocol[1:]}. " if summary.protocol else ""
    jobs = summary.plan.baselines
    several = [job for job in jobs if sum(other.baseline == job.baseline for other in jobs) > 1]
    owners = [f"*{job.title}* is of {' and of '.join(summary.arms[k].name for k in job.arms)}" for job in several]
    return (
        f"{heading}In %: mean ± standard deviation over seeds; baselines, which have no seeds, with the standard error "
        f"of the test set in brackets. All arms share the test set; its standard error for one figure is {size} points."
        + (f" Networks differ: {'; '.join(owners)}." if owners else "")
    )


def _differences_note(summary: Summary) -> str:
    found = [figure.against_base for arm in summary.arms for figure in arm.figures.values()]
    compared = sum(difference is not None and difference.low is not None for difference in found)
    if not compared:
        return "In points, of the runs with one seed: an interval needs two seeds or more."
    return (
        f"In points: mean over pairs of runs with one seed, with the {100 * CONFIDENCE:.0f} % interval of the paired t "
        "test. An interval that contains 0: the arm is not distinguishable from the base arm by these runs. Intervals "
        f"cover the variation between seeds, not that between test sets; among {number_of('interval', compared)}, "
        f"{(1 - CONFIDENCE) * compared:.3g} would miss the truth by chance. The last column is the number of seeds "
        f"with which a difference of one point would be found with probability {POWER} (noncentral t), if "
        "the deviation of the differences is as estimated here."
    )


def figure_lines(summary: Summary) -> list[list[str]]:
    """Return the lines of the table of figures: an arm or a baseline each, with a column for each outcome."""
    lines = [["arm", *(summary.heading(outcome) for outcome in summary.outcomes)]]
    lines += [[a.name, *(_percent(a.figures.get(outcome)) for outcome in summary.outcomes)] for a in summary.arms]
    for title, rows in summary.baselines.items():
        cells = [
            f"{100 * rows[x].accuracy:.1f} ({100 * rows[x].standard_error:.1f})" if x in rows else ""
            for x in summary.outcomes
        ]
        lines.append([f"*{title}*", *cells])
    chances = [[a.figures[x].chance for a in summary.arms if x in a.figures] for x in summary.outcomes]
    lines.append(["*chance*", *(chance_text(levels) for levels in chances)])
    return lines


def _percent(figure: Figure | None) -> str:
    if figure is None:
        return ""
    deviation = "" if figure.deviation is None else f" ± {100 * figure.deviation:.1f}"
    return f"{100 * figure.mean:.1f}{deviation}"


def difference_lines(summary: Summary) -> list[list[str]]:
    """Return the lines of the table of differences: one for each arm and outcome."""
    lines = [["arm", "outcome", "difference", "interval", "", "seeds for 1 point"]]
    for arm in summary.arms[1:]:
        for outcome in summary.outcomes:
            figure = arm.figures.get(outcome)
            if figure is None or figure.against_base is None:
                continue
            found = figure.against_base
            interval = "" if found.low is None or found.high is None else _interval(found.low, found.high)
            verdict = {None: "one seed: no interval", False: "not distinguishable", True: _direction(found.mean)}
            lines.append(
                [
                    arm.name,
                    summary.heading(outcome),
                    f"{100 * found.mean:+.1f}",
                    interval,
                    verdict[found.distinguishable],
                    f"{found.seeds_needed:,}" if found.seeds_needed else "",
                ]
            )
    return lines


def _interval(low: float, high: float) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _direction(mean: float) -> str:
    return "better" if mean > 0 else "worse"


def cost_lines(arms: Sequence[ArmSummary]) -> list[list[str]]:
    """Return the lines of the table of cost and verdicts."""
    lines = [["arm", "steps", "images", "TFLOP", "hours", "verdict (seeds)"]]
    for arm in arms:
        hours = "" if arm.hours is None else f"{arm.hours:,.4g}"
        lines.append([arm.name, f"{arm.steps:,}", f"{arm.images:,}", f"{arm.tflop:,.4g}", hours, arm.verdict])
    return lines


COLUMNS = (
    *("arm", "protocol", "label", "seeds", "mean", "deviation", "standard_error", "chance"),
    *("difference", "low", "high", "distinguishable", "seeds_needed", "steps", "images", "tflop", "hours", "verdict"),
)


def table_of(summary: Summary) -> list[dict[str, Any]]:
    """Return a mapping of ``COLUMNS`` for each arm or baseline and outcome, with all digits."""
    found = []
    for arm in summary.arms:
        cost = {key: getattr(arm, key) for key in ("steps", "images", "tflop", "hours", "verdict")}
        for outcome, figure in arm.figures.items():
            own = {key: getattr(figure, key) for key in ("mean", "deviation", "standard_error", "chance")}
            compared: dict[str, Any] = {}
            if (paired := figure.against_base) is not None:
                compared = {"difference": paired.mean, "low": paired.low, "high": paired.high}
                compared |= {"distinguishable": paired.distinguishable, "seeds_needed": paired.seeds_needed}
            found.append({**_names(arm.name, outcome), "seeds": len(figure.values), **own, **compared, **cost})
    for title, rows in summary.baselines.items():
        for outcome, row in rows.items():
            own = {"mean": row.accuracy, "standard_error": row.standard_error, "chance": row.chance}
            found.append({**_names(title, outcome), **own})
    return found


def _names(arm: str, outcome: Outcome) -> dict[str, str]:
    return {"arm": arm, "protocol": outcome.protocol, "label": outcome.label}


def to_csv(summary: Summary) -> str:
    """Return ``table_of`` as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_of(summary))
    return out.getvalue()


def to_json(summary: Summary) -> dict[str, Any]:
    """Return the report as plain values, with the figure of every seed."""
    study = summary.plan.study
    values = [
        {**_names(arm.name, outcome), "seed": seed, "value": value}
        for arm in summary.arms
        for outcome, figure in arm.figures.items()
        for seed, value in figure.values.items()
    ]
    notes = [*(note for arm in summary.arms for note in arm.notes), *summary.baseline_notes]
    return {"study": asdict(study), "table": table_of(summary), "values": values, "notes": notes}


def write_report(summary: Summary, results: Path) -> list[Path]:
    """Write all files of the report into the folder of results and return their paths."""
    from jepa_kit.studies.figures import draw_cost, draw_differences  # matplotlib takes a second

    results.mkdir(parents=True, exist_ok=True)
    texts = {".md": to_markdown(summary), ".csv": to_csv(summary)}
    for suffix, text in texts.items():
        write_text(results / f"{REPORT}{suffix}", text)
    written = [results / f"{REPORT}{suffix}" for suffix in texts]
    write_json(to_json(summary), results / f"{REPORT}.json")
    written.append(results / f"{REPORT}.json")
    for suffix in ("png", "pdf"):
        written += draw_differences(summary, results / f"differences.{suffix}")
        written += draw_cost(summary, results / f"cost.{suffix}")
    return written
