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
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.compat import allow_recompiles, mark_dynamic
from jepa_kit.encoders.casts import Affine, cast_together
from jepa_kit.set_lengths import SetLengths

COMPILER = "inductor"
"""The backend of torch.compile."""
MOST_PROGRAMS = 64
"""Maximum number of programs of a region: one per shape of weights, with and without gradients and drop path."""


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

        def last(stream: Stream, after: After) -> Tensor:
            x, y, kept, kept_mlp = stream
            y = F.linear(y, *after.proj)
            y = y if after.scale1 is None else y * after.scale1
            x = x + (y if kept is None else y * kept)
            y = F.linear(F.gelu(F.linear(norm(x, after.norm), *after.fc1)), *after.fc2)
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
        stream = _stream(block, x, qkv, lengths, route, term)
        if following is None:
            x = regions.last(stream, after)
        else:
            before, following_after = _weights(following, x)
            x, qkv = regions.between(stream, after, before)
            after = following_after
        yield x


def _stream(block: Any, x: Tensor, qkv: Tensor, lengths: SetLengths, route: Any, terms: Any) -> Stream:
    """Run the attention of a block, which is not compiled."""
    x, after = (x, lengths) if route is None else (route.rows(x), route.lengths)  # [R_k, D]
    y = block.attn.attend(qkv.unflatten(-1, (3, block.attn.num_heads, -1)), lengths, route, len(x), terms)
    drops = block.training and block.drop_path.rate > 0
    kept, kept_mlp = (mark_dynamic(block.drop_path(x.new_ones(len(x), 1), after)) if drops else None for _ in range(2))
    return Stream(mark_dynamic(x), mark_dynamic(y), kept, kept_mlp)


def _weights(block: Any, x: Tensor) -> tuple[Before, After]:
    linears: list[nn.Linear] = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
    qkv, proj, fc1, fc2 = cast_together(linears, x.device.type)
    norm1, norm2 = ((norm.weight, norm.bias) for norm in (block.norm1, block.norm2))
    return Before(norm1, qkv), After(proj, norm2, fc1, fc2, block.scale1, block.scale2)
