"""What masks cost: tokens and floating-point operations of encoder, target encoder and predictor an image.

The formula is that of jepa_kit/planning/flops.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from jepa_kit.build import build_recipe
from jepa_kit.config import Config
from jepa_kit.planning.flops import FORMULA, Lengths, model_flops
from jepa_kit.recipe import JEPA
from jepa_kit.rng import IntArray


@dataclass(frozen=True)
class Part:
    """Tokens and GFLOP (forward; None for a network without a formula) an image."""

    tokens: float
    gflop: float | None


@dataclass(frozen=True)
class Cost:
    """Each network's cost an image, and a training step's GFLOP an image; None where a part has no formula."""

    encoder: Part
    target_encoder: Part
    predictor: Part
    training_gflop: float | None

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "formula": FORMULA}


def cost_of(config: Config, lengths: Lengths) -> Cost:
    """What the networks of a config do for an image, on average over the images of ``lengths``.

    The networks are made without memory for their weights.
    """
    with torch.device("meta"):
        jepa = build_recipe(config)
    return cost_of_networks(jepa, lengths)


def cost_of_networks(jepa: JEPA, lengths: Lengths) -> Cost:
    """As ``cost_of``, for networks that are there."""
    flops = model_flops(jepa)
    seen = (lengths.context, flops.seen(lengths), lengths.sequences)
    encoder, target, predictor = (
        _part(s, flop, lengths.images) for s, flop in zip(seen, flops.forward(lengths), strict=True)
    )
    training = flops.training(lengths)
    return Cost(encoder, target, predictor, None if training is None else training / lengths.images / 1e9)


def _part(lengths: IntArray, flop: float | None, images: int) -> Part:
    return Part(float(lengths.sum()) / images, None if flop is None else flop / images / 1e9)
