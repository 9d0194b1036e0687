"""A run as a job of Slurm: handed in through submitit, or written as a script for sbatch.

One task of Slurm is one process of the run, one for each GPU. The tasks find one another through Slurm's variables
(slurm.py), with no agent between, so that a signal of Slurm's reaches the processes that train. A job is sent SIGUSR1
ahead of its time limit and may be requeued; its command resumes, so that it goes on where it was (signals.py).

What was handed in is what runs: the config is resolved, and kept beside the job's script.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jepa_kit
from jepa_kit.config import Config
from jepa_kit.distributed.slurm import minutes
from jepa_kit.engine.build import check_shares
from jepa_kit.engine.checkpoint.lock import only_run_in
from jepa_kit.engine.checkpoint.manager import store_of
from jepa_kit.engine.checkpoint.resume import check_folders, plan_resume

JOB_FOLDER = "slurm"
"""In the run folder: the job's config, its script, and what it prints."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run asks of Slurm.

    Args:
        time: limit of one stretch, as Slurm writes it: minutes, H:MM:SS, D-HH:MM.
        nodes: machines.
        gpus_per_node: of each; 0 asks for none.
        tasks_per_node: processes on each; None is one for each GPU, or one.
        cpus_per_task: cores of each process, its loader workers' among them; None leaves it to Slurm.
        mem: memory of each node, as Slurm writes it (64G); None leaves it to Slurm.
        partition, account, qos, constraint: as for sbatch; None leaves them out.
        signal_seconds: SIGUSR1 comes so long before the limit: time to finish a step and save.
        options: any other option of sbatch, by its long name.

    Raises:
        ValueError: a value out of range, or one that is given twice.
    """

    time: str
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_seconds: int = 120
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_seconds": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} (={value}) must be at least {low}")
        limit = 60 * minutes(self.time)
        if self.signal_seconds >= limit:
            raise ValueError(f"signal_seconds (={self.signal_seconds}) must be below the time limit (={limit} s)")
        if twice := sorted(self.options.keys() & {*self._own(), "ntasks"}):
            raise ValueError(f"options (={', '.join(twice)}) are set by the job itself: they have options of their own")
        if "" in self.options:
            raise ValueError("options (='') must have a name: NAME=VALUE, or NAME= for one without a value")

    @property
    def processes(self) -> int:
        """Of the run, over all nodes."""
        return self.nodes * (self.tasks_per_node or max(1, self.gpus_per_node))

    def sbatch_options(self) -> dict[str, str]:
        """Long names of sbatch -> values ('' for an option without one)."""
        return {**self._own(), **self.options}

    def _own(self) -> dict[str, str]:
        optional = ("cpus_per_task", "mem", "partition", "account", "qos", "constraint")
        given = {name.replace("_", "-"): getattr(self, name) for name in optional}
        if self.gpus_per_node:
            given["gpus-per-node"] = self.gpus_per_node
        return {
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.processes // self.nodes),
            "time": self.time,
            "signal": f"USR1@{self.signal_seconds}",
            "requeue": "",
            "open-mode": "append",
            **{name: str(value) for name, value in given.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready to be handed in; made by ``prepare``.

    Args:
        name: of the job: the run folder's.
        folder: JOB_FOLDER of the run.
        command: the tool and its arguments, without the interpreter.
        directory: where the command runs.
        python_path: folders that the command's imports need.
        job: what it asks for.
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
    """Checks a run before it waits in a queue, and writes its config into the job's folder.

    Args:
        config: of the run; its paths are looked up from the present folder, when the job starts.
        job: what it asks for.
        tool: tools/train_net.py.
        resume: the run folder may hold a run, which goes on.
        resume_from: as for ``train``. A checkpoint of the run is gone back to here; the job goes on from the latest.
        python_path: folders besides the clone that the config's ``imports`` were found in.

    Raises:
        ValueError: no data, a batch that the processes cannot share, or a run folder that holds a run.
    """
    store = store_of(config)
    check_folders(store)
    latest = plan_resume(store, resume, resume_from)
    if config.data.shards is None:
        raise ValueError("data.shards (=None) must name a folder of shards to train")
    check_shares(config.train, job.processes)
    parallel = config.train.parallel
    if parallel != "auto" and (parallel == "none") != (job.processes == 1):
        raise ValueError(
            f"train.parallel (={parallel!r}) does not fit the job's processes (={job.processes}); 'auto' does"
        )
    if latest is not None and resume_from is not None and store.owns(resume_from):
        # Once, and here: the job's command is run again whenever the job is requeued.
        with only_run_in(store.run):
            for name in store.set_aside(latest):
                print(f"set aside: {name}")
        resume_from = None
    run = store.run.absolute()
    folder = run / JOB_FOLDER
    file = config.save(folder)
    # A requeued job goes on where it was: always with --resume. Its folder was looked at above.
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


def sbatch_script(submission: Submission) -> str:
    """The text of a script for sbatch."""
    options = {
        "job-name": submission.name,
        "output": str(submission.folder / "%j.out"),
        "chdir": str(submission.directory),
        **submission.job.sbatch_options(),
    }
    lines = [f"#SBATCH --{name}{'=' + shlex.quote(value) if value else ''}" for name, value in options.items()]
    command = shlex.join([sys.executable, *submission.command])
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            "# One task is one process of the run. Where one ends with an error, the others end too.",
            *_environment(submission),
            f"srun --kill-on-bad-exit=1 {command}",
            "",
        ]
    )


def _environment(submission: Submission) -> list[str]:
    """Lines of a script ahead of srun: where imports are found, and threads, of which each task would else take all."""
    paths = shlex.quote(os.pathsep.join(submission.python_path))
    return [
        f"export PYTHONPATH={paths}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
    ]


def write_script(submission: Submission) -> Path:
    """Writes ``train.sbatch`` into the job's folder."""
    path = submission.folder / "train.sbatch"
    path.write_text(sbatch_script(submission))
    return path


@dataclass(frozen=True)
class RunTool:
    """What a task of submitit calls: a program with its arguments, in the task's own process.

    In its own process, so that Slurm's signals meet the handlers of the run and not those of a parent.
    """

    command: tuple[str, ...]
    python_path: tuple[str, ...]

    def __call__(self) -> None:
        """Raises: SystemExit: the program ended with another status than 0."""
        sys.path[:0] = [path for path in self.python_path if path not in sys.path]
        sys.argv = list(self.command)
        try:
            runpy.run_path(self.command[0], run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:  # 0 or None is the end of a run, which submitit wants to hear as a return
                raise


def submit(submission: Submission, *, cluster: str = "slurm") -> Any:
    """Submit a run through submitit.

    Args:
        submission: of ``prepare``.
        cluster: ``slurm``, or another executor of submitit's (``local``, ``debug``) to try it on.

    Returns:
        submitit's job, with ``job_id``.

    Raises:
        ValueError: there is no submitit, or no Slurm, or sbatch refuses the job.
    """
    if find_spec("submitit") is None:
        raise ValueError(
            "--submit slurm needs the package submitit: pip install 'jepa_kit[slurm]'; "
            "--submit sbatch-script writes a script for sbatch without it"
        )
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--submit slurm must be run where Slurm is: there is no sbatch on the path")
    import submitit

    task = RunTool(submission.command, submission.python_path)
    executor = submitit.AutoExecutor(folder=submission.folder, cluster=cluster)
    job, own = submission.job, ("nodes", "ntasks-per-node")
    options = {name: value or True for name, value in job.sbatch_options().items() if name not in own}
    executor.update_parameters(
        name=submission.name,
        timeout_min=minutes(job.time),
        nodes=job.nodes,
        tasks_per_node=job.processes // job.nodes,
        slurm_additional_parameters={"chdir": str(submission.directory), **options},
        slurm_setup=_environment(submission),
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_stderr_to_stdout=True,
    )
    try:
        return executor.submit(task)
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch refused the job: {error}") from error
