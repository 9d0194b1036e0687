"""The narrow ViT that predicts one target block at a time.

P_c, P_t = packed context and target patches    S_t = target sets    D = encoder's width    E = predictor's width
P = tokens of all sequences    R = P rows or a few more (``fill_rows``)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import Compile, Init, init_transformer, make_blocks, run_blocks
from jepa_kit.encoders.packed import Route, fill_rows, take_rows
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.encoders.prefix import add_prefix
from jepa_kit.encoders.products import Linear
from jepa_kit.registry import PREDICTORS, Backend
from jepa_kit.structures import MaskBatch


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
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        init: Init = "released",
        compile: Compile = "auto",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width (={width}) must be a multiple of 4: sine and cosine of rows and columns")
        self.width, self.grid, self.init = width, grid, init
        self.uses_prefix = prefix
        """Whether ``forward`` is given the encoder's prefix tokens."""
        self.embed = Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
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
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.proj = Linear(width, out_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters and buffers."""
        self.pos_embed.copy_(sincos_2d(self.width, self.grid))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
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
            seen [P_c + S_c * k, E]: of each context, with its position, after its prefix, which has none.
            hidden [P_t, E]: the mask token with the position of each target patch.
        """
        seen = take_rows(self.embed(fill_rows(context)), len(context))  # [P_c, E]
        seen = seen + self.pos_embed[masks.context.index]
        if prefix is not None:
            first = self.embed(prefix.flatten(0, 1)).unflatten(0, prefix.shape[:2])  # [S_c, k, E]
            seen = add_prefix(first.to(seen.dtype), seen, masks.context.lengths)
        hidden = self.mask_token + self.pos_embed[masks.targets.index]  # [P_t, E]
        return seen, hidden.to(seen.dtype)

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
        for output in run_blocks(self.blocks, x, sequences, routes):
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
