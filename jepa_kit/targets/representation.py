"""Targets in representation space, the defining property of a JEPA.

B = images    N = patches of an image    P = target patches    D = width
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.interfaces import Encoder
from jepa_kit.registry import TARGETS, check_choice
from jepa_kit.structures import PatchSets

Norm = Literal["layer", "none"]
MaskedAt = Literal["output", "input"]


@TARGETS.register("representation")
class RepresentationTarget(nn.Module):
    """Return the target encoder's tokens of the whole image, normalised, at the target patches (I-JEPA, section 3).

    Args:
        embed_dim: D; supplied by the recipe.
        depth: the encoder's blocks, for the check of ``layers``; supplied by the recipe.
        norm: ``layer`` applies LayerNorm without parameters (eps 1e-5) to each token, as the released code does (the
            paper does not mention it); ``none`` keeps the target encoder's output.
        layers: average the outputs of the last ``layers`` blocks, each after the final norm and ``norm``
            (data2vec, Baevski et al. 2022, averages layers; 1 is I-JEPA).
        masked_at: ``output`` encodes the whole image and selects the target patches; ``input`` encodes each target
            block alone (I-JEPA, table 11: 67.3 against 56.1).

    Raises:
        ValueError: an unknown choice, or ``layers`` is not in [1, depth] (without ``depth``: at the first call).
    """

    needs_encoder = True

    def __init__(
        self,
        *,
        embed_dim: int,
        norm: Norm = "layer",
        layers: int = 1,
        depth: int | None = None,
        masked_at: MaskedAt = "output",
    ) -> None:
        super().__init__()
        check_choice("norm", norm, Norm)
        check_choice("masked_at", masked_at, MaskedAt)
        if layers < 1:
            raise ValueError(f"layers (={layers}) must be at least 1")
        self.out_dim = embed_dim
        self.norm = norm
        self.layers = layers
        if depth is not None:
            self._last(depth)
        self.masked_at = masked_at

    def _last(self, depth: int) -> range:
        """Return the numbers of the last ``layers`` blocks of an encoder of this depth."""
        if self.layers > depth:
            raise ValueError(f"layers (={self.layers}) must be at most the encoder's depth (={depth})")
        return range(depth - self.layers + 1, depth + 1)

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, C, h, w] -> [P, D], packed as ``patches``."""
        assert encoder is not None
        seen = patches if self.masked_at == "input" else None
        outputs = encoder.forward_layers(images, seen, layers=self._last(encoder.depth))  # [B * N, D] or [P, D] each
        if seen is None:
            # Select first, normalise then: the result is the same, and P < B * N tokens are fewer to normalise.
            outputs = [patches.gather(x.unflatten(0, (len(images), -1))) for x in outputs]
        if self.norm == "layer":
            outputs = [F.layer_norm(x, (x.shape[-1],), eps=1e-5) for x in outputs]
        return outputs[0] if self.layers == 1 else torch.stack(outputs).mean(0)
