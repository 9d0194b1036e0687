"""The state of every job of a study, and the files from which workers read what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jepa_kit.config.typed import plain
from jepa_kit.engine.checkpoint.format import checkpoints
from jepa_kit.files import write_text
from jepa_kit.run_folder import step_of
from jepa_kit.studies.cells import Job, Plan, place_of
from jepa_kit.studies.records import CELLS, Record, read_record

State = Literal["finished", "failed", "new evaluation", "interrupted", "new"]
JOBS = "jobs"
"""Folder in the folder of runs with what workers read and print."""


def state_of(job: Job, results: Path, runs: Path) -> State:
    """Return whether a job has its record, or what is left of it."""
    record = read_record(results, job.id)
    if record is not None and record.state == "failed":
        return "failed"
    if record is not None:
        return "finished" if job.evaluations.keys() <= record.rows.keys() else "new evaluation"
    return "interrupted" if done_steps(job, runs) else "new"


def done_steps(job: Job, runs: Path) -> int:
    """Return the step of the latest checkpoint of a job's run, or 0."""
    folder = runs / job.id
    steps = [step_of(path) or 0 for path in checkpoints(folder)] if folder.is_dir() else []
    return max(steps, default=0)


def open_jobs(plan: Plan, results: Path, runs: Path, *, retry: bool = False) -> list[Job]:
    """Return the jobs that are to be done, in their order.

    Args:
        plan: of the study.
        results, runs: folders.
        retry: include those that failed.
    """
    closed = {"finished"} if retry else {"finished", "failed"}
    return [job for job in plan.jobs if state_of(job, results, runs) not in closed]


def records_beside(jobs: Sequence[Job], results: Path) -> list[Record]:
    """Return the finished records of jobs that other studies have in folders beside this one's results."""
    found = []
    for job in jobs:
        for file in sorted(results.absolute().parent.glob(f"*/{CELLS}/{job.id}.json")):
            record = read_record(file.parents[1], job.id)
            if record is not None and record.state == "finished" and job.evaluations.keys() <= record.rows.keys():
                found.append(record)
                break
    return found


def job_file(plan: Plan, job: Job, results: Path, runs: Path) -> Path:
    """Write the file that a worker reads, and return its path."""
    length = job.length
    given: dict[str, Any] = {
        "id": job.id,
        "kind": job.kind,
        "title": job.title,
        "baseline": job.baseline,
        "seed": job.seed,
        "config": job.config.to_dict(),
        "run": str(runs / job.id),
        "steps": 0 if length is None else length.steps,
        "images": 0 if length is None else length.images,
        "tflop": 0.0 if length is None else length.flop / 1e12,
        "evaluations": [
            {"id": key, "spec": dict(protocol.spec), "layers": protocol.layers}
            for key, protocol in job.evaluations.items()
        ],
        "labels": None if plan.study.labels is None else list(plan.study.labels),
        "protocol_seed": plan.study.protocol_seed,
        "train": plain(plan.train),
        "test": plain(plan.test),
        "data": {name: plan.data[place_of(x)] for name, x in (("train", plan.train), ("test", plan.test))},
        "results": str(results.absolute()),
    }
    file = runs / JOBS / f"{job.id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(given, indent=1) + "\n")
    return file


def log_file(runs: Path, job: Job) -> Path:
    """Return the file with what the worker of a job prints."""
    return runs / JOBS / f"{job.id}.log"


def totals(jobs: Sequence[Job], runs: Path) -> tuple[int, float]:
    """Return images and TFLOP of the runs of jobs, without those before their latest checkpoints."""
    left = [(job.length, job.length.steps - done_steps(job, runs)) for job in jobs if job.length is not None]
    images = sum(length.batch_size * steps for length, steps in left)
    return images, sum(length.flop * steps / length.steps for length, steps in left) / 1e12
