"""Measure the peak FLOP/s of a device, and the memory that this process has used."""

from __future__ import annotations

import resource
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

from jepa_kit.structures import Precision

LONG_ENOUGH = 5e-3
"""Seconds; shorter products cannot be timed well."""
LARGEST = 8192
REPEATS = 6
PRODUCTS = 5
"""Products timed together on CUDA, back to back, which hides the launch of all but the first."""


@lru_cache(maxsize=8)
def matrix_peak(device: torch.device, precision: Precision) -> float:
    """Return the FLOP/s of a large square matrix product, the best of a few; measured once per process, in < 1 s.

    This is the present peak, with the device's clocks and its other users, and not the published one. A hot device is
    slower over hours than in the best of these short repeats. The random numbers of the run are not used.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # random values, because products of zeros are faster
    side = 256
    while True:
        a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        _seconds(a, b)  # warm-up, which chooses a kernel
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
    """Return the peak memory of this process in bytes: of tensors on CUDA, of all resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage would return the parent's peak in a spawned process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
