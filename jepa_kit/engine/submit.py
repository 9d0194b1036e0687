"""Submit a run as a Slurm job through submitit, or write a script for sbatch.

One Slurm task is one process of the run, one for each GPU. The tasks read Slurm's variables (distributed/slurm.py)
without an agent in between, so that Slurm's signals reach the processes that train. A job gets SIGUSR1 before its time
limit and may be requeued; its command has --resume, so that it continues (distributed/signals.py).

The config is resolved at submission and saved beside the job's script.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jepa_kit
from jepa_kit.config import Config
from jepa_kit.distributed.slurm import minutes
from jepa_kit.engine.build import check_shares
from jepa_kit.engine.checkpoint.manager import store_of
from jepa_kit.engine.checkpoint.resume import check_folders, plan_resume
from jepa_kit.engine.job import Job
from jepa_kit.lock import only_run_in

JOB_FOLDER = "slurm"
"""Folder in the run folder with the job's config, script and output."""
SRUN = "srun --kill-on-bad-exit=1"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready to be submitted; ``prepare`` makes it.

    Args:
        name: of the job: that of the run folder.
        folder: JOB_FOLDER of the run.
        command: the tool and its arguments, without the interpreter.
        directory: the working directory.
        python_path: folders that the command's imports need.
        job: its resources.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    directory: Path
    python_path: tuple[str, ...]
    job: Job


def prepare(
    config: Config,
    job: Job,
    *,
    tool: Path,
    resume: bool = False,
    resume_from: str | None = None,
    python_path: Sequence[str] = (),
) -> Submission:
    """Check a run before it waits in a queue, and write its config into the job's folder.

    Args:
        config: of the run; relative paths in it are resolved from the present folder, when the job starts.
        job: its resources.
        tool: tools/train_net.py.
        resume: whether the run folder may contain a run, which the job resumes.
        resume_from: as for ``train``. If it is a checkpoint of the run, later ones are set aside here, and the job
            resumes from the latest.
        python_path: folders besides the clone in which the config's ``imports`` were found.

    Raises:
        ValueError: no data, a batch that the processes do not divide, or a run folder that contains a run.
    """
    store = store_of(config)
    check_folders(store)
    latest = plan_resume(store, resume, resume_from)
    if config.data.shards is None:
        raise ValueError("data.shards (=None) must name a folder of images or of shards to train")
    check_shares(config.train, job.processes)
    parallel = config.train.parallel
    if parallel != "auto" and (parallel == "none") != (job.processes == 1):
        raise ValueError(
            f"train.parallel (={parallel!r}) does not fit the job's processes (={job.processes}); 'auto' does"
        )
    if latest is not None and resume_from is not None and store.owns(resume_from):
        # Once, here: the job's command runs again whenever the job is requeued.
        with only_run_in(store.run):
            for name in store.set_aside(latest):
                print(f"set aside: {name}")
        resume_from = None
    run = store.run.absolute()
    folder = run / JOB_FOLDER
    file = config.save(folder)
    # Always with --resume, for when the job is requeued; its folder was checked above.
    command = [str(tool), "--config-file", file, "--output-dir", str(run), "--resume"]
    clone = str(Path(jepa_kit.__file__).parents[1])
    return Submission(
        name=run.name,
        folder=folder,
        command=(*command, *([resume_from] if resume_from else [])),
        directory=Path.cwd(),
        python_path=(clone, *python_path),
        job=job,
    )


def write_script(submission: Submission) -> Path:
    """Write ``train.sbatch``, a script for sbatch, into the job's folder and return its path."""
    options = {
        "job-name": submission.name,
        "output": str(submission.folder / "%j.out"),
        "chdir": str(submission.directory),
        **submission.job.sbatch_options(),
    }
    command = f"{SRUN} {shlex.join([sys.executable, *submission.command])}"
    path = submission.folder / "train.sbatch"
    path.write_text(script_text(options, submission.python_path, [command]))
    return path


def script_text(options: Mapping[str, str], python_path: Sequence[str], commands: Sequence[str]) -> str:
    """Return a script for sbatch.

    Args:
        options: long names of sbatch's options -> values.
        python_path: folders that imports need.
        commands: lines of the script after its environment.
    """
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}{'=' + shlex.quote(value) if value else ''}" for name, value in options.items()),
        "",
        "# One task is one process of the run. If one fails, Slurm ends the others.",
        *_environment(python_path),
        *commands,
        "",
    ]
    return "\n".join(lines)


def _environment(python_path: Sequence[str]) -> list[str]:
    """Return the lines before srun that set PYTHONPATH and the threads of a task, which would else use all cores."""
    paths = shlex.quote(os.pathsep.join(python_path))
    return [
        f"export PYTHONPATH={paths}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
    ]


def run_tool(command: Sequence[str], python_path: Sequence[str]) -> None:
    """Run a program with its arguments in this process, for submitit; raise SystemExit if its status is not 0.

    Slurm's signals then reach the handlers of the run, and not those of a parent process.
    """
    sys.path[:0] = [path for path in python_path if path not in sys.path]
    sys.argv = list(command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:  # submitit takes any SystemExit for a failure, also that of status 0
            raise


def submit(submission: Submission, *, cluster: str = "slurm") -> Any:
    """Submit a run through submitit.

    Args:
        submission: of ``prepare``.
        cluster: ``slurm``, or another executor of submitit (``local``, ``debug``) for a trial.

    Returns:
        submitit's job, with ``job_id``.

    Raises:
        ValueError: submitit or Slurm is not installed, or sbatch refuses the job.
    """
    if find_spec("submitit") is None:
        raise ValueError(
            "--submit slurm needs the package submitit: pip install 'jepa_kit[slurm]'; "
            "--submit sbatch-script writes a script for sbatch without it"
        )
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--submit slurm needs Slurm on this machine: there is no sbatch on the path")
    import submitit

    executor = submitit.AutoExecutor(folder=submission.folder, cluster=cluster)
    job, own = submission.job, ("nodes", "ntasks-per-node")
    options = {name: value or True for name, value in job.sbatch_options().items() if name not in own}
    executor.update_parameters(
        name=submission.name,
        timeout_min=minutes(job.time),
        nodes=job.nodes,
        tasks_per_node=job.processes // job.nodes,
        slurm_additional_parameters={"chdir": str(submission.directory), **options},
        slurm_setup=_environment(submission.python_path),
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_stderr_to_stdout=True,
    )
    try:
        return executor.submit(run_tool, submission.command, submission.python_path)
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch refused the job: {error}") from error
