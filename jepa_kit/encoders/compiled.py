"""torch.compile for transformer blocks over packed tokens: everything except attention, which depends on lengths.

R, R_k = rows of packed tokens before and after attention (a ``Route`` selects rows; ``fill_rows`` adds some)
D = width    h = heads    d = D / h

Lengths of ragged sets are a new tuple of integers at every step, and a compiler would make a program for each. Regions
depend only on the number of rows, which is marked as dynamic. A region extends from one attention to the next, across
two blocks, so that a residual sum and the norm that reads it become one kernel. Weights are arguments of a region:
blocks of the same shape share a program, and a copied block (of a target encoder) runs with its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jepa_kit.compat import allow_recompiles, mark_dynamic
from jepa_kit.encoders.casts import Affine, cast_together
from jepa_kit.set_lengths import SetLengths

COMPILER = "inductor"
"""The backend of torch.compile."""
MOST_PROGRAMS = 64
"""Maximum number of programs of a region: one per shape of weights, with and without gradients and drop path."""
ROWS = 128
"""Rows of a chunk, which one kernel sums for the gradient of a bias. A batch of one chunk needs its own program."""


class Before(NamedTuple):
    """Weights of a block before its attention."""

    norm: Affine
    qkv: Affine


class After(NamedTuple):
    """Weights of a block after its attention."""

    proj: Affine
    norm: Affine
    fc1: Affine
    fc2: Affine
    scale1: Tensor | None
    scale2: Tensor | None


class Stream(NamedTuple):
    """The state after a block's attention.

    x: [R_k, D], the residual stream before the block.
    y: [R_k, D], the output of attention.
    kept, kept_mlp: [R_k, 1] factors of stochastic depth, or None.
    """

    x: Tensor
    y: Tensor
    kept: Tensor | None
    kept_mlp: Tensor | None


def _chunks(x: Tensor) -> Tensor:
    """Append zero rows and split: [R, N] -> [C, ROWS, N]."""
    count = -(-len(x) // ROWS)
    return F.pad(x, (0, 0, 0, count * ROWS - len(x))).view(count, ROWS, x.shape[1])


def _sum_rows(chunks: Tensor) -> Tensor:
    """Sum [C, ROWS, N] -> [N], in float32 or better until it is rounded.

    The compiler fuses the sum over a chunk with what computes it. It would not fuse ``sum(0)`` of [R, N].
    """
    return chunks.sum(1, dtype=torch.promote_types(chunks.dtype, torch.float32)).sum(0).to(chunks.dtype)


class _LinearGelu(torch.autograd.Function):
    """The GELU of a linear layer, whose backward pass sums the bias's gradient in the kernel of GELU's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, y)
        ctx.biased = bias is not None
        return F.gelu(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight, y = ctx.saved_tensors
        chunks = torch.ops.aten.gelu_backward(_chunks(grad), _chunks(y))
        of_bias = _sum_rows(chunks) if ctx.biased else None
        rows = chunks.flatten(0, 1)
        # The first product takes the added rows too: so `rows` is written as a whole, and the slice is no copy of it.
        return (rows @ weight)[: len(x)], rows[: len(x)].t() @ x, of_bias


def _join(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """Join gradients of q, k and v, each [R, h, d] -> [C, ROWS, 3 * D]; sum their rows -> [3 * D]."""
    chunks = torch.cat([_chunks(x.flatten(1)) for x in parts], dim=2)
    return chunks, _sum_rows(chunks)


class _Split(torch.autograd.Function):
    """Views of q, k and v. The backward pass joins their gradients and sums them for the bias in one kernel.

    Args of ``apply``:
        join: ``Regions.join``.
        bias: [3 * D] or None; it gets its gradient here alone.
        qkv: [R, 3, h, d].
    """

    @staticmethod
    def forward(ctx: Any, join: Callable[..., Any], bias: Tensor | None, qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.join, ctx.biased = join, bias is not None
        return qkv.unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor]:
        rows, *heads = grads[0].shape
        joined, of_bias = ctx.join(*map(mark_dynamic, grads))
        return None, of_bias if ctx.biased else None, joined.view(-1, len(grads), *heads)[:rows]


class Regions:
    """The compiled regions.

    Args:
        eps: of the norms.
        compiler: see ``COMPILER``.
    """

    def __init__(self, eps: float, compiler: Any) -> None:
        def norm(x: Tensor, weights: Affine) -> Tensor:
            return F.layer_norm(x, (x.shape[-1],), *weights, eps)

        def first(x: Tensor, before: Before) -> Tensor:
            weight, bias = before.qkv
            return F.linear(norm(x, before.norm), weight, None if bias is None else bias.detach())  # see ``_Split``

        def last(stream: Stream, after: After) -> Tensor:
            x, y, kept, kept_mlp = stream
            y = F.linear(y, *after.proj)
            y = y if after.scale1 is None else y * after.scale1
            x = x + (y if kept is None else y * kept)
            y = F.linear(_LinearGelu.apply(norm(x, after.norm).to(after.fc1[0].dtype), *after.fc1), *after.fc2)
            y = y if after.scale2 is None else y * after.scale2
            return x + (y if kept_mlp is None else y * kept_mlp)

        def between(stream: Stream, after: After, before: Before) -> tuple[Tensor, Tensor]:
            x = last(stream, after)
            return x, first(x, before)

        # With fullgraph, torch raises FailOnRecompileLimitHit at the limit; by default it warns and runs uncompiled.
        allow_recompiles(MOST_PROGRAMS)

        def compile(function: Callable[..., Any]) -> Callable[..., Any]:
            # Only rows vary: without dynamic=False, the second width would produce a program with a dynamic width.
            return torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)

        self.first: Callable[[Tensor, Before], Tensor] = compile(first)
        """norm1, q, k and v of the first block: [R, D] -> [R, 3 * D]."""
        self.between: Callable[[Stream, After, Before], tuple[Tensor, Tensor]] = compile(between)
        """From the attention of one block to that of the next: -> x [R_k, D] and q, k, v [R_k, 3 * D]."""
        self.last: Callable[[Stream, After], Tensor] = compile(last)
        """Everything after the last attention: -> [R_k, D]."""
        self.join: Callable[..., tuple[Tensor, Tensor]] = compile(_join)


_regions = lru_cache(maxsize=None)(Regions)


def run_compiled(
    blocks: Sequence[Any], x: Tensor, lengths: SetLengths, routes: Sequence[Any], terms: Iterable[Any]
) -> Iterator[Tensor]:
    """Yield what each block of jepa_kit/encoders/blocks.py returns without compilation, to rounding.

    Args:
        blocks: blocks with the same eps.
        x: [R, D].
        lengths: lengths of the sets.
        routes: a ``Route`` or None per block.
        terms: ``Terms`` of each block.
    """
    regions = _regions(blocks[0].norm1.eps, COMPILER)
    before, after = _weights(blocks[0], x)
    qkv = regions.first(mark_dynamic(x), before)
    for block, route, term, following in zip(blocks, routes, terms, (*blocks[1:], None), strict=True):
        split = partial(_Split.apply, regions.join, before.qkv[1])
        stream = _stream(block, x, qkv, lengths, route, term, split)
        if following is None:
            x = regions.last(stream, after)
        else:
            before, following_after = _weights(following, x)
            x, qkv = regions.between(stream, after, before)
            after = following_after
        yield x


def _stream(block: Any, x: Tensor, qkv: Tensor, lengths: SetLengths, route: Any, terms: Any, split: Any) -> Stream:
    """Run the attention of a block, which is not compiled."""
    x, after = (x, lengths) if route is None else (route.rows(x), route.lengths)  # [R_k, D]
    y = block.attn.attend(qkv.unflatten(-1, (3, block.attn.num_heads, -1)), lengths, route, len(x), terms, split)
    drops = block.training and block.drop_path.rate > 0
    kept, kept_mlp = (mark_dynamic(block.drop_path(x.new_ones(len(x), 1), after)) if drops else None for _ in range(2))
    return Stream(mark_dynamic(x), mark_dynamic(y), kept, kept_mlp)


def _weights(block: Any, x: Tensor) -> tuple[Before, After]:
    linears: list[nn.Linear] = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
    qkv, proj, fc1, fc2 = cast_together(linears, x.device.type)
    norm1, norm2 = ((norm.weight, norm.bias) for norm in (block.norm1, block.norm2))
    return Before(norm1, qkv), After(proj, norm2, fc1, fc2, block.scale1, block.scale2)
