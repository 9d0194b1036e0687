"""Floating-point operations of encoder, target encoder and predictor: by a formula, or counted if there is none.

n  tokens of a set    D  width    F  hidden width of the MLP    p  patch size    C  channels
D_e, D_p, D_o  widths of encoder, predictor and targets

The formula counts the operations of the equations, independent of the implementation: not padding, recomputed
activations, or the updates of weights and target encoder. The predictor needs q, k and v of its first block once for
each context token, and everything after its last attention for target tokens alone.

The formula is valid for the classes of jepa_kit. A subclass may process other patches, so it has a formula only if its
own body declares ``inherits_flops = True``. For any other network, torch counts a training step on one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jepa_kit.config import Config
from jepa_kit.encoders import ViT
from jepa_kit.encoders.blocks import Block
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.predictors import ViTPredictor
from jepa_kit.random_state import seeded
from jepa_kit.recipe import JEPA, Recipe
from jepa_kit.rng import IntArray
from jepa_kit.structures import MaskBatch, View
from jepa_kit.targets import PixelTarget, RepresentationTarget
from jepa_kit.trials.recipe_trial import trial_recipe, trial_views

M = TypeVar("M", bound=nn.Module)

FORMULA = (
    "2 FLOP a multiply-add, matrix products only. "
    "A block on sets of n tokens: sum(n) * (8 D^2 + 4 D F) + 4 D sum(n^2), or if it is causal 2 D sum(n^2 + n). "
    "Encoder: depth blocks + sum(n) * 2 C p^2 D. Predictor, on sequences of context and target: depth blocks, "
    "q, k, v of the first once for each context and target token and what follows attention in the last for target "
    "tokens alone, + context tokens * 2 D_e D_p + target tokens * 2 D_p D_o. "
    "A training step: target encoder + 3 * (encoder + predictor), backward as twice forward; "
    "targets that carry a gradient count three times too. Optimiser and target update are not counted."
)


@dataclass(frozen=True)
class Lengths:
    """Lengths of all sets of some images.

    Args:
        context: [S_c] lengths of the context sets.
        targets: [S_t] lengths of the target sets.
        sequences: [S_t] lengths of the target sets with their contexts.
        images: number of images.
        patches: N, patches of an image.
    """

    context: IntArray
    targets: IntArray
    sequences: IntArray
    images: int
    patches: int

    @classmethod
    def of(cls, masks: MaskBatch, images: int) -> Lengths:
        """Return the lengths of the masks of so many images; reads host memory only."""
        sets = (masks.context.lengths, masks.targets.lengths, masks.sequences)
        context, targets, sequences = (np.array(lengths.on_host, dtype=np.int64) for lengths in sets)
        return cls(context, targets, sequences, images, masks.grid[0] * masks.grid[1])


@dataclass(frozen=True)
class SetFlops:
    """Forward FLOP over sets of n tokens: ``per_token * sum(n) + per_pair * sum(n^2)``."""

    per_token: float
    per_pair: float

    def __call__(self, lengths: IntArray) -> float:
        return self.per_token * int(lengths.sum()) + self.per_pair * int((lengths**2).sum())


def has_formula(part: nn.Module, base: type[M]) -> TypeGuard[M]:
    """Return whether the formula of ``base`` is valid for a part of this class, or of subclasses that declare so."""
    if not isinstance(part, base):
        return False
    below = type(part).__mro__[: type(part).__mro__.index(base)]
    # FSDP adds a class of torch; mixins need their own declaration
    own = [cls for cls in below if cls.__module__.partition(".")[0] != "torch"]
    return all(cls.__dict__.get("inherits_flops", False) for cls in own)


def block_flops(blocks: nn.ModuleList) -> SetFlops:
    """Return the FLOP of a forward pass of transformer blocks."""
    linear = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    return SetFlops(2.0 * sum(m.weight.numel() for m in linear), 4.0 * len(blocks) * linear[0].in_features)


def encoder_flops(encoder: nn.Module) -> SetFlops | None:
    """Return the FLOP of a forward pass of an encoder; None if it has no formula."""
    if not has_formula(encoder, ViT) or encoder.num_prefix:
        return None
    blocks = block_flops(encoder.blocks)
    if encoder.causal:  # n (n + 1) / 2 pairs
        half = blocks.per_pair / 2
        blocks = SetFlops(blocks.per_token + half, half)
    return SetFlops(blocks.per_token + 2.0 * encoder.patch_embed.proj.weight.numel(), blocks.per_pair)


def predictor_flops(predictor: nn.Module) -> Callable[[Lengths], float] | None:
    """Return the FLOP of a forward pass of a predictor as a function of lengths; None if it has no formula."""
    if not has_formula(predictor, ViTPredictor):
        return None
    first, last = (cast(Block, predictor.blocks[i]) for i in (0, -1))
    blocks = block_flops(predictor.blocks)  # if each computed everything for every token of the sequences
    before, after = (first.attn.qkv,), (last.attn.proj, last.mlp.fc1, last.mlp.fc2)  # attention of these blocks
    embed, proj, before_attention, after_attention = (
        2.0 * sum(m.weight.numel() for m in layers) for layers in ((predictor.embed,), (predictor.proj,), before, after)
    )

    def forward(lengths: Lengths) -> float:
        context, targets, sequences = (int(x.sum()) for x in (lengths.context, lengths.targets, lengths.sequences))
        saved = before_attention * (sequences - context - targets) + after_attention * (sequences - targets)
        return blocks(lengths.sequences) + embed * context + proj * targets - saved

    return forward


@dataclass(frozen=True)
class ModelFlops:
    """FLOP of a recipe as a function of the lengths of its sets; see ``FORMULA``.

    Args:
        encoder, predictor: of a forward pass; None for a network without a formula.
        targets_see: input of the target encoder: whole images, each target set separately, or nothing; None for a
            target without a formula, such as one with its own network.
        targets_trained: targets have a gradient.
        losses_known: no loss has its own network.
        counted: FLOP of a training step per image, for a recipe without a formula.
    """

    encoder: SetFlops | None
    predictor: Callable[[Lengths], float] | None
    targets_see: Literal["images", "targets", "nothing"] | None
    targets_trained: bool
    losses_known: bool = True
    counted: float | None = None

    @property
    def has_formula(self) -> bool:
        """Whether every network has a formula."""
        known = None not in (self.encoder, self.predictor, self.targets_see)
        return known and self.losses_known

    def seen(self, lengths: Lengths) -> IntArray:
        """Return the lengths of the sets that the target encoder processes."""
        if self.targets_see == "images":
            return np.full(lengths.images, lengths.patches)
        return lengths.targets if self.targets_see == "targets" else lengths.context[:0]

    def forward(self, lengths: Lengths) -> tuple[float | None, float | None, float | None]:
        """Return the FLOP of a forward pass of (encoder, target encoder, predictor) over all images."""
        encoder, predictor = self.encoder, self.predictor
        return (
            None if encoder is None else encoder(lengths.context),
            None if encoder is None or self.targets_see is None else encoder(self.seen(lengths)),
            None if predictor is None else predictor(lengths),
        )

    def training(self, lengths: Lengths) -> float | None:
        """Return the FLOP of a training step over all images; None if there is neither a formula nor a count."""
        encoder, target, predictor = self.forward(lengths)
        if encoder is None or target is None or predictor is None or not self.losses_known:
            return None if self.counted is None else self.counted * lengths.images
        return (3.0 if self.targets_trained else 1.0) * target + 3.0 * (encoder + predictor)

    def of_batch(self, views: Sequence[View]) -> float | None:
        """Return the FLOP of a training step on these views; None if there is neither a formula nor a count."""
        images, masks = len(views[0]), views[0].masks
        if masks is None:
            return None if self.counted is None else self.counted * images
        return self.training(Lengths.of(masks, images))


def model_flops(jepa: Recipe) -> ModelFlops:
    """Return the formula of a recipe's networks, which may be on the meta device."""
    if not isinstance(jepa, JEPA):
        return ModelFlops(None, None, None, targets_trained=False)
    see: Literal["images", "targets", "nothing"] | None = "images"
    if has_formula(jepa.target, PixelTarget):
        see = "nothing"
    elif not has_formula(jepa.target, RepresentationTarget) or isinstance(jepa.target_encoder, FrozenNetwork):
        see = None  # a target encoder from a file of its own may have another architecture
    elif isinstance(jepa.encoder, ViT) and max(jepa.target.numbers(jepa.encoder.depth)) < jepa.encoder.depth:
        see = None  # blocks after the last of these layers are not run
    elif jepa.target.masked_at == "input":
        see = "targets"
    return ModelFlops(
        encoder_flops(jepa.encoder),
        predictor_flops(jepa.predictor),
        see,
        see != "nothing" and not jepa.target_update.stop_gradient,
        losses_known=not any(True for _ in jepa.losses.parameters()),
    )


def flops_of(config: Config, jepa: Recipe, device: torch.device) -> ModelFlops:
    """Return the formula of a recipe; if it has none, the count of a training step on one small batch.

    Args:
        config: of the recipe.
        jepa: the recipe, sharded or not.
        device: of the recipe that is built for the count, if needed.
    """
    flops = model_flops(jepa)
    return flops if flops.has_formula else replace(flops, counted=count_flops(config, device))


def count_flops(config: Config, device: torch.device, images: int = 8) -> float:
    """Count the FLOP per image of a training step of a config's recipe, with torch's FlopCounterMode.

    It counts matrix products and convolutions of encoder, target encoder, predictor, target and losses, forward and
    backward. The random states of the run do not change.
    """
    jepa = trial_recipe(config, device)
    views = trial_views(config, device, images)
    with seeded(0), FlopCounterMode(display=False) as counter:
        loss = jepa(*views).loss
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops() / images
