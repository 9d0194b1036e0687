"""torchrun's variables from those of Slurm, and Slurm's format of times.

Under ``srun`` each task is one process of a run. MASTER_ADDR and MASTER_PORT are the first node of the step and a port
that is a function of the job's number, unless they are set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PORTS = range(15000, 32000)
"""Below the ports that Linux assigns automatically (32768 and up)."""


def torchrun_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of ``srun``; {} for a single task.

    Raises:
        ValueError: the script of a job of several tasks runs this process without ``srun``, so that it would train
            alone; or one of Slurm's variables is missing or not a number.
    """
    if "SLURM_STEP_NUM_TASKS" not in environ:
        tasks = environ.get("SLURM_NTASKS", "1")
        if "SLURM_PROCID" in environ and tasks != "1":  # in a batch script, and not in a shell of salloc
            raise ValueError(
                f"Slurm's job has {tasks} tasks (SLURM_NTASKS), but this process was started without srun and would "
                "train alone: put srun before the command, or ask for one task"
            )
        return {}
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    if size == 1:
        return {}
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if not nodes and "MASTER_ADDR" not in environ:
        raise ValueError("SLURM_STEP_NODELIST (='') must name the nodes of this step, or MASTER_ADDR the first of them")
    return {
        "RANK": str(_number(environ, "SLURM_PROCID")),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID")),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(PORTS[(7 * job + step) % len(PORTS)]),
    }


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        raise ValueError(f"{name} (={value!r}) must be a whole number: Slurm sets it for each task of srun")
    return int(value)


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list: ``gpu[003-007,012],cpu1`` -> ``gpu003``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"nodes (={nodes!r}) must be a list of hosts as Slurm writes it")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def minutes(time: str) -> int:
    """Return the minutes, rounded up, of a time in Slurm's format: 90, 90:00, 1:30:00, 3-0, 3-12:30, 3-12:30:00.

    Raises:
        ValueError: another form, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", time)
    seconds = 0
    if match:
        numbers = [int(number) for number in match[2].split(":")]
        if match[1] is None and len(numbers) < 3:  # minutes or minutes:seconds; after days the first are hours
            numbers.insert(0, 0)
        hours, mins, rest = [*numbers, 0, 0][:3]
        seconds = int(match[1] or 0) * 86400 + hours * 3600 + mins * 60 + rest
    if seconds <= 0:
        raise ValueError(f"time (={time!r}) must be minutes, hours:minutes:seconds or days-hours:minutes, above 0")
    return -(-seconds // 60)
