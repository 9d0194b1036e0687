"""torch.compile for a transformer block over packed tokens: all but attention, which alone looks at lengths.

R = rows of packed tokens    D = width    h = heads    d = D / h

The lengths of ragged sets are another tuple of integers at every step, which a compiler would make a program for each
time. What is compiled here sees nothing of them but the number of rows, which is marked as one that varies: each part
is compiled once for each of its uses (encoder, target encoder, predictor), for all blocks and all lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jepa_kit.structures import SetLengths

COMPILER = "inductor"
"""The backend of torch.compile."""


def before_attention(block: Any, x: Tensor) -> Tensor:
    """[R, D] -> q, k and v: [R, 3, h, d]."""
    qkv: Tensor = block.attn.qkv(block.norm1(x))
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1))


def after_attention(block: Any, x: Tensor, y: Tensor, kept: Tensor | None, kept_mlp: Tensor | None) -> Tensor:
    """The rest of the block.

    Args:
        x: [R, D], what came in.
        y: [R, D], what attention adds to it. (Its last projection is not compiled: a tensor that is no view of
            another comes out of it, and a view's base has strides that differ with the lengths.)
        kept, kept_mlp: [R, 1] factors of stochastic depth, or None for none.
    """
    x = x + (y if kept is None else y * kept)
    y = block.mlp(block.norm2(x))
    return x + (y if kept_mlp is None else y * kept_mlp)


@lru_cache(maxsize=8)
def _compiled(function: Callable[..., Tensor], compiler: str) -> Callable[..., Tensor]:
    # Functions of a block and not its methods: a copied block (a target encoder) must run with its own weights.
    return torch.compile(function, backend=compiler)


def run_block(block: Any, x: Tensor, lengths: SetLengths, route: Any = None) -> Tensor:
    """Return what ``block(x, lengths, route)`` returns without compilation, to rounding."""
    stream, after = (x, lengths) if route is None else (route.rows(x), route.lengths)  # [R_k, D]
    qkv = _compiled(before_attention, COMPILER)(block, _varies(x))  # [R, 3, h, d]
    y = block.attn.proj(block.attn.attend(qkv, lengths, route, len(stream)))  # [R_k, D]
    drops = block.training and block.drop_path.rate > 0
    kept, kept_mlp = (block.drop_path(x.new_ones(len(stream), 1), after) if drops else None for _ in range(2))
    return _compiled(after_attention, COMPILER)(block, _varies(stream), _varies(y), kept, kept_mlp)


def _varies(x: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
