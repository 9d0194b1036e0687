"""Count usable CPU cores, and set environment variables that torch reads when it is imported.

This module does not import torch. The tools import ``jepa_kit.arguments``, which calls ``prepare``, before all else.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

SPINS = "3000"
"""Spins of a waiting thread of GNU's OpenMP before it sleeps. Its default, 300,000, outlasts a time slice; measured by
benchmarks/bench_threads.py (dev/LOG.md)."""


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use: by its affinity and the limits of its cgroups, at least 1.

    Args:
        root: folder with proc and sys.
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
        inner = base / path.strip("/")  # in a container this may be the host's path; then only the base exists
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
    """Return the usable cores of this rank, at least 1.

    torchrun gives all cores to each of its processes, so they are divided; Slurm binds each process to its own cores,
    or sets their number.
    """
    ranks, own = (environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"))
    cores = usable_cores() // max(1, int(ranks)) if ranks.isdigit() else usable_cores()
    return max(1, min(cores, int(own)) if own.isdigit() else cores)


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set environment variables that torch reads, unless the user has set them (or a synonym).

    OMP_NUM_THREADS  the usable cores of a rank, if OpenMP would use more (it considers the affinity alone)
    GOMP_SPINCOUNT, KMP_BLOCKTIME  let waiting threads sleep soon: on a shared core, a spinning thread delays the thread
        that it waits for (GNU's OpenMP, in torch's wheels, and Intel's)
    PYTORCH_ALLOC_CONF  growing segments on CUDA, because ragged masks give activations of another size in every step
    """
    if cores_of_rank(environ) < affinity():
        environ.setdefault("OMP_NUM_THREADS", str(cores_of_rank(environ)))
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPINS)
        environ.setdefault("KMP_BLOCKTIME", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
