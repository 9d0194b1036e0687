"""``train.deterministic``: the same run on the same CUDA device gives the same bits.

By default some CUDA kernels add with atomics, in an order that differs between runs: the backward pass of flash
attention (dq) and of ``index_select``, which copies context tokens for each target set of the predictor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If ``wanted``, make torch use deterministic kernels and raise for operators without one; restore it after.

    Must begin before the first use of cuBLAS, which reads CUBLAS_WORKSPACE_CONFIG then.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory that it has not written, and filling it would cost a pass over every new tensor
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = flags
