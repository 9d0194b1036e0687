"""projects/ijepa/plain.py as a contender: converted masks, and the parts of a step that differ in the released code.

S = sets    L = tokens of the longest set    h = heads    d = width of a head
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Not as projects.ijepa.plain: another checkout's projects may come first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects/ijepa"))

from plain import IJEPA, PAD, Attention, Block, Encoder, Predictor

from jepa_kit.structures import MaskBatch

__all__ = ["IJEPA", "Encoder", "Predictor", "average", "set_attention", "tables"]


def tables(masks: MaskBatch) -> tuple[Tensor, Tensor]:
    """Return contexts [B, L_c] and target blocks [B * M, L_t] as plain.py has them.

    Args:
        masks: one context an image, targets block by block.
    """
    b = len(masks.context)
    assert bool((masks.context_of.view(-1, b) == torch.arange(b, device=masks.context_of.device)).all())
    context, targets = (
        nn.utils.rnn.pad_sequence(sets.split(), batch_first=True, padding_value=PAD)
        for sets in (masks.context, masks.targets)
    )
    return context, targets.unflatten(0, (-1, b)).transpose(0, 1).flatten(0, 1)


class ContenderAttention(Attention):
    """Attention of plain.py.

    Args:
        explicit: scores are in memory, as in the released code.
        padded: sets may end in padding; without, there is no mask, which lets torch choose among more kernels.
    """

    def __init__(self, dim: int, heads: int, *, explicit: bool, padded: bool) -> None:
        super().__init__(dim, heads)
        self.explicit, self.padded = explicit, padded

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [S, h, L, d] each
        mask = valid[:, None, None] if self.padded and valid is not None else None
        y = scores_and_sum(q, k, v, mask) if self.explicit else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))


def scores_and_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention over [S, h, L, d] with scores in memory; ``mask`` is True for keys."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [S, h, L, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def set_attention(model: nn.Module, *, explicit: bool, padded: bool) -> None:
    """Give each block of a model of plain.py a new ``ContenderAttention``."""
    for block in model.modules():
        if isinstance(block, Block):
            dim, heads = block.attn.proj.in_features, block.attn.heads
            block.attn = ContenderAttention(dim, heads, explicit=explicit, padded=padded)


@torch.no_grad()
def average(target_encoder: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """Move the target encoder, parameter by parameter, by a sum of two products as the released code does."""
    for old, new in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
        old.mul_(momentum).add_((1.0 - momentum) * new.detach())
