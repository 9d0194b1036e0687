"""The transformer block of encoders and predictors, over packed tokens.

P = packed tokens of all sets    D = width    h = heads    d = D / h    R = P or more rows (``fill_rows``)
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_kit.compat import has_forward_hooks
from jepa_kit.encoders.attention import attend
from jepa_kit.encoders.casts import cast_weights
from jepa_kit.encoders.compiled import run_compiled
from jepa_kit.encoders.packed import NO_TERMS, Route, Terms, add_rows, rotate, take_rows
from jepa_kit.encoders.products import Linear
from jepa_kit.registry import Backend, check_choice
from jepa_kit.set_lengths import SetLengths

Init = Literal["released", "depth_scaled", "xavier"]
Compile = bool | Literal["auto"]

WIDE = 768
"""Width of an encoder from which compilation pays off on CUDA: ViT-B. Smaller ones are bound by kernel launches."""


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

    def forward(
        self,
        x: Tensor,
        lengths: SetLengths,
        route: Route | None = None,
        rows: int | None = None,
        terms: Terms = NO_TERMS,
    ) -> Tensor:
        """Map [R, D] -> [rows, D], tokens first; see ``Block.forward``. ``rows`` is R by default."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [R, 3, h, d]
        return self.proj(self.attend(qkv, lengths, route, len(x) if rows is None else rows, terms))

    def attend(
        self,
        qkv: Tensor,
        lengths: SetLengths,
        route: Route | None,
        rows: int,
        terms: Terms,
        split: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """Attend, without the two projections: [R, 3, h, d] -> [rows, D]. ``split`` is used in place of ``unbind``."""
        source, kept = (None, None) if route is None else (route.source, route.kept)
        qkv = take_rows(qkv, lengths.total) if source is None else qkv.index_select(0, source)
        q, k, v = qkv.unbind(1) if split is None else split(qkv)  # 3 x [P, h, d]
        if terms.rotation is not None:
            q, k = rotate(q, terms.rotation), rotate(k, terms.rotation)
        out = attend(q, k, v, lengths, self.backend, bias=terms.bias, causal=terms.causal).flatten(1)  # [P, D]
        return add_rows(out if kept is None else out.index_select(0, kept), rows)


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of each set to the tokens of another set.

    Args:
        dim: D, width of the queries and of the output.
        num_heads: h; it must divide the width.
        key_dim: D_k, width of the tokens that are attended to; ``dim`` by default.
        key_bias: whether the projection to keys has a bias. It changes no output, as in ``ViT``; CAE has none.
        backend: of ``attend``.

    Raises:
        ValueError: ``num_heads`` does not divide the width, or the backend is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        key_bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads (={num_heads}) must divide the width (={dim})")
        check_choice("attention", backend, Backend)
        self.num_heads = num_heads
        self.backend: Backend = backend
        key_dim = dim if key_dim is None else key_dim
        self.q, self.k, self.v = Linear(dim, dim), Linear(key_dim, dim, bias=key_bias), Linear(key_dim, dim)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        lengths: SetLengths,
        key_lengths: SetLengths,
        *,
        values: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Map queries [R, D] and keys [Rk, D_k] -> [R, D]; tokens first, as in ``Block.forward``.

        Args:
            lengths: lengths of the sets of queries.
            key_lengths: lengths of the sets of keys; as many.
            values: [Rk, D_k], if they are projected from other tokens than the keys.
            source: [Pk], the row of each key of the sets; a row may be in several sets. None if row i is key i.
        """
        q = take_rows(self.q(x), lengths.total)
        k, v = self.k(keys), self.v(keys if values is None else values)  # [Rk, D]
        k, v = (take_rows(y, key_lengths.total) if source is None else y.index_select(0, source) for y in (k, v))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))  # [P or Pk, h, d]
        out = attend(q, k, v, lengths, self.backend, key_lengths=key_lengths)
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

    Args:
        layer_scale: initial value of a learned factor of each channel of both branches (LayerScale, Touvron et al.
            2021, "Going deeper with image transformers"); None for no factors.

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
        layer_scale: float | None = None,
        backend: Backend = "auto",
        compiled: Compile = False,
    ) -> None:
        super().__init__()
        if layer_scale is not None and not math.isfinite(layer_scale):
            raise ValueError(f"layer_scale (={layer_scale}) must be finite, or null for none")
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
        self.layer_scale = layer_scale
        self.scale1, self.scale2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor, lengths: SetLengths, route: Route | None = None, terms: Terms = NO_TERMS) -> Tensor:
        """Map [R, D] -> [R, D], or with a ``route`` to the tokens that it keeps.

        norm1, q, k and v are computed once per row of ``x``, everything after attention for kept tokens only.
        """
        if self.checkpointed and torch.is_grad_enabled():
            draws = self.training and self.drop_path.rate > 0
            return checkpoint(self._forward, x, lengths, route, terms, use_reentrant=False, preserve_rng_state=draws)
        return self._forward(x, lengths, route, terms)

    def _forward(self, x: Tensor, lengths: SetLengths, route: Route | None, terms: Terms) -> Tensor:
        if self.compiled:
            return next(run_compiled([self], x, lengths, [route], [terms]))
        stream, after = (x, lengths) if route is None else (route.rows(x), route.lengths)
        with cast_weights([self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2], x.device.type):
            y = self.attn(self.norm1(x), lengths, route, len(stream), terms)
            x = stream + self.drop_path(y if self.scale1 is None else y * self.scale1, after)
            y = self.mlp(self.norm2(x))
            return x + self.drop_path(y if self.scale2 is None else y * self.scale2, after)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    lengths: SetLengths,
    routes: Sequence[Route | None] | None = None,
    terms: Iterable[Terms] | None = None,
) -> Iterator[Tensor]:
    """Yield the output of each block, [R, D], one after another, so that none is stored here.

    Args:
        blocks: ``Block``s, in order.
        x: [R, D].
        lengths: lengths of the sets.
        routes: a route or None per block, see ``Block.forward``; None for no routes.
        terms: of each block's attention; None for none.
    """
    every: list[Any] = list(blocks)
    terms = repeat(NO_TERMS, len(every)) if terms is None else terms
    routes = [None] * len(every) if routes is None else routes
    # Hooks (FSDP2 gathers weights in one) and activation checkpoints need each block to be called.
    apart = any(has_forward_hooks(b) or (b.checkpointed and torch.is_grad_enabled()) for b in every)
    if all(b.compiled for b in every) and not apart:
        yield from run_compiled(every, x, lengths, routes, terms)
        return
    for block, route, term in zip(every, routes, terms, strict=True):
        x = block(x, lengths, route, term)
        yield x


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a module, of jepa_kit or not: the modules inside with a true attribute ``is_block``."""
    return [inner for inner in module.modules() if getattr(inner, "is_block", False)]


def checkpoint_activations(module: nn.Module) -> None:
    """Checkpoint the activations of every block of a module: set ``checkpointed``, or wrap the forward of others.

    Raises:
        ValueError: the module has no block.
    """
    blocks: list[Any] = blocks_of(module)
    if not blocks:
        name = type(module).__name__
        raise ValueError(f"{name} has no block (a module with is_block = True), so there is nothing to checkpoint")
    for block in blocks:
        if hasattr(block, "checkpointed"):
            block.checkpointed = True
        else:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module, device: torch.device, width: int) -> None:
    """Compile the blocks that have ``may_compile``, if that pays off: on CUDA, with Triton, for a wide encoder.

    For training only: a compilation takes longer than most evaluations.

    Args:
        width: width of the encoder, which decides for its predictor too.
    """
    if device.type == "cuda" and width >= WIDE and importlib.util.find_spec("triton") is not None:
        blocks: list[Any] = blocks_of(module)
        for block in blocks:
            if hasattr(block, "compiled"):
                block.compiled |= block.may_compile
            elif getattr(block, "may_compile", False):
                block.compile(dynamic=True)


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
    """Initialise every Linear by a truncated normal (0.02) with zero bias, every LayerNorm by one and zero.

    ``released`` does no more, as the released code in effect: its constructor scales by depth, but a second
    initialisation undoes that. ``depth_scaled`` also divides attn.proj and mlp.fc2 of block l = 1, 2, ... by sqrt(2 l),
    as BEiT does and the release intends to. ``xavier`` draws each weight Xavier-uniform, as MAE does (appendix A.1).

    Raises:
        ValueError: ``init`` is unknown.
    """
    check_choice("init", init, Init)
    for m in module.modules():
        if isinstance(m, nn.Linear):
            if init == "xavier":
                nn.init.xavier_uniform_(m.weight)
            else:
                nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, Block) and m.layer_scale is not None:
            for scale in (m.scale1, m.scale2):
                assert scale is not None
                nn.init.constant_(scale, m.layer_scale)
    if init == "depth_scaled":
        with torch.no_grad():
            for i, block in enumerate(blocks, start=1):
                for name, m in block.named_modules():
                    if name.endswith(("attn.proj", "mlp.fc2")):
                        assert isinstance(m, nn.Linear)
                        m.weight.div_(math.sqrt(2.0 * i))
