"""The options ``train.precision``, the precision of matrix products, and ``train.deterministic``.

Weights, optimiser state and losses are always float32. Values of ``train.precision``:

float32  also on CUDA: TensorFloat-32 is off while a run trains
tf32     factors of products are rounded to 10 bits; CUDA, compute capability 8.0 (Ampere) and up
bf16     autocast
auto     on CUDA bf16 if the card has it, else float32; on a CPU whichever is faster, measured (``faster_on_cpu``)

Rank 0 resolves ``auto`` once for a run and stores the result in its config; a resumed run keeps it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from jepa_kit.config import Config
from jepa_kit.distributed.collectives import broadcast_from_rank0
from jepa_kit.structures import Precision

REPEATS = 3
"""Timed products, of which the fastest counts."""
FLOP = 2**29
"""FLOP of one timed product, forward and backward: 4 to 12 ms of one core in float32."""
WIDTHS = (64, 384)
"""Narrower or wider encoders are timed at these widths: the result is the same, and the time stays short."""


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return the factory of the context manager of a forward pass in ``precision``."""
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Switch TensorFloat-32 on (tf32) or off (float32) on CUDA, for matrix products and convolutions; restore it after.

    By default, torch rounds convolutions to TF32 and nothing else.

    Raises:
        ValueError: tf32 on a device without it.
    """
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ValueError(
            f"train.precision (='tf32') needs a CUDA device of compute capability 8.0 or above, but the run is on "
            f"{device}: 'auto', 'bf16' or 'float32' work there"
        )
    if device.type != "cuda" or precision == "bf16":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def resolve_precision(config: Config, device: torch.device, stored: str | None = None) -> Config:
    """Return the config with ``train.precision: auto`` resolved on rank 0's device; all ranks must call it.

    Args:
        config: of the run.
        device: of this rank.
        stored: the precision in the run's checkpoint, which ``auto`` keeps.
    """
    if config.train.precision != "auto":
        return config
    if stored is not None:
        return with_precision(config, stored)
    given = config.slots["encoder"].options.get("embed_dim")
    width = given if isinstance(given, int) else WIDTHS[1]
    return with_precision(config, broadcast_from_rank0(lambda: choose_precision(device, width)))


def with_precision(config: Config, precision: str) -> Config:
    """Return the config with another ``train.precision``."""
    return replace(config, train=replace(config.train, precision=precision))  # type: ignore[arg-type]


def precision_of(config: Config) -> Precision:
    """Return ``train.precision`` of a resolved config.

    Raises:
        ValueError: it is "auto".
    """
    if config.train.precision == "auto":
        raise ValueError("train.precision (='auto') must be resolved first: resolve_precision(config, device)")
    return config.train.precision


def choose_precision(device: torch.device, width: int = WIDTHS[1]) -> Precision:
    """Return what ``auto`` means on a device, for an encoder of this width."""
    if device.type == "cpu":
        return faster_on_cpu(max(WIDTHS[0], min(width, WIDTHS[1])))
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@lru_cache
def faster_on_cpu(width: int) -> Precision:
    """Return "bf16" or "float32", whichever takes less CPU time in an MLP's first layer, forward and backward.

    A measurement includes what a list of instruction sets misses: AMX, AVX-512 bf16, emulated bf16 (ten times slower
    than float32), and limits set through the environment (``ONEDNN_MAX_CPU_ISA``). It counts the CPU time of one
    thread, so that other processes do not matter, takes 0.1 to 2 s, and does not use the caller's random numbers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(("float32", "bf16"), key=lambda precision: _seconds(width, precision))
    finally:
        torch.set_num_threads(threads)


def _seconds(width: int, precision: Precision) -> float:
    """Return the CPU seconds of a layer from ``width`` to four times that, forward and backward; the fastest repeat."""
    generator = torch.Generator().manual_seed(0)
    # a row costs 24 * width**2 FLOP: three products (one forward, two backward) of width and 4 * width, 2 FLOP each
    rows = max(256, min(4096, FLOP // (24 * width**2)))
    weight = torch.randn(4 * width, width, generator=generator).requires_grad_()
    tokens = torch.randn(rows, width, generator=generator).requires_grad_()
    best = float("inf")
    for repeat in range(1 + REPEATS):  # the first one, in which oneDNN compiles its kernels, does not count
        start = time.thread_time()
        with torch.enable_grad(), autocast_of(precision, tokens.device)():
            out = F.gelu(F.linear(tokens, weight))
        out.backward(torch.ones_like(out))
        if repeat:
            best = min(best, time.thread_time() - start)
    return best


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If ``wanted``, make torch use deterministic kernels and raise for operators without one; restore it after.

    The same run on the same CUDA device then gives the same bits (``train.deterministic``). By default some CUDA
    kernels add with atomics, in an order that differs between runs: the backward pass of flash attention (dq) and of
    ``index_select``, which copies context tokens for each target set of the predictor.

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
