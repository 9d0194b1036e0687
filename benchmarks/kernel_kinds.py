"""Sort the kernels of torch's profiler into kinds by their names.

Names are those of torch 2.11 for CUDA 13 (out of its libraries, demangled), cuBLAS, cuDNN and Triton; on a CPU the
operators of ATen are sorted in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

KINDS = (
    ("fused by the compiler", r"^triton_(?!tem|mm|bmm)|^graph_\d|^inductor|cpp_fused"),
    # Before products: flash's names hold cutlass's types. compute_dot_do_o is a part of cuDNN's backward.
    ("attention", r"flash|fmha|attention|attn|sdpa|compute_dot_do_o|softmax"),
    # Before reductions: splitKreduce_kernel adds up the parts of a product.
    (
        "matrix products",
        r"gemm|cutlass|xmma|nvjet|cublas|matmul|splitk|^triton_(?:tem|mm|bmm)|aten::(?:add|badd)?b?mm$|mkldnn_linear",
    ),
    # GammaBeta is LayerNorm's backward for its weight and bias. Before norms of gradients, whose names hold "norm" too.
    ("layer norm", r"layer_?norm|GammaBeta"),
    ("optimiser, average, norm of gradients", r"multi_tensor|foreach|adam|lerp|lp_?norm|vector_norm|clip_grad"),
    ("reductions (bias gradients, loss)", r"reduce_kernel|aten::(?:sum|mean)$"),
    ("copies and casts", r"memcpy|copy_kernel|CatArray|aten::(?:copy_|cat|stack)$"),
    ("zero fills", r"memset|FillFunctor|aten::(?:fill_|zero_)$"),
    ("gather, scatter, index", r"index|gather|scatter"),
    ("GELU", r"gelu"),
    ("other elementwise", r""),
)
"""Kinds of kernels by their names, the first whose pattern is found."""

WAITS = r"cuda(?:Stream|Device|Event)Synchronize|cuda_?Memcpy(?!Async)|^aten::(?:item|_local_scalar_dense|nonzero)$"
"""Calls of the host that wait for the device."""


def kind_of(name: str) -> str:
    """Return the kind of a kernel, or of an operator of ATen, by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def sorted_by_kind(events: Iterable[Any], device: str) -> dict[str, Any]:
    """Sort the events of a profile (``key_averages()``) by kind.

    A user's annotation stands on the device's timeline too, with the time of all kernels under it; it is no kernel.

    Args:
        events: with ``key``, ``count``, ``device_type``, ``is_user_annotation`` and their own times in microseconds.
        device: ``cuda`` sorts kernels, ``cpu`` operators.

    Returns:
        seconds by kind; launches; waits of the host (CUDA), by name; the ten longest kernels with seconds and counts.
    """
    cuda = device == "cuda"
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    seconds = dict.fromkeys((kind for kind, _ in KINDS), 0.0)
    found, waits = [], {}
    for event in events:
        if event.is_user_annotation:
            continue
        if event.device_type == wanted:
            own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            seconds[kind_of(event.key)] += own
            found.append((own, event.count, event.key))
        elif re.search(WAITS, event.key):
            waits[event.key] = event.count
    longest = [{"name": n[:120], "seconds": s, "count": c} for s, c, n in sorted(found, reverse=True)[:10]]
    return {"seconds": seconds, "launches": sum(c for _, c, _ in found), "waits": waits, "longest": longest}


def profiled(work: Callable[[], object], device: str) -> dict[str, Any]:
    """Return ``sorted_by_kind`` of the kernels of ``work``; the device is idle before and after it."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        work()
    return sorted_by_kind(recorded.key_averages(), device)
