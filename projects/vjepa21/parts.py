"""V-JEPA 2.1's predictor, and the distance of each visible patch from the hidden ones.

P_c, P_t, P_v, P = packed patches of contexts, of targets, of visible patches of each sequence, of all sequences
S = sequences    D = encoder's width    E = predictor's width    n = levels    N = H * W patches of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import run_blocks
from jepa_kit.encoders.packed import NO_TERMS, Terms, fill_rows, take_rows
from jepa_kit.encoders.products import Linear
from jepa_kit.predictors import ViTPredictor
from jepa_kit.predictors.vit import Positions, sequence_order
from jepa_kit.registry import PREDICTORS, Backend
from jepa_kit.set_lengths import SetLengths, unchecked
from jepa_kit.structures import Grid, MaskBatch, PatchSets, Tokens


@PREDICTORS.register("dense")
class DensePredictor(nn.Module):
    """Predictor ``vit`` on several levels of the encoder, which also predicts the patches of the context.

    A layer with a GELU and another one fuse the levels' tokens, side by side (V-JEPA 2.1, arXiv 2603.14482).

    Args:
        embed_dim, out_dim, grid, attention: supplied by the recipe, see ``ViTPredictor``.
        layers: numbers of the encoder's blocks that are fused, from 1.
        width, depth, num_heads, positions, rotary_base, mask_tokens, mask_std: see ``ViTPredictor``.

    Raises:
        ValueError: there is no layer, or one is named twice; or as ``ViTPredictor``.
    """

    predicts_visible = True

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        grid: Grid,
        layers: tuple[int, ...],
        width: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        positions: Positions = "rotary_video",
        rotary_base: float = 10000.0,
        mask_tokens: int = 2,
        mask_std: float = 0.0,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers (={tuple(layers)}) must be different numbers of blocks, at least one")
        self.uses_layers = tuple(layers)
        self.fc1, self.fc2 = Linear(len(layers) * embed_dim, embed_dim), Linear(embed_dim, embed_dim)
        self.vit = ViTPredictor(
            embed_dim=embed_dim,
            out_dim=out_dim,
            grid=grid,
            width=width,
            depth=depth,
            num_heads=num_heads,
            positions=positions,
            rotary_base=rotary_base,
            mask_tokens=mask_tokens,
            mask_std=mask_std,
            attention=attention,
        )
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, context: Tensor, masks: MaskBatch, *, layers: Sequence[Tokens]) -> Tensor:
        """Predict hidden patches, or all those of ``Sequences.every``: [P_t, out_dim], packed as ``masks.targets``.

        Args:
            context: s_x [P_c, D], which is not read.
            masks: on the predictor's grid.
            layers: n tokens [P_c, D], packed as ``masks.context``.
        """
        levels = fill_rows(torch.cat([tokens.patches for tokens in layers], dim=1))  # [R, n * D]
        fused = take_rows(self.fc2(self.fc1.gelu(levels)), len(context))  # [P_c, D]
        if masks.targets.hidden is None:
            predictions: Tensor = self.vit(fused, masks)
            return predictions
        vit, patches, lengths = self.vit, masks.targets, masks.targets.lengths
        hidden = vit.masked(masks)  # [P, E]
        starts = masks.context.lengths.offsets[masks.context_of]  # [S]
        rows = (starts[lengths.set_of_token] + lengths.position).masked_fill(masks.targets.hidden, 0)
        seen = take_rows(vit.embed(fill_rows(fused)), len(fused)).to(hidden.dtype).index_select(0, rows)
        x = torch.where(masks.targets.hidden[:, None], hidden, seen)
        x = x if vit.pos_embed is None else x + vit.pos_embed[patches.index]
        terms, angles = NO_TERMS, vit.angles()
        if angles is not None:
            every = angles[patches.index].unsqueeze(1)  # [P, 1, d]
            terms = Terms(rotation=(every.cos(), every.sin()))
        *_, x = run_blocks(vit.blocks, fill_rows(x), lengths, terms=repeat(terms, len(vit.blocks)))
        return take_rows(vit.proj(vit.norm(x)), lengths.total)


class Sequences(NamedTuple):
    """Masks of the predictor's sequences, and of their two parts.

    Attributes:
        every: its target sets are the sequences: of each set its context's patches, then its hidden ones, where
            ``targets.hidden`` is true.
        hidden: [P_t], rows of the hidden patches in ``every.targets``, packed as the targets of the view.
        visible: its target sets are the contexts of the sets.
        seen: [P_v], rows of the visible patches in ``every.targets``, packed as ``visible.targets``.
    """

    every: MaskBatch
    hidden: Tensor
    visible: MaskBatch
    seen: Tensor


def sequences(masks: MaskBatch) -> Sequences:
    """Return the sequences of a view's masks, without waiting for a device."""
    order, hidden = sequence_order(masks)
    index = torch.cat([masks.context.index, masks.targets.index])[order]  # [P]
    is_hidden = torch.zeros_like(index, dtype=torch.bool).index_fill(0, hidden, True)
    of_visible = masks.sequences.minus(masks.targets.lengths)
    seen = masks.sequences.offsets[of_visible.set_of_token] + of_visible.position

    def masks_of(index: Tensor, lengths: SetLengths, is_hidden: Tensor | None) -> MaskBatch:
        image, shares = masks.targets.image, masks.shares
        targets = unchecked(PatchSets, index=index, image=image, lengths=lengths, hidden=is_hidden)
        own = {"context": masks.context, "grid": masks.grid, "context_of": masks.context_of}
        return unchecked(MaskBatch, **own, targets=targets, shares=shares, on_host=None)

    every = masks_of(index, masks.sequences, is_hidden)
    return Sequences(every, hidden, masks_of(index[seen], of_visible, None), seen)


def distances(masks: MaskBatch) -> Tensor:
    """Return the distance of each patch from the nearest patch of each target set, between centres: [S, N] float32.

    In two passes, along rows, then along columns, so that memory grows with N * (H + W), not with N * N.
    """
    (h, w), sets = masks.grid, len(masks.targets)
    index, device = masks.targets.index, masks.targets.index.device
    place = masks.targets.lengths.set_of_token * (h * w) + index
    shown = torch.ones(sets * h * w, dtype=torch.bool, device=device).index_fill(0, place, False).view(sets, h, 1, w)
    down, right = (torch.arange(side, device=device, dtype=torch.float32) for side in (h, w))
    across = (right[:, None] - right).square().expand(sets, h, w, w)
    in_row = across.masked_fill(shown, torch.inf).amin(-1)  # [S, H, W]
    squares = (down[:, None] - down).square().unsqueeze(-1) + in_row[:, None]  # [S, H, H, W]
    return squares.amin(2).sqrt().flatten(1)
