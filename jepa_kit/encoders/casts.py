"""Cast all weights of a block at once; autocast would cast each weight and bias separately."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jepa_kit.compat import foreach_copy_, set_parameters

Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a norm or a linear layer."""


class _Cast(torch.autograd.Function):
    """Cast float32 tensors in one or a few launches, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _copies(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(_copies([g for g in grads if g is not None], torch.float32))
        return (None, *(None if g is None else next(given) for g in grads))


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if copies:
        foreach_copy_(copies, list(tensors))
    return tuple(copies)


def _enabled(device_type: str) -> bool:
    available = torch.amp.is_autocast_available(device_type)  # not for meta tensors
    return available and torch.is_autocast_enabled(device_type)


def cast_together(linears: Sequence[nn.Linear], device_type: str) -> list[Affine]:
    """Return weight and bias of each layer as autocast casts them, bit for bit, gradients included.

    Without autocast, or if parameters are not float32, return the parameters themselves.
    """
    parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
    if _enabled(device_type) and all(p.dtype == torch.float32 for p in parameters):
        dtype = torch.get_autocast_dtype(device_type)
        if torch.is_grad_enabled() and not all(p.requires_grad for p in parameters):
            parameters = [p.to(dtype) for p in parameters]  # some are frozen and get no gradient
        else:
            parameters = list(_Cast.apply(dtype, *parameters))
    given = iter(parameters)
    return [(next(given), None if linear.bias is None else next(given)) for linear in linears]


@contextmanager
def cast_weights(linears: Sequence[nn.Linear], device_type: str) -> Iterator[None]:
    """Replace the layers' weights by those of ``cast_together`` inside the context."""
    if not _enabled(device_type):
        yield
        return
    cast = cast_together(linears, device_type)
    own = [(linear.weight, linear.bias) for linear in linears]
    try:
        _set_weights(linears, cast)
        yield
    finally:
        _set_weights(linears, own)


def _set_weights(linears: Sequence[nn.Linear], weights: Sequence[Affine]) -> None:
    for linear, (weight, bias) in zip(linears, weights, strict=True):
        set_parameters(linear, weight=weight, bias=bias)
