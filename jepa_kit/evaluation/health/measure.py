"""Health of a JEPA: statistics of its features, its tokens and its predictions, on a few hundred images.

measures.py has the measures of features, statistics.py those of tokens and predictions; verdict.py interprets them.

N = images    B = images of a batch    n = patches of an image    D = width of a token
S = target sets of a batch    P = target patches of a batch    q = masks of an image
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jepa_kit.config import DataConfig
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.buffers import unchanged_buffers
from jepa_kit.encoders.pooling import pooled
from jepa_kit.evaluation.features import evaluating, has_class_token
from jepa_kit.evaluation.health import measures
from jepa_kit.evaluation.health.statistics import (
    NO_LOSSES,
    CodeStatistics,
    PredictionStatistics,
    TokenStatistics,
)
from jepa_kit.interfaces import Masker
from jepa_kit.precision import autocast_of
from jepa_kit.recipe import PatchRecipe, Recipe
from jepa_kit.rng import FloatArray
from jepa_kit.structures import MaskBatch, PatchSets, Precision, View, at_least_float32

Which = Literal["target", "context"]
EPOCH = 2**32 - 1
"""Masks are those of this epoch, the one before it and so on: no run trains on them."""
NO_PATCHES = "the recipe predicts no patches"
BATCH = 64
"""Maximum number of images of a batch."""


@dataclass(frozen=True, eq=False)
class Health:
    """Figures of a representation; docs/evaluation.md explains how to read each. None: not measured.

    Args:
        images, masks: N, and q of each image; 0 if the recipe has no masks.
        predicts_patches: whether the recipe is a ``PatchRecipe``.
        encoder: whose tokens these are: ``target`` or ``context``.
        width: D.
        std, unit_std, cosine, uniformity, rankme, effective_rank, alpha: of the features; see measures.py. alpha is
            None if the width is too small for it.
        lidar: of the context encoder's features of q contexts of each image; None if an image has no or one context.
        varying: fraction of the tokens' mean square that is not their mean over all images and positions, in [0, 1].
        of_images: fraction of that variation that the position does not explain, in [0, 1]; None if images have one
            token, as the next.
        within_images: fraction of that variation between patches of one image, in [0, 1].
        token_rank: number of directions that the tokens fill after subtraction of their position's mean: exp of the
            entropy of the singular values, as in RankMe, from 1 to D; 0 if position explains all.
        feature_varying, feature_rank: ``varying`` and ``token_rank`` of the features in place of the tokens.
        loss: of the predictions, by the recipe's distances (``Loss.is_distance``), weighted as in training. If targets
            are codes: their cross entropy in nats.
        loss_mean: with the mean target in place of every prediction. If targets are codes: with their frequencies.
        loss_position: with the mean target of each position in place of the predictions there; None for codes, whose
            frequencies at a position some hundred images do not determine.
        loss_other: of the predictions against the targets of another image at the same places.
        not_measured: sentences on what is missing, and why.
        features: [N, D], of which the first measures are: tokens averaged over the image; for a recipe that predicts no
            patches, the class token if the encoder has one.
    """

    images: int
    masks: int
    predicts_patches: bool
    encoder: str
    width: int
    std: float
    unit_std: float
    cosine: float
    uniformity: float
    rankme: float
    effective_rank: float
    alpha: float | None
    lidar: float | None
    varying: float
    of_images: float | None
    within_images: float | None
    token_rank: float
    feature_varying: float
    feature_rank: float
    loss: float | None
    loss_mean: float | None
    loss_position: float | None
    loss_other: float | None
    not_measured: tuple[str, ...]
    features: FloatArray

    @property
    def relative_to_mean(self) -> float | None:
        """Return loss / loss_mean: 1 is as good as the mean target; None if all targets are equal."""
        return _ratio(self.loss, self.loss_mean)

    @property
    def relative_to_position(self) -> float | None:
        """Return loss / loss_position: 1 is as good as knowing positions alone; None if positions determine targets."""
        return _ratio(self.loss, self.loss_position)

    @property
    def cross_sample_gap(self) -> float | None:
        """Return 1 - loss / loss_other: near 0, a prediction fits another image's target as well as its own."""
        if self.loss is None or self.loss_other is None:
            return None
        return 1.0 - self.loss / self.loss_other if self.loss_other > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return every figure except the features, as plain values."""
        names = [f.name for f in fields(self) if f.name != "features"]
        return {n: getattr(self, n) for n in (*names, "relative_to_mean", "relative_to_position", "cross_sample_gap")}


def _ratio(loss: float | None, other: float | None) -> float | None:
    return None if loss is None or not other else loss / other


def measure_health(
    jepa: Recipe,
    images: Tensor,
    masker: Masker | None,
    *,
    encoder: Which = "target",
    masks: int = 4,
    seed: int = 0,
    mean: Sequence[float] = DataConfig.mean,
    std: Sequence[float] = DataConfig.std,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Health:
    """Return the health of a recipe on images; equal arguments give equal figures.

    The networks run in evaluation mode without gradients; their modes, their buffers and torch's random state are
    restored. Statistics are float64, whatever the networks' precision. Needs host memory for about 3 * P * D float32
    numbers, with P over all images.

    Args:
        jepa: on ``device``. Predictions are measured if it is a ``PatchRecipe``.
        images: uint8 [N, 3, h, w] on the host, N at least 16.
        masker: the recipe's; None if it has none.
        encoder: whose tokens are measured; the paper evaluates the target encoder.
        masks: q, masks of each image, at least 1; LiDAR needs 2. Without a masker it has no effect.
        seed: of the masks.
        mean, std: of the channels, as in training.
        device: where the networks are.
        precision: of the matrix products.

    Raises:
        ValueError: if there are too few images or masks, images are not uint8 [N, 3, h, w], or outputs are not finite.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}")
    if len(images) < 16:
        raise ValueError(f"images (={len(images)}) must be at least 16 for meaningful figures")
    if masks < 1:
        raise ValueError(f"masks (={masks}) must be at least 1")
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    sums = _Sums(jepa, encoder, autocast_of(precision, device))
    with torch.no_grad(), torch.random.fork_rng(cuda), evaluating(jepa), unchanged_buffers(jepa):
        for number, chosen in enumerate(np.array_split(np.arange(len(images)), -(-len(images) // BATCH))):
            x = normalize(images[torch.from_numpy(chosen)].to(device), mean, std)
            sums.add(x, None if masker is None else several_masks(masker, chosen, masks, seed=seed, step=number))
        losses, missing = sums.losses()
    tokens, features = sums.tokens.figures(), sums.features.figures()
    if tokens["of_images"] is None:
        missing.append("positions: an image has one token")
    array = np.concatenate(sums.features.pooled)
    return Health(
        images=len(images),
        masks=0 if masker is None else masks,
        predicts_patches=isinstance(jepa, PatchRecipe),
        encoder=encoder,
        width=array.shape[1],
        lidar=_lidar(sums.contexts),
        features=array,
        std=measures.deviation(array),
        unit_std=measures.unit_deviation(array),
        cosine=measures.mean_cosine(array),
        uniformity=measures.uniformity(array),
        rankme=measures.rankme(array),
        effective_rank=measures.effective_rank(array),
        alpha=measures.alpha_req(array),
        feature_varying=features["varying"],
        feature_rank=features["token_rank"],
        not_measured=tuple(missing),
        **tokens,
        **losses,
    )


class _Sums:
    """What is accumulated over batches.

    Args:
        jepa: the recipe.
        encoder: whose tokens are measured.
        autocast: makes the context of the networks.
    """

    def __init__(self, jepa: Recipe, encoder: Which, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self.jepa, self.encoder, self.autocast = jepa, encoder, autocast
        self.tokens, self.features = TokenStatistics(), TokenStatistics()
        self.predictions: PredictionStatistics | CodeStatistics | None = None
        self.contexts: list[tuple[Tensor, Tensor]] = []
        """Features [S, D] of the contexts of each batch, and their images [S]."""

    def add(self, x: Tensor, drawn: MaskBatch | None) -> None:
        """Add a batch of normalised images on the networks' device, and their masks on the host."""
        jepa = self.jepa
        with self.autocast():
            tokens, features = tokens_and_features(jepa, self.encoder, x)
        self.tokens.add(tokens)
        self.features.add(features[:, None])
        if drawn is None:
            return
        view = View(x, drawn.to(x.device))
        assert view.masks is not None
        if isinstance(jepa, PatchRecipe):
            with self.autocast():
                out, other = jepa.predict(view), _targets_elsewhere(jepa, view, view.masks.targets)
            if self.predictions is None:
                codes = not out.target.is_floating_point()
                self.predictions = CodeStatistics() if codes else PredictionStatistics(jepa)
            self.predictions.add(out, other, drawn)
            context = drawn.context.pool(out.context.double().cpu())
        else:
            with self.autocast():
                context = pooled(jepa.encoder, x, view.masks.context).double().cpu()
        self.contexts.append((context, drawn.context.image))

    def losses(self) -> tuple[Mapping[str, Any], list[str]]:
        """Return the losses of ``Health`` by name, and what is missing of them."""
        if self.predictions is None:
            return NO_LOSSES, [f"predictions: {NO_PATCHES}"]
        found, why = self.predictions.losses()
        return found, [] if why is None else [why]


def tokens_and_features(jepa: Recipe, which: Which, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens [B, n, D] of normalised images, and their features [B, D] in float64; see ``Health.features``."""
    encoder: Any = jepa.encoder_for(which)
    if not has_class_token(encoder):
        tokens = encoder(images).unflatten(0, (len(images), -1))
        return tokens, tokens.double().mean(1)
    (found,) = encoder.forward_tokens(images)
    tokens = found.patches.unflatten(0, (len(images), -1))
    return tokens, (tokens.double().mean(1) if isinstance(jepa, PatchRecipe) else found.prefix[:, 0].double())


def several_masks(masker: Masker, samples: np.ndarray, count: int, *, seed: int, step: int = 0) -> MaskBatch:
    """Return ``count`` masks of each image as one batch: all sets of the first mask, then of the second and so on."""
    parts = [masker(samples, seed=seed, epoch=EPOCH - k, step=step) for k in range(count)]
    offsets = np.cumsum([0] + [len(part.context) for part in parts])
    return MaskBatch(
        PatchSets.cat([part.context for part in parts]),
        PatchSets.cat([part.targets for part in parts]),
        parts[0].grid,
        torch.cat([part.context_of + int(offset) for part, offset in zip(parts, offsets, strict=False)]),
    )


def _targets_elsewhere(jepa: PatchRecipe, view: View, own: PatchSets) -> Tensor:
    """Return the next image's targets at the places of each image's own, [P_t, ...]."""
    elsewhere = replace(own, image=(own.image + 1) % len(view))
    return at_least_float32(jepa.targets_at(view.images, elsewhere))


def _lidar(contexts: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return LiDAR with images as classes and contexts as samples; None without several for each image."""
    classes = []
    for context, image in contexts:
        counts = torch.bincount(image)
        if int(counts.min()) != int(counts.max()) or int(counts[0]) < 2:
            return None
        classes.append(context[torch.argsort(image, stable=True)].unflatten(0, (len(counts), -1)))
    if len({part.shape[1] for part in classes}) != 1:
        return None
    return measures.lidar(torch.cat(classes).numpy())
