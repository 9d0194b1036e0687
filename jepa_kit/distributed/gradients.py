"""Exchange of rows between processes that gradients pass through; collectives.py has the function that parts call.

A rank's loss depends on the rows of all ranks then. DDP and FSDP average gradients over ranks, so what is minimised is
the mean of the ranks' losses, and the gradient of a row is the sum of what all ranks' losses give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class GatherRows(torch.autograd.Function):
    """Gather rows [B_r, ...] of each rank r -> [sum of B_r, ...] in the order of the ranks, alike on all of them.

    Backward returns to each rank the gradient of its own rows, summed over the losses of all ranks. All ranks must call
    both passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int]) -> Tensor:
        """``counts`` has the rows of each rank, which may differ: shorter ones are padded for the exchange."""
        ctx.own = slice(sum(counts[: dist.get_rank()]), sum(counts[: dist.get_rank() + 1]))
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own], None
