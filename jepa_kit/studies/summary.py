"""The figures of a study: of each arm over its seeds, against the base arm, with cost and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.progress import number_of
from jepa_kit.studies.cells import Job, Plan
from jepa_kit.studies.records import Record, read_record
from jepa_kit.studies.statistics import Comparison, compare_paired, mean_and_deviation


@dataclass(frozen=True, order=True)
class Outcome:
    """What a protocol measures on one label: a column of a table.

    Args:
        protocol: its title, with the variant of its figure.
        label: with the metric, if that is not accuracy.
    """

    protocol: str
    label: str


@dataclass(frozen=True)
class Figure:
    """An outcome of an arm, in [0, 1].

    Args:
        values: seed -> figure.
        mean, deviation: over seeds; no deviation for one seed.
        standard_error: due to the size of the test set, averaged over seeds.
        chance: of the best constant answer.
        against_base: None for the base arm, or without a common seed.
    """

    values: Mapping[int, float]
    mean: float
    deviation: float | None
    standard_error: float
    chance: float
    against_base: Comparison | None


@dataclass(frozen=True)
class ArmSummary:
    """All of one arm.

    Args:
        name: of the arm.
        figures: of the outcomes that were measured.
        steps, images, tflop: of one run.
        hours: of its training, averaged over seeds; None if no run is complete.
        verdict: states of health with their number of seeds.
        notes: a line for each seed that failed, collapsed, or has no result.
    """

    name: str
    figures: Mapping[Outcome, Figure]
    steps: int
    images: int
    tflop: float
    hours: float | None
    verdict: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Summary:
    """All of a study.

    Args:
        plan: of the study.
        outcomes: in the order of protocols and labels.
        arms: the base arm first.
        baselines: title -> outcome -> row.
        baseline_notes: a line for each baseline that failed or has no result.
        machines: devices of the runs.
    """

    plan: Plan
    outcomes: Sequence[Outcome]
    arms: Sequence[ArmSummary]
    baselines: Mapping[str, Mapping[Outcome, Row]]
    baseline_notes: Sequence[str]
    machines: Sequence[str]

    @property
    def protocol(self) -> str:
        """Return the protocol that all outcomes have; empty if they differ."""
        titles = {outcome.protocol for outcome in self.outcomes}
        return titles.pop() if len(titles) == 1 else ""

    def heading(self, outcome: Outcome, between: str = ", ") -> str:
        """Return the name of a column: the label, and the protocol if there are several."""
        return outcome.label if self.protocol else f"{outcome.label}{between}{outcome.protocol}"


def summarize(plan: Plan, results: Path) -> Summary:
    """Return the figures of all finished cells.

    Raises:
        ValueError: a record is damaged.
    """
    records = {job.id: read_record(results, job.id) for job in plan.jobs}
    rows = {job.id: _rows(job, records[job.id]) for job in plan.jobs}
    outcomes = list(dict.fromkeys(outcome for job in plan.jobs for outcome in rows[job.id]))
    base = plan.cells[0]
    arms = [_arm(name.name, number, plan, outcomes, records, rows, base) for number, name in enumerate(plan.arms)]
    found = [record for record in records.values() if record is not None]
    on = [record.machine for record in found if record.kind == "cell" and record.machine]
    names = [f"{machine['device']}, {number_of('thread', machine['threads'])}" for machine in on]
    return Summary(
        plan,
        outcomes,
        arms,
        {job.title: rows[job.id] for job in plan.baselines if rows[job.id]},
        [note for job in plan.baselines if (note := _note(job.title, records[job.id]))],
        list(dict.fromkeys(names)),
    )


def _rows(job: Job, record: Record | None) -> dict[Outcome, Row]:
    if record is None:
        return {}
    return {
        Outcome(f"{protocol.title} {row.variant}".strip(), row.column): row
        for key, protocol in job.evaluations.items()
        for row in record.results(key)
    }


def _arm(
    name: str,
    number: int,
    plan: Plan,
    outcomes: Sequence[Outcome],
    records: Mapping[str, Record | None],
    rows: Mapping[str, Mapping[Outcome, Row]],
    base: Sequence[Job],
) -> ArmSummary:
    cells, length = plan.cells[number], plan.lengths[number]
    figures = {}
    for outcome in outcomes:
        own = {job.seed: rows[job.id][outcome] for job in cells if outcome in rows[job.id]}
        if not own:
            continue
        values = {seed: row.accuracy for seed, row in own.items()}
        of_base = {job.seed: rows[job.id][outcome].accuracy for job in base if outcome in rows[job.id]}
        common = [seed for seed in values if seed in of_base]
        compared = None
        if number and common:
            compared = compare_paired([values[s] for s in common], [of_base[s] for s in common])
        figures[outcome] = Figure(
            values,
            *mean_and_deviation(list(values.values())),
            float(np.mean([row.standard_error for row in own.values()])),
            float(np.mean([row.chance for row in own.values()])),
            compared,
        )
    found = [record for job in cells if (record := records[job.id]) is not None]
    hours = [record.training["hours"] for record in found if record.training]
    states = [record.health["state"] if record.health else record.state for record in found]
    return ArmSummary(
        name,
        figures,
        length.steps,
        length.images,
        length.flop / 1e12,
        float(np.mean(hours)) if hours else None,
        ", ".join(f"{state} ({states.count(state)})" for state in dict.fromkeys(states)),
        [note for job in cells if (note := _note(f"{name}, seed {job.seed}", records[job.id]))],
    )


def _note(name: str, record: Record | None) -> str:
    """Return why a job has no figures, or a collapse; empty if all is well."""
    if record is None:
        return f"{name}: no result yet"
    if record.state == "failed":
        return f"{name}: failed: {record.reason}"
    return f"{name}: {record.reason}" if record.reason else ""
