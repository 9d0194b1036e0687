"""Targets in representation space, the defining property of a JEPA.

B = images    N = patches of an image    P = target patches    D = the encoder's width    n = layers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders.sizes import check_layers
from jepa_kit.interfaces import Encoder
from jepa_kit.registry import TARGETS, check_choice
from jepa_kit.structures import PatchSets

Norm = Literal["layer", "none"]
MaskedAt = Literal["output", "input"]
Combine = Literal["mean", "concat"]


@TARGETS.register("representation")
class RepresentationTarget(nn.Module):
    """Return the target encoder's tokens of the whole image, normalised, at the target patches (I-JEPA, section 3).

    Args:
        embed_dim: D; supplied by the recipe.
        depth: the encoder's blocks, for the check of ``layers``; supplied by the recipe.
        norm: ``layer`` applies LayerNorm without parameters (eps 1e-5) to each token, as the released code does (the
            paper does not mention it); ``none`` keeps the target encoder's output.
        layers: combine the outputs of the last ``layers`` blocks, or of the blocks with these numbers (from 1; 0 is the
            input of the first), each after the final norm and ``norm``; 1 is I-JEPA.
        combine: ``mean`` averages them; ``concat`` puts them side by side in the order of ``layers``, so that a target
            has n * D values.
        final_norm: whether the encoder's final norm is applied to each output.
        mean_norm: ``layer`` applies LayerNorm without parameters to the average, too. data2vec's target (Baevski et al.
            2022, section 3.3) has ``final_norm: false`` and both norms.
        masked_at: ``output`` encodes the whole image and selects the target patches; ``input`` encodes each target
            block alone (I-JEPA, table 11: 67.3 against 56.1).

    Attributes:
        out_dim: width of a target: D, or n * D if outputs are side by side.

    Raises:
        ValueError: an unknown choice, a layer is named twice, ``mean_norm`` without a mean, or there is no such layer
            (without ``depth``: at the first call).
    """

    needs_encoder = True

    def __init__(
        self,
        *,
        embed_dim: int,
        norm: Norm = "layer",
        layers: int | tuple[int, ...] = 1,
        combine: Combine = "mean",
        final_norm: bool = True,
        mean_norm: Norm = "none",
        depth: int | None = None,
        masked_at: MaskedAt = "output",
    ) -> None:
        super().__init__()
        check_choice("norm", norm, Norm)
        check_choice("combine", combine, Combine)
        check_choice("mean_norm", mean_norm, Norm)
        check_choice("masked_at", masked_at, MaskedAt)
        if isinstance(layers, int):
            if layers < 1:
                raise ValueError(f"layers (={layers}) must be at least 1")
        elif len(set(layers)) < len(layers):
            raise ValueError(f"layers (={tuple(layers)}) must be different numbers of blocks")
        if combine == "concat" and mean_norm != "none":
            raise ValueError(f"mean_norm (={mean_norm!r}) normalises an average, and combine (='concat') makes none")
        self.combine = combine
        number = layers if isinstance(layers, int) else len(layers)
        self.out_dim = embed_dim * number if combine == "concat" else embed_dim
        self.norm, self.final_norm, self.mean_norm = norm, final_norm, mean_norm
        self.layers = layers
        self.masked_at = masked_at
        if depth is not None:
            self.numbers(depth)

    def numbers(self, depth: int) -> Sequence[int]:
        """Return the numbers of the blocks that are combined, of an encoder of this depth."""
        if not isinstance(self.layers, int):
            check_layers(self.layers, depth)
            return self.layers
        if self.layers > depth:
            raise ValueError(f"layers (={self.layers}) must be at most the encoder's depth (={depth})")
        return range(depth - self.layers + 1, depth + 1)

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, C, h, w] -> [P, out_dim], packed as ``patches``."""
        assert encoder is not None
        seen = patches if self.masked_at == "input" else None
        layers = self.numbers(encoder.depth)
        outputs = encoder.forward_layers(images, seen, layers=layers, norm=self.final_norm)  # [B * N, D] or [P, D] each
        if seen is None:
            # Select first, normalise then: the result is the same, and P < B * N tokens are fewer to normalise.
            outputs = [patches.gather(x.unflatten(0, (len(images), -1))) for x in outputs]
        if self.norm == "layer":
            outputs = [_normalise(x) for x in outputs]
        if self.combine == "concat":
            return torch.cat(outputs, dim=-1)  # [P, n * D]
        mean = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)
        return _normalise(mean) if self.mean_norm == "layer" else mean


def _normalise(x: Tensor) -> Tensor:
    """Return LayerNorm of each token, without parameters: [P, D]."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-5)
