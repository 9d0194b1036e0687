"""The narrow ViT that predicts one target block at a time.

P_c, P_t = packed context and target patches    S_t = target sets    D = encoder's width    E = predictor's width
P = tokens of all sequences    R = P rows or a few more (``fill_rows``)
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders.blocks import Compile, Init, init_transformer, make_blocks, run_blocks
from jepa_kit.encoders.packed import NO_TERMS, Route, Terms, fill_rows, take_rows
from jepa_kit.encoders.positions import rotary_angles, sincos_2d
from jepa_kit.encoders.prefix import add_prefix
from jepa_kit.encoders.products import Linear
from jepa_kit.registry import PREDICTORS, Backend, check_choice
from jepa_kit.structures import MaskBatch

Positions = Literal["sincos", "rotary", "rotary_video"]


@PREDICTORS.register("vit")
class ViTPredictor(nn.Module):
    """I-JEPA's predictor (section 3, A.1): one pass over context and mask tokens per target block.

    The sequence of a target block consists of its context's tokens, projected to the predictor's width, and one mask
    token per patch of the block, all with their positions. Blocks do not attend to each other.

    Args:
        embed_dim: D; supplied by the recipe.
        out_dim: width of targets; supplied by the recipe.
        grid: (H, W) patches of an image; supplied by the recipe.
        width: E (384 in the paper for every encoder).
        depth: blocks (6 for ViT-B, 12 for larger ones).
        num_heads: as many as the encoder's in the release.
        prefix: whether the encoder's class token and registers are in every sequence, projected like context tokens and
            without positions (MAE's decoder has the class token).
        positions: ``sincos`` adds them to the tokens; ``rotary`` and ``rotary_video`` rotate queries and keys, see
            ``ViT``. A prefix has none.
        rotary_base: of rotary positions, see ``ViT``.
        mask_tokens: number of mask tokens. Targets of the i-th context of an image have token i modulo this number:
            V-JEPA has one for each group of masker ``multigroup``.
        mask_std: standard deviation of the first mask tokens; 0 in V-JEPA.
        mlp_ratio: hidden width of the MLP over E.
        norm_eps: eps of every LayerNorm.
        drop_path: stochastic depth, see ``ViT``.
        init: see ``ViT``.
        compile: see ``ViT``.
        attention: the backend of ``attend``; supplied by the recipe.

    Raises:
        ValueError: heads or positions do not divide the width, or another value is outside its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: tuple[int, int],
        width: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        prefix: bool = False,
        positions: Positions = "sincos",
        rotary_base: float = 100.0,
        mask_tokens: int = 1,
        mask_std: float = 0.02,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        init: Init = "released",
        compile: Compile = "auto",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice("positions", positions, Positions)
        if positions == "sincos" and (width < 4 or width % 4):
            raise ValueError(f"width (={width}) must be a multiple of 4: sine and cosine of rows and columns")
        if mask_tokens < 1:
            raise ValueError(f"mask_tokens (={mask_tokens}) must be at least 1")
        if not 0 < rotary_base < math.inf:
            raise ValueError(f"rotary_base (={rotary_base}) must be above 0 and finite")
        if not 0 <= mask_std < math.inf:
            raise ValueError(f"mask_std (={mask_std}) must be at least 0 and finite")
        self.width, self.grid, self.init, self.mask_std = width, grid, init, mask_std
        self.positions: Positions = positions
        self.head_dim, self.rotary_base = width // max(num_heads, 1), rotary_base
        self.uses_prefix = prefix
        """Whether ``forward`` is given the encoder's prefix tokens."""
        self.embed = Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(mask_tokens, width))
        self.pos_embed: Tensor  # None if positions are rotary
        self.register_buffer("pos_embed", sincos_2d(width, grid) if positions == "sincos" else None, persistent=False)
        self.blocks = make_blocks(
            width,
            depth,
            num_heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            drop_path=drop_path,
            backend=attention,
            compiled=compile,
        )
        self.angles()  # checks the width of heads
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.proj = Linear(width, out_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters and buffers."""
        if self.pos_embed is not None:
            self.pos_embed.copy_(sincos_2d(self.width, self.grid))
        if self.mask_std:
            nn.init.trunc_normal_(self.mask_token, std=self.mask_std)
        else:
            nn.init.zeros_(self.mask_token)
        init_transformer(self, self.blocks, self.init)

    def forward(self, context: Tensor, masks: MaskBatch, *, prefix: Tensor | None = None) -> Tensor:
        """Predict every target patch.

        Args:
            context: s_x [P_c, D], packed as ``masks.context``.
            masks: masks on the predictor's grid.
            prefix: [S_c, k, D], the encoder's tokens before those of each context, with the option ``prefix``.

        Returns:
            s_hat_y [P_t, out_dim], packed as ``masks.targets``.

        Raises:
            ValueError: the masks have another grid, or the option ``prefix`` is set and the encoder has none.
        """
        if masks.grid != self.grid:
            raise ValueError(f"masks.grid (={masks.grid}) must be the predictor's (={self.grid})")
        if self.uses_prefix and (prefix is None or not prefix.shape[1]):
            raise ValueError("prefix (=True) needs an encoder that has a class token or registers")
        return self.run(*self.tokens(context, masks, prefix), masks)

    def tokens(self, context: Tensor, masks: MaskBatch, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of the first block's sequences.

        Returns:
            seen [P_c + S_c * k, E]: of each context, after its prefix; positions that are added are in both, but not in
                the prefix.
            hidden [P_t, E]: the mask token of each target patch.
        """
        seen = take_rows(self.embed(fill_rows(context)), len(context))  # [P_c, E]
        hidden = self.masked(masks)
        if self.pos_embed is None:
            seen = seen.to(hidden.dtype)  # as after the sum with positions, if autocast made it bf16
        else:
            seen = seen + self.pos_embed[masks.context.index]
            hidden = hidden + self.pos_embed[masks.targets.index]
        if prefix is not None:
            first = self.embed(prefix.flatten(0, 1)).unflatten(0, prefix.shape[:2])  # [S_c, k, E]
            seen = add_prefix(first.to(seen.dtype), seen, masks.context.lengths)
        return seen, hidden.to(seen.dtype)

    def masked(self, masks: MaskBatch) -> Tensor:
        """Return the mask token of each target patch, without position: [P_t, E]."""
        if len(self.mask_token) == 1:
            return self.mask_token.expand(masks.targets.num_patches, -1)
        token = (masks.context.number % len(self.mask_token))[masks.context_of]  # [S_t]
        return F.embedding(token[masks.targets.lengths.set_of_token], self.mask_token)

    def angles(self) -> Tensor | None:
        """Return the angles of rotary positions, [N, d], see ``rotary_angles``; None for others."""
        if self.positions == "sincos":
            return None
        return rotary_angles(self.head_dim, self.grid, self.rotary_base, self.mask_token, self.positions)

    def terms(self, masks: MaskBatch, order: Tensor, k: int) -> Terms:
        """Return what attention adds in sequences of ``sequence_order`` with k prefix tokens: rotary positions."""
        angles = self.angles()
        if angles is None:
            return NO_TERMS
        still = angles.new_zeros(len(masks.context), k, angles.shape[1])
        seen = add_prefix(still, angles[masks.context.index], masks.context.lengths)  # [P_c + S_c * k, d]
        every = torch.cat([seen, angles[masks.targets.index]]).index_select(0, order).unsqueeze(1)  # [P, 1, d]
        return Terms(rotation=(every.cos(), every.sin()))

    def run(self, seen: Tensor, hidden: Tensor, masks: MaskBatch) -> Tensor:
        """Run the blocks over all sequences, and predict: ``tokens`` -> [P_t, out_dim]."""
        k = (len(seen) - masks.context.num_patches) // len(masks.context)
        sequences = masks.sequences.plus(k)
        order, is_target = sequence_order(masks, k)
        x = fill_rows(torch.cat([seen, hidden]))  # [P_c + S_c * k + P_t, E] and rows
        # A context token is in the sequence of each of its target blocks. Up to the first attention its value is the
        # same in all of them, so the first block computes it once. After the last attention only targets are needed.
        routes: list[Route | None] = [None] * len(self.blocks)
        routes[0] = Route(order, None, sequences)
        routes[-1] = Route(order if len(routes) == 1 else None, is_target, masks.targets.lengths)
        for output in run_blocks(self.blocks, x, sequences, routes, repeat(self.terms(masks, order, k), len(routes))):
            x = output
        return take_rows(self.proj(self.norm(x)), len(is_target))  # [P_t, out_dim]


def sequence_order(masks: MaskBatch, k: int = 0) -> tuple[Tensor, Tensor]:
    """Return how sequences are composed of context and target tokens, context first.

    Args:
        k: number of prefix tokens before those of each context; sequences have the lengths ``masks.sequences.plus(k)``.

    Returns:
        order [P]: for each place, its row in the concatenation of all context and all target tokens.
        is_target [P_t]: the places of the target tokens, in the order of ``masks.targets``.
    """
    context, targets, lengths = masks.context.lengths.plus(k), masks.targets.lengths, masks.sequences.plus(k)
    seen = (context.offsets[1:] - context.offsets[:-1])[masks.context_of]  # [S_t] length of each one's context
    sequence, place = lengths.set_of_token, lengths.position  # [P]
    of_context = context.offsets[masks.context_of][sequence] + place
    of_target = context.total + targets.offsets[sequence] + place - seen[sequence]
    order = torch.where(place < seen[sequence], of_context, of_target)
    own = targets.set_of_token  # [P_t]
    is_target = lengths.offsets[own] + seen[own] + targets.position
    return order, is_target
