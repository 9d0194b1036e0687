"""CAE's regressor and decoder: tokens of the hidden patches from those of the visible ones, then their codes.

P_c, P_t = packed visible and hidden patches    D = width    P_k = keys of all sets
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import MLP, CrossAttention, init_transformer, make_blocks, run_blocks
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.encoders.products import Linear
from jepa_kit.predictors.vit import sequence_order
from jepa_kit.registry import PREDICTORS, Backend
from jepa_kit.structures import Grid, MaskBatch


class RegressorBlock(nn.Module):
    """Cross-attention from hidden patches to visible and hidden ones; positions are in queries and keys, not in values.

    Then x = norm2(x), without a residual around the norm, and x = x + mlp(x), as in the released code.
    """

    is_block = True

    def __init__(self, dim: int, num_heads: int, norm_eps: float, layer_scale: float, backend: Backend) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, num_heads, key_bias=False, backend=backend)
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(4))
        self.mlp = MLP(dim, 4 * dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, positions: Tensor, order: Tensor, masks: MaskBatch) -> Tensor:
        """Map hidden tokens x [P_t, D] -> [P_t, D].

        Args:
            context: [P_c, D], the encoder's tokens of the visible patches.
            positions: [P_c + P_t, D].
            order: [P_k], the keys of each set as rows of the P_c + P_t tokens.
        """
        both = torch.cat([context, x])  # [P_c + P_t, D]
        q, k = self.norm_q(x + positions[len(context) :]), self.norm_k(both + positions)
        lengths = (masks.targets.lengths, masks.sequences)
        y = self.attn(q, k, *lengths, values=self.norm_v(both), source=order)  # [P_t, D]
        x = self.norm2(x + self.scale1 * y)
        return x + self.scale2 * self.mlp(x)


@PREDICTORS.register("cae_regressor")
class Regressor(nn.Module):
    """Predict the encoder's tokens of the hidden patches (CAE, Chen et al. 2022, section 3.1).

    Args:
        embed_dim, out_dim: D, the encoder's and the target's width, which must be equal; supplied by the recipe.
        grid: (H, W) patches of an image; supplied by the recipe.
        depth: blocks, at least 1.
        num_heads: h, which must divide D.
        layer_scale: first factor of the branches of a block.
        norm_eps: eps of every LayerNorm.
        attention: the backend of ``attend``; supplied by the recipe.

    Raises:
        ValueError: the widths differ, or another value is outside its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: Grid,
        depth: int = 4,
        num_heads: int = 12,
        layer_scale: float = 0.1,
        norm_eps: float = 1e-6,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        if out_dim != embed_dim:
            raise ValueError(f"out_dim (={out_dim}) of the target must be the encoder's width (={embed_dim})")
        if depth < 1:
            raise ValueError(f"depth (={depth}) must be at least 1")
        blocks = (RegressorBlock(embed_dim, num_heads, norm_eps, layer_scale, attention) for _ in range(depth))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(embed_dim, grid), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        init_transformer(self, self.blocks, "released")

    def forward(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """[P_c, D] packed as ``masks.context`` -> [P_t, D] packed as ``masks.targets``."""
        positions = self.pos_embed[torch.cat([masks.context.index, masks.targets.index])]
        order, _ = sequence_order(masks)
        x = self.mask_token.to(context.dtype).expand(masks.targets.num_patches, -1)
        for block in self.blocks:
            x = block(x, context, positions, order, masks)
        return self.norm(x)


@PREDICTORS.register("cae_decoder")
class Decoder(nn.Module):
    """Predict codes from predicted tokens: self-attention within the hidden patches of each set (CAE, section 3.1).

    Args:
        out_dim: K, codes of the vocabulary; supplied by the recipe.
        depth, num_heads: of the blocks.
        layer_scale: initial value of the factors of each block's branches.
        norm_eps: eps of every LayerNorm.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: Grid,
        depth: int = 4,
        num_heads: int = 12,
        layer_scale: float = 0.1,
        norm_eps: float = 1e-6,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(embed_dim, grid), persistent=False)
        self.blocks = make_blocks(
            embed_dim, depth, num_heads, layer_scale=layer_scale, norm_eps=norm_eps, backend=attention
        )
        self.norm, self.proj = nn.LayerNorm(embed_dim, eps=norm_eps), Linear(embed_dim, out_dim)
        init_transformer(self, self.blocks, "released")

    def forward(self, tokens: Tensor, masks: MaskBatch) -> Tensor:
        """[P_t, D], packed as ``masks.targets`` -> scores [P_t, K]."""
        x = tokens + self.pos_embed[masks.targets.index]
        *_, x = run_blocks(self.blocks, x, masks.targets.lengths)
        return self.proj(self.norm(x))
