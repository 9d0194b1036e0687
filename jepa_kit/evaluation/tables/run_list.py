"""What the run folders below a folder contain: state, step, last figures, verdict. Reads no checkpoint.

States:

    running     a process has the lock of the folder
    finished    the last step was done
    stopped     the last logged step has a checkpoint, as after a signal; --resume continues
    failed      the run ended between checkpoints: an error, or its process was killed; --resume continues from the last
    unreadable  a file of the folder is damaged
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from jepa_kit.evaluation.health.states import STATES, State
from jepa_kit.lock import holder_of
from jepa_kit.run_folder import FACTS, LOCK, METRICS, RUN_CONFIG, step_of

RunState = Literal["running", "finished", "stopped", "failed", "unreadable"]
RUN_STATES: tuple[RunState, ...] = get_args(RunState)
TAIL = 1 << 20
"""Bytes of ``metrics.jsonl`` that are read, from its end."""
NARROW = 24
"""Fewest characters of a name that is cut."""


@dataclass(frozen=True)
class RunEntry:
    """A run.

    Args:
        run: its folder.
        state: see above.
        step: updates that are logged or have a checkpoint.
        steps: of the whole run; None if it did not begin.
        checkpoint: step of the newest local checkpoint.
        loss, images_per_second: of the last logged step.
        verdict, verdict_step: of the last evaluation inside the run, and the updates before it.
        changed: when the run last wrote a line, in UTC (ISO 8601).
        process: that which runs, and its machine.
        problem: why the folder is unreadable.
    """

    run: str
    state: RunState
    step: int
    steps: int | None
    checkpoint: int | None
    loss: float | None
    images_per_second: float | None
    verdict: State | None
    verdict_step: int | None
    changed: str
    process: str | None = None
    problem: str | None = None


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the run folders in a folder and below it; runs inside a run, and hidden folders, are left out."""
    for folder, inner, files in os.walk(root):
        if RUN_CONFIG in files and (FACTS in files or METRICS in files or LOCK in files):
            inner.clear()
            yield Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def entry_of(folder: Path) -> RunEntry:
    """Return the entry of a run folder."""
    process = holder_of(folder / LOCK)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8")) if (folder / FACTS).exists() else {}
        steps = facts.get("steps")
        records = _last_records(folder / METRICS)
        saved = _newest_checkpoint(folder)
        problem = None
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        steps, records, saved, problem = None, [], None, f"{type(error).__name__}: {error}".splitlines()[0]
    logged = max((record["step"] + 1 for record in records), default=0)
    step = max(logged, saved or 0)
    losses = [record for record in records if "loss" in record]
    verdicts = [record for record in records if "eval/verdict" in record]
    last, judged = (losses or [{}])[-1], (verdicts or [{}])[-1]
    return RunEntry(
        run=str(folder),
        state=_state(process, problem, step, steps, saved),
        step=step,
        steps=steps,
        checkpoint=saved,
        loss=last.get("loss"),
        images_per_second=last.get("images_per_second"),
        verdict=STATES[int(judged["eval/verdict"])] if judged else None,
        verdict_step=judged["step"] + 1 if judged else None,
        changed=_changed(folder),
        process=process,
        problem=problem,
    )


def _state(process: str | None, problem: str | None, step: int, steps: int | None, saved: int | None) -> RunState:
    if problem is not None:
        return "unreadable"
    if process is not None:
        return "running"
    if steps is not None and step >= steps:
        return "finished"
    return "stopped" if step and saved == step else "failed"


def _last_records(path: Path) -> list[dict[str, Any]]:
    """Return the last lines of a file of metrics, without those that are cut.

    Raises:
        ValueError: a line is no mapping with a step.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read().split(b"\n")[1 if size > TAIL else 0 : -1]
    records = [json.loads(line) for line in lines]
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise ValueError(f"{path.name} must have a mapping with a step in each line")
    return records


def _newest_checkpoint(folder: Path) -> int | None:
    """Return the step of the newest checkpoint on this machine, in the run folder or in ``checkpoint.dir``."""
    config = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))
    place = (config.get("checkpoint") or {}).get("dir")
    there = folder if place is None or "://" in place else Path(place)
    names = os.listdir(there) if there.is_dir() else []
    return max((step for name in names if (step := step_of(name)) is not None), default=None)


def _changed(folder: Path) -> str:
    file = next((f for name in (METRICS, FACTS, RUN_CONFIG) if (f := folder / name).exists()), folder)
    return datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")


def describe_runs(entries: Sequence[RunEntry], *, root: str, width: int, now: datetime) -> str:
    """Return a table that is at most ``width`` wide, if names can be cut that far.

    Args:
        entries: a line each.
        root: names of runs are relative to it.
        width: of the terminal.
        now: ages are relative to it.
    """
    lines = [["run", "state", "step", "loss", "images/s", "verdict", "age"]]
    for e in entries:
        of = "" if e.steps is None else f"/{e.steps}"
        lines.append(
            [
                os.path.relpath(e.run, root),
                e.state,
                f"{e.step}{of}",
                "" if e.loss is None else f"{e.loss:.4f}",
                "" if e.images_per_second is None else f"{e.images_per_second:.0f}",
                e.verdict or "",
                age(datetime.fromisoformat(e.changed), now),
            ]
        )
    columns = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    room = max(NARROW, width - sum(columns[1:]) - 2 * (len(columns) - 1))
    columns[0] = min(columns[0], room)
    text = ["  ".join(cell.ljust(size) for cell, size in zip(_cut(line, room), columns, strict=True)) for line in lines]
    problems = [f"{e.run}: {e.problem}" for e in entries if e.problem]
    return "\n".join([line.rstrip() for line in text] + problems)


def _cut(line: Sequence[str], room: int) -> list[str]:
    name = line[0]
    return [name if len(name) <= room else "…" + name[-(room - 1) :], *line[1:]]


def age(then: datetime, now: datetime) -> str:
    """Return the time since then in its largest unit: ``40 s``, ``3 min``, ``5 h``, ``12 d``."""
    seconds = max(0, int((now - then).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
