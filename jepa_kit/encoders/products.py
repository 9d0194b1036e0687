"""Linear layers whose products use oneDNN on an x86 CPU.

R = rows    K = width in    N = width out
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula


@lru_cache(maxsize=2)
def _available(dtype: torch.dtype) -> bool:
    # Without MKL, torch is built for another kind of processor, on which this has not been measured.
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not libraries or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _dtype(x: Tensor) -> torch.dtype:
    """Return the precision of a product of ``x`` on a CPU: that of autocast, if it is enabled."""
    half = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return torch.get_autocast_dtype("cpu") if half else x.dtype


def by_onednn(x: Tensor) -> bool:
    """Return whether ``linear`` of ``x`` [R, K] is computed by oneDNN."""
    # Compilers and tracers handle torch's operator better.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and x.ndim == 2 and not traced and _available(_dtype(x))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def _count_flop(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    """Return the FLOP of shapes [R, K] and [N, K]: torch's ``FlopCounterMode`` has no formula for this operator."""
    return 2 * math.prod(x) * weight[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_flop)


class _Linear(torch.autograd.Function):
    """x w^T + b by oneDNN.

    On an AVX-512 core without AMX this takes 0.87 (float32) and 0.93 (bf16) of the time of ``torch.addmm``, which calls
    MKL in float32, and in bf16 first writes the bias into every row of the output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = dw = db = None
        if of_x:
            # In bf16, torch's product is as fast: both call oneDNN.
            dx = _onednn(grad, weight.t(), None) if grad.dtype == torch.float32 else grad @ weight
        if of_weight:
            dw = grad.t() @ x
        if of_bias:
            # torch's sum over rows in float32 takes twice as long as this product.
            db = grad.t().mv(grad.new_ones(len(grad))) if grad.dtype == torch.float32 else grad.sum(0)
        return dx, dw, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x w^T + b, as ``F.linear`` does, to rounding.

    Args:
        x: [R, K].
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [R, N].
    """
    if not by_onednn(x):
        return F.linear(x, weight, bias)
    dtype = _dtype(x)
    return _Linear.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``, over rows [R, K]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """Return the GELU of ``self(x)``; one kernel if no gradient is needed, as a backward pass needs its input."""
        if torch.is_grad_enabled() or not by_onednn(x):
            return F.gelu(self(x))
        dtype = _dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _onednn(x.to(dtype), self.weight.to(dtype), bias, "gelu")
