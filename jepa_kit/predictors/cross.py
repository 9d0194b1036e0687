"""A predictor by cross-attention: queries at the target patches attend to the context, which is not updated.

P_c, P_t = packed context and target patches    S_c, S_t = context and target sets    k = prefix tokens of a context
D = encoder's width    E = predictor's width    n = layers of the encoder    R = P_t rows or a few more (``fill_rows``)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import MLP, Attention, CrossAttention, Init, init_transformer
from jepa_kit.encoders.packed import fill_rows, take_rows
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.encoders.prefix import add_prefix
from jepa_kit.encoders.products import Linear
from jepa_kit.registry import PREDICTORS, Backend
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import Grid, MaskBatch, Tokens


class CrossBlock(nn.Module):
    """Pre-norm block: x + self(norm(x)) if it is wanted, x + cross(norm(x), norm(context)), then x + mlp(norm(x))."""

    is_block = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int,
        self_attention: bool,
        mlp_ratio: float,
        norm_eps: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim, eps=norm_eps) if self_attention else None
        self.self_attn = Attention(dim, num_heads, backend=backend) if self_attention else None
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(2))
        self.norm_context = nn.LayerNorm(key_dim, eps=norm_eps)
        self.cross_attn = CrossAttention(dim, num_heads, key_dim=key_dim, backend=backend)
        self.mlp = MLP(dim, round(dim * mlp_ratio))

    def forward(
        self, x: Tensor, context: Tensor, lengths: SetLengths, key_lengths: SetLengths, source: Tensor | None
    ) -> Tensor:
        """Map queries [R, E] and context [P_c + S_c * k, D] -> [R, E]; see ``CrossAttention.forward``."""
        if self.self_attn is not None and self.norm_self is not None:
            x = x + self.self_attn(self.norm_self(x), lengths)
        keys = self.norm_context(context)
        x = x + self.cross_attn(self.norm1(x), keys, lengths, key_lengths, source=source)
        return x + self.mlp(self.norm2(x))


@PREDICTORS.register("cross")
class CrossPredictor(nn.Module):
    """Predict target patches by cross-attention to the context (CrossMAE, Fu et al. 2024, arXiv 2401.14391, section 3).

    A query is the mask token plus the position of its patch. Context tokens have no other positions than the encoder's.
    Without ``self_attention``, a prediction depends on no other target patch, so any part of them may be predicted.

    Args:
        embed_dim: D; supplied by the recipe.
        out_dim: width of targets; supplied by the recipe.
        grid: (H, W) patches of an image; supplied by the recipe.
        width: E, of the queries; CrossMAE's decoder has the defaults.
        depth: blocks.
        num_heads: of all attention.
        layers: blocks of the encoder (0 is the input of the first) whose outputs are mixed: each block of the predictor
            attends to a sum of them with learned weights, drawn with variance 1 / n at first (section 3.4). Null for
            the encoder's output.
        prefix: whether the encoder's class token and registers are among the keys, too.
        self_attention: whether the queries of a target set also attend to each other.
        mlp_ratio: hidden width of the MLP over E.
        norm_eps: eps of every LayerNorm.
        init: see ``ViT``.
        attention: the backend of ``attend``; supplied by the recipe.

    Raises:
        ValueError: heads or positions do not divide the width, or another value is outside its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: Grid,
        width: int = 512,
        depth: int = 12,
        num_heads: int = 16,
        layers: tuple[int, ...] | None = None,
        prefix: bool = False,
        self_attention: bool = False,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        init: Init = "released",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width (={width}) must be a multiple of 4: sine and cosine of rows and columns")
        if depth < 1:
            raise ValueError(f"depth (={depth}) must be at least 1")
        if not 1 <= width * mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio (={mlp_ratio}) must be above 0 and finite: the MLP needs a unit")
        if not 0 < norm_eps < float("inf"):
            raise ValueError(f"norm_eps (={norm_eps}) must be above 0 and finite")
        if layers is not None and not 0 < len(set(layers)) == len(layers):
            raise ValueError(f"layers (={layers}) must be different numbers of blocks, or null for the output alone")
        self.width, self.grid, self.init = width, grid, init
        self.uses_layers, self.uses_prefix = layers or (), prefix
        """What ``forward`` is given besides the context, see ``Predictor``."""
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
        self.mix = None if layers is None else nn.Parameter(torch.zeros(depth, len(layers)))
        self.blocks = nn.ModuleList(
            CrossBlock(
                width,
                num_heads,
                key_dim=embed_dim,
                self_attention=self_attention,
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                backend=attention,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.proj = Linear(width, out_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters and buffers."""
        self.pos_embed.copy_(sincos_2d(self.width, self.grid))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.mix is not None:
            nn.init.normal_(self.mix, std=self.mix.shape[1] ** -0.5)
        init_transformer(self, self.blocks, self.init)

    def forward(
        self,
        context: Tensor,
        masks: MaskBatch,
        *,
        prefix: Tensor | None = None,
        layers: Sequence[Tokens] | None = None,
    ) -> Tensor:
        """Predict every target patch.

        Args:
            context: s_x [P_c, D], packed as ``masks.context``.
            masks: masks on the predictor's grid.
            prefix: [S_c, k, D], with the option of that name.
            layers: outputs of the encoder's layers, with the option of that name; they replace context and prefix.

        Returns:
            s_hat_y [P_t, out_dim], packed as ``masks.targets``.

        Raises:
            ValueError: the masks have another grid, or the option ``prefix`` is set and the encoder has none.
        """
        if masks.grid != self.grid:
            raise ValueError(f"masks.grid (={masks.grid}) must be the predictor's (={self.grid})")
        if self.uses_prefix and (prefix is None or not prefix.shape[1]):
            raise ValueError("prefix (=True) needs an encoder that has a class token or registers")
        if layers is None:
            prefix = context.new_empty(len(masks.context), 0, context.shape[1]) if prefix is None else prefix
            layers = [Tokens(context, prefix)]
        k, lengths = layers[0].prefix.shape[1], masks.targets.lengths
        # n x [P_c + S_c * k, D] and rows
        seen = [fill_rows(add_prefix(x.prefix, x.patches, masks.context.lengths)) for x in layers]
        maps = seen[0] if self.mix is None else torch.stack(seen)
        key_lengths, source = context_rows(masks, k)
        x = fill_rows(self.mask_token + self.pos_embed[masks.targets.index])  # [R, E]
        for i, block in enumerate(self.blocks):
            keys = maps if self.mix is None else torch.einsum("n,npd->pd", self.mix[i], maps)
            x = block(x, keys, lengths, key_lengths, source)
        return take_rows(self.proj(self.norm(x)), lengths.total)


def context_rows(masks: MaskBatch, k: int = 0) -> tuple[SetLengths, Tensor | None]:
    """Return the context of each target set.

    Args:
        k: number of prefix tokens before those of each context.

    Returns:
        [S_t] the number of tokens of each one's context, and [P] the row of each in the packed context tokens: None if
        each context has one target set, in the same order, so that row i is token i.
    """
    lengths, host = masks.context.lengths.plus(k), masks.host()
    if host is not None and torch.equal(host.context_of, torch.arange(len(host.context))):
        return lengths, None
    of_sets = masks.sequences.minus(masks.targets.lengths).plus(k)
    return of_sets, lengths.offsets[masks.context_of][of_sets.set_of_token] + of_sets.position
