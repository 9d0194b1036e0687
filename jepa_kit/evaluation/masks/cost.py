"""Cost of masks: tokens and floating-point operations of context encoder, target encoder and predictor for an image.

The formula is that of jepa_kit/planning/flops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from jepa_kit.planning.flops import Lengths, model_flops
from jepa_kit.recipe import Recipe
from jepa_kit.rng import IntArray


@dataclass(frozen=True)
class NetworkCost:
    """Cost of a network for an image: tokens, and GFLOP of the forward pass (None if the network has no formula)."""

    tokens: float
    gflop: float | None


@dataclass(frozen=True)
class Cost:
    """Cost of each network for an image, and GFLOP of a training step for an image (None without a formula)."""

    encoder: NetworkCost
    target_encoder: NetworkCost
    predictor: NetworkCost
    training_gflop: float | None


def cost_of(jepa: Recipe, lengths: Lengths) -> Cost:
    """Return the cost of a recipe's networks for an image, averaged over the images of ``lengths``.

    Weights are not used: the networks may be on the meta device.
    """
    flops = model_flops(jepa)

    def cost(sets: IntArray, flop: float | None) -> NetworkCost:
        return NetworkCost(float(sets.sum()) / lengths.images, None if flop is None else flop / lengths.images / 1e9)

    sets = (lengths.context, flops.seen(lengths), lengths.sequences)
    encoder, target, predictor = map(cost, sets, flops.forward(lengths))
    training = flops.training(lengths)
    return Cost(encoder, target, predictor, None if training is None else training / lengths.images / 1e9)
