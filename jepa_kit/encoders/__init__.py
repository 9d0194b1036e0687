"""Context and target encoders: images and patches to tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from jepa_kit.encoders.attention import attend
from jepa_kit.encoders.vit import SIZES, ViT
from jepa_kit.structures import Grid, PatchSets

__all__ = ["SIZES", "Encoder", "ViT", "attend"]


class Encoder(Protocol):
    """What a recipe asks of an encoder (a module that is registered in ``ENCODERS``).

    Attributes:
        grid: (H, W) patches of a training image.
        patch_size: side of a patch in pixels.
        embed_dim: D, the width of its tokens.
        depth: how many layers ``forward_layers`` can give.
    """

    grid: Grid
    patch_size: int
    embed_dim: int
    depth: int

    def __call__(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """[B, C, h, w] -> [P, D], packed as ``patches``; every patch where it is None."""
        ...

    def forward_layers(self, images: Tensor, patches: PatchSets | None = None, *, last: int) -> list[Tensor]:
        """The last ``last`` layers' tokens, each [P, D] as ``__call__`` would give it."""
        ...
