"""Targets in pixel space: I-JEPA without the joint embedding (paper, table 7: 40.7 against 66.9).

B = images    P = target patches    p = patch size    C = channels
"""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from jepa_kit.interfaces import Encoder
from jepa_kit.registry import TARGETS, check_choice
from jepa_kit.structures import PatchSets

PatchNorm = Literal["patch", "none"]


@TARGETS.register("pixel")
class PixelTarget(nn.Module):
    """Return the pixels of the target patches, in row-major order with channels last.

    Args:
        patch_size: p; supplied by the recipe.
        norm: ``patch`` standardises each patch (unbiased variance, plus 1e-6), as MAE does (He et al. 2022, section
            4); ``none`` keeps the pixels of the normalised image.
        in_chans: C, the encoder's.

    Raises:
        ValueError: ``norm`` is neither.
    """

    needs_encoder = False

    def __init__(self, *, patch_size: int, norm: PatchNorm = "patch", in_chans: int = 3) -> None:
        super().__init__()
        check_choice("norm", norm, PatchNorm)
        self.patch_size = patch_size
        self.norm = norm
        self.out_dim = patch_size * patch_size * in_chans

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, C, h, w] -> [P, p * p * C], packed as ``patches``."""
        p = self.patch_size
        pixels = patches.gather(rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p))
        if self.norm == "patch":
            mean = pixels.mean(-1, keepdim=True)
            pixels = (pixels - mean) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        return pixels
