"""Numbers of loader processes (``data.num_workers: auto``) and of torch's threads of a rank."""

from __future__ import annotations

import os
from typing import Literal

import torch

from jepa_kit.data.loader import TrainLoader
from jepa_kit.machine import cores_of_rank

Workers = int | Literal["auto"]

MOST = 16
"""Most workers on CUDA: enough for 6,000 photos per second and GPU (2.4 ms each). Each one costs memory."""
CPU_PART = 4
"""On a CPU one core in so many loads images; the others run the training step."""
QUICK = {"cuda": 50e-6, "cpu": 1e-3}
"""If loading an image takes fewer seconds, the training process loads: workers would cost more than they save."""


def choose_workers(wanted: Workers, device: torch.device, seconds: float | None = None) -> int:
    """Return the number of loader processes of a rank: ``wanted``, or what "auto" means here.

    Args:
        wanted: ``data.num_workers``.
        device: on CUDA every usable core of a rank gets a worker, up to ``MOST``; on a CPU one core in ``CPU_PART``.
        seconds: of one core, to load one image; None if unknown. Below ``QUICK`` there are no workers.
    """
    if wanted != "auto":
        return wanted
    if seconds is not None and seconds < QUICK[device.type]:
        return 0
    cores = cores_of_rank()
    if device.type == "cuda":
        return 0 if cores == 1 else min(cores, MOST)
    return min(cores // CPU_PART, MOST)


def set_workers(loader: TrainLoader, wanted: Workers, device: torch.device) -> None:
    """Set the number of workers of a training loader; "auto" times the first images of local shards."""
    loader.num_workers = choose_workers(wanted, device)
    if wanted == "auto" and loader.num_workers and not loader.dataset.remote:
        loader.num_workers = choose_workers(wanted, device, loader.seconds_per_image())


def limit_threads() -> None:
    """Limit torch's threads to the usable cores of this rank, unless OMP_NUM_THREADS is set.

    The tools set it (machine.py); this is for callers from Python.
    """
    if "OMP_NUM_THREADS" not in os.environ and cores_of_rank() < torch.get_num_threads():
        torch.set_num_threads(cores_of_rank())
