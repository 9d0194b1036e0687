"""Run a study: train and evaluate every arm with every seed, and compare them in one report.

examples:
  # the arms and cells of a study, and which are done; nothing runs
  python tools/ablate.py projects/ijepa/studies/masks_by_targets.yaml --list

  # check all configs, and print the cost: images, TFLOP, hours on this machine
  python tools/ablate.py projects/ijepa/studies/masks_by_targets.yaml --dry-run

  # run what is not done, four cells at a time; after Ctrl-C, SIGTERM or a crash, the same command continues
  python tools/ablate.py projects/ijepa/studies/masks_by_targets.yaml --workers 4

  # the report of the cells that are done, from the folder of results alone
  python tools/ablate.py projects/ijepa/studies/masks_by_targets.yaml --report

  # shards elsewhere, one GPU: options that depend on the machine are no part of a cell's identity
  python tools/ablate.py STUDY.yaml train.device=cuda data.num_workers=8 --runs /scratch/runs

  # one Slurm array, a task for each cell; --report when it is done (or before)
  python tools/ablate.py STUDY.yaml --submit slurm --time 2:00:00 --cpus-per-task 8 --gpus-per-node 1 --at-once 16

docs/studies.md explains the file of a study and how to read the report. The results folder (STUDY without .yaml, or
--output) has a small JSON file for each finished cell, which can be committed: the study continues from it on another
machine. The runs folder (--runs) has checkpoints and logs.
Exit status: 0 if every cell has its result, 1 if some failed, 2 for a mistake in the study or the command, 75 after
SIGTERM, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_kit.arguments import Show, add_json, run_tool, run_with_json, tool_parser
from jepa_kit.engine.job import add_job_options, job_of

if TYPE_CHECKING:
    from jepa_kit.studies.array import Array
    from jepa_kit.studies.cells import Plan

NAME = "ablate.py"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser(NAME, __doc__)
    p.add_argument("study", metavar="FILE", help="the YAML file of a study")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print arms and cells with their state, and stop")
    what.add_argument("--dry-run", action="store_true", help="check all cells, print the cost, and stop")
    what.add_argument("--report", action="store_true", help="write the report of what is done, and stop")
    add_json(p)
    p.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time on this machine (default: 1)")
    p.add_argument("--retry", action="store_true", help="run cells again that failed")
    p.add_argument("--output", metavar="DIR", help="folder of results (default: the study's path without .yaml)")
    p.add_argument("--runs", metavar="DIR", help="folder of runs (default: output/studies/NAME)")
    slurm = p.add_argument_group("Slurm", "one array, with a task for each cell that is not done")
    slurm.add_argument(
        "--submit",
        choices=["slurm", "sbatch-script"],
        help="slurm: submit the array; sbatch-script: write its script and print it",
    )
    slurm.add_argument("--at-once", type=int, metavar="N", help="most tasks at the same time (default: no limit)")
    add_job_options(slurm)
    p.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that depend on the machine, as train.device=cuda"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool(NAME, lambda: run_with_json(run, parser().parse_intermixed_args(argv)))


def run(arguments: argparse.Namespace, show: Show) -> int:
    """Do what the command line says; return the exit status."""
    # imported here, so that --help does not wait for torch
    from jepa_kit.studies.array import submit_array, write_array
    from jepa_kit.studies.cost import describe_cost, totals
    from jepa_kit.studies.jobs import open_jobs, records_beside
    from jepa_kit.studies.local import make_queue
    from jepa_kit.studies.plan import plan_study
    from jepa_kit.studies.records import write_data, write_record

    array = array_of(arguments)
    file = Path(arguments.study)
    results = Path(arguments.output) if arguments.output else file.with_suffix("")
    runs = Path(arguments.runs) if arguments.runs else Path("output", "studies", file.stem)
    check_overrides(arguments.overrides)
    plan = plan_study(file, arguments.overrides, results)
    if arguments.list:
        states = states_of(plan, results, runs)
        show(list_cells(states), states)
        return 0
    if arguments.report:
        return report(plan, results, show)
    jobs = open_jobs(plan, results, runs, retry=arguments.retry)
    beside = {record.id: record for record in records_beside(jobs, results)}
    jobs = [job for job in jobs if job.id not in beside]
    others = f", {len(beside)} by other studies in this folder" if beside else ""
    lines = [f"{len(plan.jobs)} jobs, {len(plan.jobs) - len(jobs)} of them done{others}"]
    queue = make_queue(plan, results, runs, arguments.workers)
    if jobs:
        lines.append(describe_cost(plan, jobs, runs, arguments.workers))
    if arguments.dry_run:
        images, tflop = totals(jobs, runs)
        show("\n".join(lines), {"jobs": len(plan.jobs), "left": len(jobs), "images": images, "tflop": tflop})
        return 0
    print(*lines, sep="\n", flush=True)
    write_data(results, plan.data)
    for record in beside.values():
        write_record(record, results)
    if array is not None and jobs:
        script = write_array(plan, jobs, results, runs, array)
        text = submit_array(script) if arguments.submit == "slurm" else script.read_text()
        show(text, {"script": str(script), arguments.submit: text})
        print(f"script: {script}; --list shows the state of its jobs", file=sys.stderr)
        return 0
    status = queue.run(jobs) if jobs else 0
    return status or report(plan, results, show)


def array_of(arguments: argparse.Namespace) -> Array | None:
    """Return the Slurm array of the command line; None without --submit.

    Raises:
        ValueError: an option of the array without --submit, or a value that is out of range.
    """
    from jepa_kit.studies.array import Array

    resources = job_of(arguments)
    if resources is None and arguments.at_once is not None:
        raise ValueError("--at-once: only with --submit")
    return None if resources is None else Array(resources, arguments.at_once)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise ValueError for an override that would change the cells."""
    from jepa_kit.studies.identity import machine_options

    for text in overrides:
        key = text.partition("=")[0].strip()
        if key not in machine_options() - {"train.seed", "train.output_dir", "data.shards"}:
            raise ValueError(
                f"{text!r} would change the study: only options that depend on the machine can be given here, as "
                "train.device; others belong in its file"
            )


def states_of(plan: Plan, results: Path, runs: Path) -> list[dict[str, Any]]:
    """Return the jobs with their states; ``step`` is that of an interrupted one, ``seed`` that of a cell."""
    from jepa_kit.studies.jobs import done_steps, state_of

    found = []
    for job in plan.jobs:
        state = state_of(job, results, runs)
        interrupted = state == "interrupted" and job.length is not None
        found.append(
            {
                "job": job.title,
                "seed": job.seed if job.kind == "cell" else None,
                "digest": job.id,
                "state": state,
                "step": done_steps(job, runs) if interrupted else None,
                "steps": job.length.steps if job.length is not None else None,
            }
        )
    return found


def list_cells(states: Sequence[Mapping[str, Any]]) -> str:
    """Return jobs with their states as a table."""
    from jepa_kit.evaluation.tables.table import markdown

    lines = [["job", "seed", "digest", "state"]]
    for job in states:
        at = "" if job["step"] is None else f" at step {job['step']:,} of {job['steps']:,}"
        seed = "" if job["seed"] is None else str(job["seed"])
        lines.append([job["job"], seed, job["digest"], f"{job['state']}{at}"])
    return markdown(lines)


def report(plan: Plan, results: Path, show: Show) -> int:
    """Write and print the report; return 1 if a cell or baseline failed."""
    from jepa_kit.studies.records import read_record
    from jepa_kit.studies.report import to_json, to_markdown, write_report
    from jepa_kit.studies.summary import summarize

    summary = summarize(plan, results)
    written = write_report(summary, results)
    show(to_markdown(summary), to_json(summary))
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
    records = [read_record(results, job.id) for job in plan.jobs]
    return int(any(record is not None and record.state == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
