"""Cores that this process may use, and environment variables that must be set before torch is imported.

Nothing here imports torch. The tools import ``jepa_kit.arguments``, which calls ``prepare``, ahead of all else.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

SPINS = "3000"
"""How often a waiting thread of GNU's OpenMP looks before it sleeps. Its default, 300,000, outlasts a time slice.

Measured by benchmarks/bench_threads.py (dev/LOG.md)."""


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may keep busy: of its affinity and its cgroups' limits the least, at least 1.

    Args:
        root: where proc and sys are.
    """
    limit = cgroup_limit(root)
    return affinity() if math.isinf(limit) else max(1, min(affinity(), math.ceil(limit)))


def affinity() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_limit(root: Path = Path("/")) -> float:
    """Return the CPU limit of this process' cgroup and those above it, in cores; infinite without one."""
    limit = math.inf
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inner = base / path.strip("/")  # in a container the path may be that outside of it: then only the base exists
        for folder in (inner, *inner.parents):
            if controllers:
                quota = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                quota = _text(folder / "cpu.max").split()
            if len(quota) == 2 and all(part.isdigit() for part in quota):  # "max", or -1: no limit
                limit = min(limit, int(quota[0]) / int(quota[1]))
            if folder == base:
                break
    return limit


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def cores_of_rank(environ: MutableMapping[str, str] = os.environ) -> int:
    """Return the usable cores for this one of the processes that torchrun or Slurm started here, at least 1.

    torchrun leaves all cores to each process; Slurm binds each to its own, or names their number.
    """
    ranks, own = (environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"))
    cores = usable_cores() // max(1, int(ranks)) if ranks.isdigit() else usable_cores()
    return max(1, min(cores, int(own)) if own.isdigit() else cores)


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what torch reads when it is imported, unless the user has set it (or one that means the same).

    OMP_NUM_THREADS  to the usable cores of a rank if they are fewer than OpenMP takes (it sees the affinity alone)
    GOMP_SPINCOUNT, KMP_BLOCKTIME  waiting threads sleep soon: those that spin hold up the thread that they wait for
        wherever another process has a core (GNU's OpenMP, which torch's wheels bring, and Intel's)
    PYTORCH_ALLOC_CONF  on CUDA, segments that grow: every step of ragged masks has activations of other sizes
    """
    if cores_of_rank(environ) < affinity():
        environ.setdefault("OMP_NUM_THREADS", str(cores_of_rank(environ)))
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPINS)
        environ.setdefault("KMP_BLOCKTIME", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
