"""What a device can do at most, and what a process has used: the measures that a run's own figures are held against."""

from __future__ import annotations

import resource
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

from jepa_kit.structures import Precision

LONG_ENOUGH = 5e-3
"""Seconds from which a product's time says something."""
LARGEST = 8192
REPEATS = 6
PRODUCTS = 5
"""That are timed together on CUDA, back to back, so that the launch of each is hidden behind the one before."""


@lru_cache(maxsize=8)
def matrix_peak(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large square matrix product, the best of a few; measured once in a process, in under a second.

    That is what this device gives here and now, with its clocks and its other users, and not what its maker promises.
    The best of short repeats is above what a hot device holds for hours. It uses no random number of the run's.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # random, for zeros are faster than numbers
    side = 256
    while True:
        a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        _seconds(a, b)  # chooses a kernel
        seconds = _seconds(a, b)
        if seconds >= LONG_ENOUGH or side >= LARGEST:
            return 2.0 * side**3 / min(seconds, *(_seconds(a, b) for _ in range(REPEATS)))
        side *= 2


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the time of one product: by the host's clock on a CPU, by the device's on CUDA."""
    if a.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(PRODUCTS):
            torch.mm(a, b)
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3 / PRODUCTS, 1e-9)
    began = time.perf_counter()
    torch.mm(a, b)
    return max(time.perf_counter() - began, 1e-9)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: tensors on CUDA, all resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage would give a process that was spawned the peak of its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
