"""Slurm: all jobs of a study as one array, each of whose tasks is a worker."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jepa_kit
from jepa_kit.engine.job import Job as Resources
from jepa_kit.engine.submit import SRUN, script_text
from jepa_kit.studies.cells import Job, Plan
from jepa_kit.studies.jobs import JOBS, job_file

SCRIPT = "array.sbatch"
"""File in the folder of jobs."""


@dataclass(frozen=True)
class Array:
    """A Slurm array for a study.

    Args:
        resources: of each task.
        at_once: most tasks that run at the same time; None for no limit.

    Raises:
        ValueError: the limit is below 1, or the array is set among the options.
    """

    resources: Resources
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"--at-once (={self.at_once}) must be at least 1")
        if "array" in self.resources.options:
            raise ValueError("--sbatch array= is set by the study; --at-once limits the tasks that run together")


def write_array(plan: Plan, jobs: Sequence[Job], results: Path, runs: Path, array: Array) -> Path:
    """Write the files of jobs and the script of their array; return the script's path.

    A worker saves on Slurm's signal before the time limit, and its task is requeued. One that ends without a record
    gets one from the script, with its exit status.
    """
    runs = runs.absolute()
    files = [job_file(plan, job, results, runs) for job in jobs]
    limit = "" if array.at_once is None else f"%{array.at_once}"
    options = {
        "job-name": plan.name,
        "array": f"0-{len(jobs) - 1}{limit}",
        "output": str(runs / JOBS / "%A_%a.out"),
        "chdir": str(Path.cwd()),
        **array.resources.sbatch_options(),
    }
    worker = shlex.join([sys.executable, "-m", "jepa_kit.studies.worker"])
    commands = [
        "jobs=(",
        *(f"    {shlex.quote(str(file))}" for file in files),
        ")",
        'job="${jobs[$SLURM_ARRAY_TASK_ID]}"',
        f'{SRUN} {worker} "$job"',
        "status=$?",
        "case $status in 0|1|75|130) ;; *) " + f'{worker} "$job" --crashed $status ;; esac',
        "exit $status",
    ]
    script = runs / JOBS / SCRIPT
    script.write_text(script_text(options, [str(Path(jepa_kit.__file__).parents[1])], commands))
    return script


def submit_array(script: Path) -> str:
    """Submit a script to Slurm and return what sbatch prints.

    Raises:
        ValueError: there is no Slurm on this machine, or sbatch refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(f"--submit slurm needs Slurm on this machine: there is no sbatch on the path; see {script}")
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()
