"""torch.compile for transformer blocks over packed tokens: all but attention, which alone looks at lengths.

R, R_k = rows of packed tokens before and behind attention    D = width    h = heads    d = D / h

The lengths of ragged sets are another tuple of integers at every step, for each of which a compiler would make a
program. What is compiled here sees nothing of them but the number of rows, which is marked as one that varies. A region
reaches from one attention to the next, across the border of two blocks, so that a residual sum and the norm that reads
it are one kernel. Weights are arguments of a region and not part of it: blocks of one shape share a program, and a
copied block (of a target encoder) runs with its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.compat import allow_recompiles, mark_dynamic
from jepa_kit.encoders.casts import cast_together
from jepa_kit.set_lengths import SetLengths

COMPILER = "inductor"
"""The backend of torch.compile."""
MOST_PROGRAMS = 64
"""Most programs of one region: for each shape of weights, with and without gradients and stochastic depth."""

Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a norm or a linear layer."""


class Before(NamedTuple):
    """Weights of a block before its attention."""

    norm: Affine
    qkv: Affine


class Behind(NamedTuple):
    """Weights of a block behind its attention."""

    proj: Affine
    norm: Affine
    fc1: Affine
    fc2: Affine


class Stream(NamedTuple):
    """What a block's attention leaves.

    x: [R_k, D], the residual stream before the block.
    y: [R_k, D], the output of attention.
    kept, kept_mlp: [R_k, 1] factors of stochastic depth, or None.
    """

    x: Tensor
    y: Tensor
    kept: Tensor | None
    kept_mlp: Tensor | None


class Regions:
    """The three compiled regions.

    Args:
        eps: of the norms.
        compiler: see ``COMPILER``.
    """

    def __init__(self, eps: float, compiler: Any) -> None:
        def norm(x: Tensor, weights: Affine) -> Tensor:
            return F.layer_norm(x, (x.shape[-1],), *weights, eps)

        def first(x: Tensor, before: Before) -> Tensor:
            return F.linear(norm(x, before.norm), *before.qkv)

        def last(stream: Stream, behind: Behind) -> Tensor:
            x, y, kept, kept_mlp = stream
            y = F.linear(y, *behind.proj)
            x = x + (y if kept is None else y * kept)
            y = F.linear(F.gelu(F.linear(norm(x, behind.norm), *behind.fc1)), *behind.fc2)
            return x + (y if kept_mlp is None else y * kept_mlp)

        def between(stream: Stream, behind: Behind, before: Before) -> tuple[Tensor, Tensor]:
            x = last(stream, behind)
            return x, first(x, before)

        # With fullgraph torch raises FailOnRecompileLimitHit at the limit; by default it warns and runs uncompiled.
        allow_recompiles(MOST_PROGRAMS)

        def compile(function: Callable[..., Any]) -> Callable[..., Any]:
            # Only rows vary: without dynamic=False the second width would make a program for any width.
            return torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)

        self.first: Callable[[Tensor, Before], Tensor] = compile(first)
        """[R, D] -> [R, 3 * D]: norm1, q, k and v of the first block."""
        self.between: Callable[[Stream, Behind, Before], tuple[Tensor, Tensor]] = compile(between)
        """-> x [R_k, D] and q, k, v [R_k, 3 * D]: from the attention of one block to that of the next."""
        self.last: Callable[[Stream, Behind], Tensor] = compile(last)
        """-> [R_k, D]: what comes behind the last attention."""


_regions = lru_cache(maxsize=None)(Regions)


def run_compiled(blocks: Sequence[Any], x: Tensor, lengths: SetLengths, routes: Sequence[Any]) -> Iterator[Tensor]:
    """Yield what each block of jepa_kit/encoders/blocks.py returns without compilation, to rounding.

    Args:
        blocks: of one eps.
        x: [R, D].
        lengths: of the sets.
        routes: a ``Route`` or None for each block.
    """
    regions = _regions(blocks[0].norm1.eps, COMPILER)
    before, behind = _weights(blocks[0], x)
    qkv = regions.first(mark_dynamic(x), before)
    for block, route, following in zip(blocks, routes, (*blocks[1:], None), strict=True):
        stream = _stream(block, x, qkv, lengths, route)
        of_block = behind
        if following is None:
            x = regions.last(stream, of_block)
        else:
            before, behind = _weights(following, x)
            x, qkv = regions.between(stream, of_block, before)
        yield x


def _stream(block: Any, x: Tensor, qkv: Tensor, lengths: SetLengths, route: Any) -> Stream:
    """Run the attention of a block."""
    x, after = (x, lengths) if route is None else (route.rows(x), route.lengths)  # [R_k, D]
    y = block.attn.attend(qkv.unflatten(-1, (3, block.attn.num_heads, -1)), lengths, route, len(x))  # [R_k, D]
    drops = block.training and block.drop_path.rate > 0
    kept, kept_mlp = (mark_dynamic(block.drop_path(x.new_ones(len(x), 1), after)) if drops else None for _ in range(2))
    return Stream(mark_dynamic(x), mark_dynamic(y), kept, kept_mlp)


def _weights(block: Any, x: Tensor) -> tuple[Before, Behind]:
    linears: list[nn.Linear] = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
    qkv, proj, fc1, fc2 = cast_together(linears, x.device.type)
    norm1, norm2 = ((norm.weight, norm.bias) for norm in (block.norm1, block.norm2))
    return Before(norm1, qkv), Behind(proj, norm2, fc1, fc2)
