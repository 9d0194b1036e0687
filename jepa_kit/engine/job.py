"""Resources of a Slurm job, and their options on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field

from jepa_kit.distributed.slurm import minutes


@dataclass(frozen=True, kw_only=True)
class Job:
    """Resources of a Slurm job.

    Args:
        time: limit of one job, in Slurm's format: minutes, H:MM:SS, D-HH:MM.
        nodes: machines.
        gpus_per_node: 0 for none.
        tasks_per_node: processes on each node; None is one for each GPU, or one.
        cpus_per_task: cores of each process, including its loader workers; None leaves it to Slurm.
        mem: memory of each node, in Slurm's format (64G); None leaves it to Slurm.
        partition, account, qos, constraint: as for sbatch; None leaves them out.
        signal_seconds: seconds between SIGUSR1 and the limit, to finish a step and save.
        options: any other option of sbatch, by its long name.

    Raises:
        ValueError: a value is out of range, or set twice.
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
        """Processes of the run on all nodes."""
        return self.nodes * (self.tasks_per_node or max(1, self.gpus_per_node))

    def sbatch_options(self) -> dict[str, str]:
        """Return the long names of sbatch's options -> values ('' for an option without one)."""
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


JOB_OPTIONS: dict[str, tuple[type, str]] = {
    "nodes": (int, "number of machines (default: 1)"),
    "gpus_per_node": (int, "GPUs per machine, with one process each (default: none)"),
    "tasks_per_node": (int, "processes per machine, for runs on CPUs (default: one per GPU, or one)"),
    "cpus_per_task": (int, "cores per process, including its loader workers"),
    "mem": (str, "memory per machine, such as 64G"),
    "time": (str, "time limit: minutes, H:MM:SS or D-HH:MM; a job that reaches it is requeued and resumes"),
    "signal_seconds": (int, "seconds before the limit at which the run saves (default: 120)"),
    "partition": (str, "queue"),
    "account": (str, "account that is charged"),
    "qos": (str, "quality of service"),
    "constraint": (str, "features that machines must have"),
}
"""Field of ``Job`` -> (type, help) of its option."""


def add_job_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of a Slurm job to those of a tool, which has an option ``--submit``."""
    for name, (kind, text) in JOB_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "TEXT", help=text)
    group.add_argument(
        "--sbatch",
        action="append",
        metavar="NAME=VALUE",
        help="any other option of sbatch, such as exclusive= or mail-type=END",
    )


def job_of(arguments: argparse.Namespace) -> Job | None:
    """Return the Slurm job of the command line; None without --submit.

    Raises:
        ValueError: options of a job without --submit, no time limit, or a value that Job rejects.
    """
    given = {name: getattr(arguments, name) for name in JOB_OPTIONS if getattr(arguments, name) is not None}
    extra = dict(text.partition("=")[::2] for text in arguments.sbatch or [])
    if arguments.submit is None:
        names = [f"--{name.replace('_', '-')}" for name in given] + ["--sbatch"] * bool(extra)
        if names:
            raise ValueError(f"{', '.join(names)}: only with --submit")
        return None
    if "time" not in given:
        raise ValueError("--submit needs --time, the time limit of the job: the run saves before it")
    return Job(**given, options=extra)
