"""Find and describe the host, device and speed of each process at the start of a run."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jepa_kit.distributed.collectives import World, all_gather_object
from jepa_kit.planning.peak_flops import matrix_peak
from jepa_kit.structures import Precision


@dataclass(frozen=True)
class Place:
    """Host, device and speed of a process.

    Args:
        rank, local_rank: see ``World``.
        host: name of its machine.
        device: torch's name: cpu, cuda:3.
        model: name of the device.
        matrix_tflops: TFLOP/s of matrix products in the run's precision, measured on all processes at once.
    """

    rank: int
    local_rank: int
    host: str
    device: str
    model: str
    matrix_tflops: float


def find_places(world: World, device: torch.device, precision: Precision) -> list[Place]:
    """Return the places of all processes by rank; all must call it."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tflops = round(matrix_peak(device, precision) / 1e12, 4)
    return all_gather_object(Place(world.rank, world.local_rank, platform.node(), str(device), model, tflops))


def to_dict(places: Sequence[Place], precision: Precision) -> dict[str, Any]:
    """Return the topology for ``run.json``: places, the peak that ``mfu`` is relative to, and the id of a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "nodes": len({place.host for place in places}),
        "mfu_peak": {
            "measured": "large square matrix product, at the start",
            "precision": precision,
            "devices": sorted({place.model for place in places}),
            "tflops_a_process": sum(place.matrix_tflops for place in places) / len(places),
        },
        "places": [asdict(place) for place in places],
        **({"slurm_job": job} if job else {}),
    }


SLOW = 0.8
"""A device below this fraction of the fastest one's speed is reported: all others wait for it in every step."""


def describe(places: Sequence[Place], precision: Precision) -> list[str]:
    """Return the lines printed at a start: devices, nodes, speed, and each device much slower than the fastest."""
    count = len(places)
    models = " and ".join(sorted({place.model for place in places}))
    hosts = Counter(place.host for place in places)
    counts = ", ".join(f"{host} ({n})" for host, n in hosts.items())
    nodes = f"{len(hosts)} node{'s' if len(hosts) > 1 else ''}"
    least, most = (f(place.matrix_tflops for place in places) for f in (min, max))
    speed = f"{most:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    lines = [
        f"device: {models}, {count} process{'es' if count > 1 else ''}",
        f"topology: {nodes}: {counts}",
        f"mfu: relative to {speed} TFLOP/s a process: a large matrix product in {precision} on {models}, measured now",
    ]
    lines += [
        f"note: rank {place.rank} on {place.host} ({place.device}) does {place.matrix_tflops / most:.0%} of the fastest"
        for place in places
        if place.matrix_tflops < SLOW * most and place.device != "cpu"  # CPUs have other users
    ]
    return lines
