"""What masks cost: tokens and floating-point operations of encoder, target encoder and predictor, by formula.

n  tokens of a set    D  width    F  hidden width of the MLP    p  patch size    C  channels
D_e, D_p, D_o  widths of encoder, predictor and targets
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from jepa_kit.config import Config
from jepa_kit.encoders import ViT
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA, build_recipe
from jepa_kit.rng import IntArray

FORMULA = (
    "2 FLOP a multiply-add, matrix products only. "
    "A block on sets of n tokens: sum(n) * (8 D^2 + 4 D F) + 4 D sum(n^2). "
    "Encoder: depth blocks + sum(n) * 2 C p^2 D. Predictor, on sequences of context and target: depth blocks "
    "+ context tokens * 2 D_e D_p + target tokens * 2 D_p D_o. "
    "A training step: target encoder + 3 * (encoder + predictor), backward as twice forward."
)


@dataclass(frozen=True)
class Lengths:
    """Lengths of all sets of some images.

    Args:
        context: [S_c] of the context sets.
        targets: [S_t] of the target sets.
        sequences: [S_t], of each target set together with its context.
        images: how many images.
        patches: N, of an image.
    """

    context: IntArray
    targets: IntArray
    sequences: IntArray
    images: int
    patches: int


@dataclass(frozen=True)
class Part:
    """Tokens and GFLOP (forward; None for a network without a formula here) an image."""

    tokens: float
    gflop: float | None


@dataclass(frozen=True)
class Cost:
    """Each network's cost an image, and a training step's GFLOP an image; None where a part has no formula."""

    encoder: Part
    target_encoder: Part
    predictor: Part

    @property
    def training_gflop(self) -> float | None:
        parts = [self.encoder.gflop, self.target_encoder.gflop, self.predictor.gflop]
        if None in parts:
            return None
        encoder, target, predictor = (part or 0.0 for part in parts)
        return target + 3 * (encoder + predictor)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "training_gflop": self.training_gflop, "formula": FORMULA}


def cost_of(config: Config, lengths: Lengths) -> Cost:
    """What the networks of a config do for an image, on average over the images of ``lengths``.

    The networks are made without memory for their weights.
    """
    with torch.device("meta"):
        jepa = build_recipe(config)
    return cost_of_networks(jepa, lengths)


def cost_of_networks(jepa: JEPA, lengths: Lengths) -> Cost:
    """As ``cost_of``, for networks that are there."""
    context, targets, sequences = lengths.context, lengths.targets, lengths.sequences
    if not getattr(jepa.target, "needs_encoder", False):
        seen = context[:0]
    elif getattr(jepa.target, "masked_at", "output") == "input":
        seen = targets
    else:
        seen = np.full(lengths.images, lengths.patches)
    encoder, predictor = jepa.encoder, jepa.predictor
    of_predictor = None
    if isinstance(predictor, ViTPredictor):
        of_predictor = (
            blocks_flop(predictor.blocks, sequences)
            + 2 * predictor.embed.weight.numel() * int(context.sum())
            + 2 * predictor.proj.weight.numel() * int(targets.sum())
        )
    return Cost(
        _part(context, encoder_flop(encoder, context), lengths.images),
        _part(seen, encoder_flop(encoder, seen), lengths.images),
        _part(sequences, of_predictor, lengths.images),
    )


def encoder_flop(encoder: nn.Module, lengths: IntArray) -> float | None:
    """FLOP of a forward pass over sets of these lengths; None for another encoder than ``vit``."""
    if not isinstance(encoder, ViT):
        return None
    return blocks_flop(encoder.blocks, lengths) + 2 * encoder.patch_embed.proj.weight.numel() * int(lengths.sum())


def blocks_flop(blocks: nn.ModuleList, lengths: IntArray) -> float:
    """FLOP of a forward pass of transformer blocks over sets of these lengths."""
    linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    width = next(m.in_features for m in blocks.modules() if isinstance(m, nn.Linear))
    return 2.0 * linear * int(lengths.sum()) + 4.0 * len(blocks) * width * int((lengths**2).sum())


def _part(lengths: IntArray, flop: float | None, images: int) -> Part:
    return Part(float(lengths.sum()) / images, None if flop is None else flop / images / 1e9)
