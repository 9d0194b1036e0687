"""The transformer block of encoders and predictors, over packed tokens.

P = packed tokens of all sets    D = width    h = heads    d = D / h    R = P or more rows (``fill_rows``)
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_kit.compat import has_forward_hooks
from jepa_kit.encoders.attention import attend
from jepa_kit.encoders.casts import cast_weights
from jepa_kit.encoders.compiled import run_compiled
from jepa_kit.encoders.products import Linear, by_onednn
from jepa_kit.registry import Backend, check_choice
from jepa_kit.set_lengths import SetLengths

Init = Literal["released", "depth_scaled"]
Compile = bool | Literal["auto"]

WIDE = 768
"""Width of an encoder from which compilation pays off on CUDA: ViT-B. Smaller ones are bound by kernel launches."""

COUNTS = 32
"""Number of different row counts that ``fill_rows`` produces between two powers of two."""


def fill_rows(x: Tensor) -> Tensor:
    """Append zero rows if that makes the matrix products faster: [P, D] -> [R, D].

    oneDNN compiles a kernel for each size of a product (about 2 ms) and caches the last 1,024 of them, 0.6 MB each.
    Ragged sets have a different number of tokens at every step, so rows are rounded up, by at most 1 / COUNTS. The
    extra rows belong to no set: attention ignores them, and the caller removes them at the end (``take_rows``).
    """
    if not by_onednn(x):
        return x
    step = max(1, (1 << (len(x) - 1).bit_length()) // (2 * COUNTS))
    return add_rows(x, -(-len(x) // step) * step)


def add_rows(x: Tensor, rows: int) -> Tensor:
    """Pad with zero rows: [P, D] -> [rows, D]."""
    return x if len(x) == rows else nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def take_rows(x: Tensor, rows: int) -> Tensor:
    """Return the first rows: [R, ...] -> [rows, ...].

    If these are all rows, return ``x`` itself: the backward of a view fills a tensor with zeros, and FSDP2 warns of it.
    """
    return x if len(x) == rows else x[:rows]


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows of a block's input form its sets, and which tokens the block returns.

    Args:
        source: [P], the input row of each token of the sets; a row may be in several sets. None if row i is token i.
        kept: [P_k], the tokens that the block returns, in this order; None for all.
        lengths: lengths of the sets of kept tokens; as many sets as before.
    """

    source: Tensor | None
    kept: Tensor | None
    lengths: SetLengths

    def rows(self, x: Tensor) -> Tensor:
        """Return the input rows of the kept tokens, plus ``fill_rows``: [R, D] -> [R_k, D]."""
        index = self.source if self.kept is None else self.kept
        if self.source is not None and self.kept is not None:
            index = self.source.index_select(0, self.kept)
        return x if index is None else fill_rows(x.index_select(0, index))


class Attention(nn.Module):
    """Multi-head self-attention within each set, with one projection for q, k and v."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, backend: Backend = "auto") -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads (={num_heads}) must divide the width (={dim})")
        self.num_heads = num_heads
        self.backend: Backend = backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, lengths: SetLengths, route: Route | None = None, rows: int | None = None) -> Tensor:
        """Map [R, D] -> [rows, D], tokens first; see ``Block.forward``. ``rows`` is R by default."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [R, 3, h, d]
        return self.proj(self.attend(qkv, lengths, route, len(x) if rows is None else rows))

    def attend(self, qkv: Tensor, lengths: SetLengths, route: Route | None, rows: int) -> Tensor:
        """Attend, without the two projections: [R, 3, h, d] -> [rows, D]."""
        source, kept = (None, None) if route is None else (route.source, route.kept)
        qkv = take_rows(qkv, lengths.total) if source is None else qkv.index_select(0, source)
        q, k, v = qkv.unbind(1)  # 3 x [P, h, d]
        out = attend(q, k, v, lengths, self.backend).flatten(1)  # [P, D]
        return add_rows(out if kept is None else out.index_select(0, kept), rows)


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of each set to the tokens of another set, with one projection for k and v.

    Args:
        dim: D, width of the queries and of the output.
        num_heads: h; it must divide the width.
        key_dim: width of the tokens that are attended to; ``dim`` by default.
        qkv_bias: whether the projections to q, k and v have a bias.
        backend: of ``attend``.

    Raises:
        ValueError: ``num_heads`` does not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        qkv_bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads (={num_heads}) must divide the width (={dim})")
        self.num_heads = num_heads
        self.backend: Backend = backend
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim if key_dim is None else key_dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, lengths: SetLengths, key_lengths: SetLengths) -> Tensor:
        """Map queries [R, D] and context [Rk, key_dim] -> [R, D]; tokens first, as in ``Block.forward``.

        Args:
            lengths: lengths of the sets of queries.
            key_lengths: lengths of the sets of context tokens; as many.
        """
        q = take_rows(self.q(x), lengths.total).unflatten(-1, (self.num_heads, -1))  # [P, h, d]
        k, v = take_rows(self.kv(context), key_lengths.total).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        out = attend(q, k, v, lengths, self.backend, key_lengths=key_lengths)  # [P, h, d]
        return self.proj(add_rows(out.flatten(1), len(x)))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1.gelu(x))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drop a residual branch for a whole set.

    Args:
        rate: probability of dropping, in [0, 1). Kept branches are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path (={rate}) must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor, lengths: SetLengths) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(len(lengths), device=x.device) >= self.rate
        scale = kept.to(x.dtype) / (1.0 - self.rate)
        return x * add_rows(scale[lengths.set_of_token, None], len(x))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        compiled: whether to run in compiled regions (compiled.py).
        may_compile: whether ``compile_blocks`` may set ``compiled``.
        checkpointed: whether to save only the input for the backward pass and recompute the rest, with the same draws
            of stochastic depth (Chen et al. 2016, "Training deep nets with sublinear memory cost").

    Raises:
        ValueError: heads do not divide the width, the MLP has no unit, eps is not above 0, the drop rate is outside
            [0, 1), or the backend is unknown.
    """

    is_block = True
    """Marks what FSDP shards and activation checkpointing recomputes as a whole."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        backend: Backend = "auto",
        compiled: Compile = False,
    ) -> None:
        super().__init__()
        if not math.isfinite(mlp_ratio) or round(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio (={mlp_ratio}) must be above 0 and finite: the MLP needs a unit")
        if not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps (={norm_eps}) must be above 0 and finite")
        check_choice("attention", backend, Backend)
        self.compiled = compiled is True
        self.may_compile = compiled == "auto"
        self.checkpointed = False
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, backend=backend)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        # The ratios of ViT-g and ViT-G are fractions: rounding gives their integer widths.
        self.mlp = MLP(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, lengths: SetLengths, route: Route | None = None) -> Tensor:
        """Map [R, D] -> [R, D], or with a ``route`` to the tokens that it keeps.

        norm1, q, k and v are computed once per row of ``x``, everything after attention for kept tokens only.
        """
        if self.checkpointed and torch.is_grad_enabled():
            draws = self.training and self.drop_path.rate > 0
            return checkpoint(self._forward, x, lengths, route, use_reentrant=False, preserve_rng_state=draws)
        return self._forward(x, lengths, route)

    def _forward(self, x: Tensor, lengths: SetLengths, route: Route | None) -> Tensor:
        if self.compiled:
            return next(run_compiled([self], x, lengths, [route]))
        stream, after = (x, lengths) if route is None else (route.rows(x), route.lengths)
        with cast_weights([self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2], x.device.type):
            x = stream + self.drop_path(self.attn(self.norm1(x), lengths, route, len(stream)), after)
            return x + self.drop_path(self.mlp(self.norm2(x)), after)


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, lengths: SetLengths, routes: Sequence[Route | None] | None = None
) -> Iterator[Tensor]:
    """Yield the output of each block, [R, D], one after another, so that none is stored here.

    Args:
        blocks: ``Block``s, in order.
        x: [R, D].
        lengths: lengths of the sets.
        routes: a route or None per block, see ``Block.forward``; None for no routes.
    """
    every: list[Any] = list(blocks)
    routes = [None] * len(every) if routes is None else routes
    # Hooks (FSDP2 gathers weights in one) and activation checkpoints need each block to be called.
    apart = any(has_forward_hooks(b) or (b.checkpointed and torch.is_grad_enabled()) for b in every)
    if all(b.compiled for b in every) and not apart:
        yield from run_compiled(every, x, lengths, routes)
        return
    for block, route in zip(every, routes, strict=True):
        x = block(x, lengths, route)
        yield x


def checkpoint_activations(module: nn.Module) -> None:
    """Set ``checkpointed`` in every ``Block`` of a module.

    Raises:
        ValueError: the module has no ``Block``.
    """
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    if not blocks:
        name = type(module).__name__
        raise ValueError(f"{name} has no block of jepa_kit.encoders.blocks, so checkpointing activations does nothing")
    for block in blocks:
        block.checkpointed = True


def compile_blocks(module: nn.Module, device: torch.device, width: int) -> None:
    """Compile the blocks whose option is ``auto``, if that pays off: on CUDA, with Triton, for a wide encoder.

    For training only: a compilation takes longer than most evaluations.

    Args:
        width: width of the encoder, which decides for its predictor too.
    """
    if device.type == "cuda" and width >= WIDE and importlib.util.find_spec("triton") is not None:
        for block in module.modules():
            if isinstance(block, Block):
                block.compiled |= block.may_compile


def make_blocks(dim: int, depth: int, num_heads: int, *, drop_path: float = 0.0, **options: Any) -> nn.ModuleList:
    """Return ``depth`` blocks, whose drop rate rises linearly from 0 to ``drop_path``.

    Args:
        options: of each ``Block``.

    Raises:
        ValueError: depth is below 1, the drop rate is outside [0, 1), or ``Block`` rejects an option.
    """
    if depth < 1:
        raise ValueError(f"depth (={depth}) must be at least 1")
    DropPath(drop_path)  # check the user's value, not a block's fraction of it
    rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
    return nn.ModuleList(Block(dim, num_heads, drop_path=rate, **options) for rate in rates)


def init_transformer(module: nn.Module, blocks: nn.ModuleList, init: Init) -> None:
    """Initialise every Linear by a truncated normal (0.02) with zero bias, and every LayerNorm by one and zero.

    ``released`` does no more, as the released code in effect: its constructor scales by depth, but a second
    initialisation undoes that. ``depth_scaled`` also divides attn.proj and mlp.fc2 of block l = 1, 2, ... by sqrt(2 l),
    as BEiT does and the release intends to.

    Raises:
        ValueError: ``init`` is unknown.
    """
    check_choice("init", init, Init)
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    if init == "depth_scaled":
        with torch.no_grad():
            for i, block in enumerate(blocks, start=1):
                assert isinstance(block, Block)
                block.attn.proj.weight.div_(math.sqrt(2.0 * i))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * i))
