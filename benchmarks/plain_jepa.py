"""I-JEPA as most code has it: dense tokens, one tensor for all sets, nothing of jepa_kit but the position table.

The whole image goes through a convolution, the visible patches are gathered after it, sets are rows of one [S, L, D]
tensor (padded to the longest and masked where lengths differ), and the context is repeated for every target block.
``explicit`` attention keeps its scores in memory, and ``move`` averages parameter by parameter: with an AdamW that is
neither fused nor foreach, these are the step of the released code.

    B = images    M = target blocks of an image    S = sets    L = tokens of the longest set    D, E = widths
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders.pos_embed import sincos_2d
from jepa_kit.structures import MaskBatch, PatchSets


class Layer(nn.Module):
    """Pre-norm transformer layer; its parameters are named as those of ``jepa_kit.encoders.blocks.Block``."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, explicit: bool = False) -> None:
        super().__init__()
        self.heads, self.explicit = heads, explicit
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = round(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        s, n, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(s, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [S, heads, L, d]
        y = scores_and_sum(q, k, v, mask) if self.explicit else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn["proj"](y.transpose(1, 2).reshape(s, n, d))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def scores_and_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over [S, heads, L, d] with its scores in memory; ``mask`` is True where there is a key."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [S, heads, L, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]


class Encoder(nn.Module):
    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        ratio: float,
        explicit: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(dim, grid), persistent=False)
        self.blocks = nn.ModuleList(Layer(dim, heads, ratio, explicit) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, index: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, 3, h, w] -> [B, N, D], or [B, L, D] for patches ``index`` [B, L]."""
        x = self.patch_embed(images) + self.pos_embed
        if index is not None:
            x = take(x, index)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(
        self, grid: tuple[int, int], dim: int, width: int, depth: int, heads: int, explicit: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList(Layer(width, heads, 4.0, explicit) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)

    def forward(self, context: Tensor, seen: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """context [B, L_c, D] at ``seen`` [B, L_c], targets at ``hidden`` [M * B, L_t] -> [M * B, L_t, D]."""
        x = self.embed(context) + self.pos_embed[seen]
        x = x.repeat(len(hidden) // len(seen), 1, 1)  # [M * B, L_c, E]
        x = torch.cat([x, self.mask_token + self.pos_embed[hidden]], dim=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.proj(self.norm(x[:, seen.shape[1] :]))


class PlainJEPA(nn.Module):
    """The equations, with a target encoder that the caller moves."""

    def __init__(self, encoder: Encoder, target_encoder: Encoder, predictor: Predictor) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.target_encoder = target_encoder.requires_grad_(False)

    def forward(self, images: Tensor, masks: PaddedMasks) -> Tensor:
        with torch.no_grad():
            h = self.target_encoder(images)
            h = F.layer_norm(h, (h.shape[-1],))
            s_y = take(h.repeat(masks.blocks, 1, 1), masks.hidden)  # [M * B, L_t, D]
        s_x = self.encoder(images, masks.seen, masks.seen_mask)
        s_hat_y = self.predictor(s_x, masks.seen, masks.hidden, masks.both_mask)
        error = F.smooth_l1_loss(s_hat_y.float(), s_y.float(), reduction="none")
        return error.mean() if masks.weight is None else (error.mean(-1) * masks.weight).sum()


@torch.no_grad()
def move(target_encoder: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """target encoder <- its average with the encoder, parameter by parameter."""
    for old, new in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
        old.mul_(momentum).add_((1.0 - momentum) * new.detach())


class PaddedMasks:
    """Masks as rectangular tables; padded places repeat patch 0 and are masked out of attention and loss.

    Args:
        masks: one context an image, targets block by block.
    """

    def __init__(self, masks: MaskBatch) -> None:
        b = len(masks.context)
        self.blocks = len(masks.targets) // b
        expected = torch.arange(b, device=masks.context_of.device).repeat(self.blocks)
        assert torch.equal(masks.context_of, expected)
        self.seen, seen = padded(masks.context)  # [B, L_c]
        self.hidden, hidden = padded(masks.targets)  # [M * B, L_t]
        self.seen_mask = self.both_mask = self.weight = None
        if not bool(seen.all() & hidden.all()):
            self.seen_mask = seen[:, None, None]
            self.both_mask = torch.cat([seen.repeat(self.blocks, 1), hidden], dim=1)[:, None, None]
            self.weight = hidden / (hidden.sum(1, keepdim=True) * len(hidden))


def padded(sets: PatchSets) -> tuple[Tensor, Tensor]:
    """[S, L] patch numbers, and True where there is one."""
    rows = nn.utils.rnn.pad_sequence(sets.split(), batch_first=True)
    length = torch.tensor(sets.lengths.on_host, device=rows.device)
    return rows, torch.arange(rows.shape[1], device=rows.device) < length[:, None]


def take(x: Tensor, index: Tensor) -> Tensor:
    """[S, N, D], [S, L] -> [S, L, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
