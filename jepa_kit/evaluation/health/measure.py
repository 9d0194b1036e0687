"""Health of a JEPA: statistics of its features, its tokens and its predictions, on a few hundred images.

measures.py has the measures of features, statistics.py those of tokens and predictions; verdict.py interprets them.

N = images    B = images of a batch    n = patches of an image    D = width of a token
S = target sets of a batch    P = target patches of a batch    q = masks of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jepa_kit.config import DataConfig
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.buffers import unchanged_buffers
from jepa_kit.evaluation.features import evaluating
from jepa_kit.evaluation.health import measures
from jepa_kit.evaluation.health.statistics import PredictionStatistics, TokenStatistics
from jepa_kit.interfaces import Masker
from jepa_kit.precision import autocast_of
from jepa_kit.recipe import PatchRecipe
from jepa_kit.rng import FloatArray
from jepa_kit.structures import MaskBatch, PatchSets, Precision, Prediction, View

EPOCH = 2**32 - 1
"""Masks are those of this epoch, the one before it and so on: no run trains on them."""
BATCH = 64
"""Maximum number of images of a batch."""


@dataclass(frozen=True, eq=False)
class Health:
    """Figures of a representation; docs/evaluation.md explains how to read each.

    Args:
        images, masks: N, and q of each image.
        encoder: whose tokens these are: ``target`` or ``context``.
        width: D.
        std, unit_std, cosine, uniformity, rankme, effective_rank, alpha: of the features (tokens averaged over the
            image); see measures.py. alpha is None if the width is too small for it.
        lidar: of the context encoder's features of q contexts of each image; None if an image has one context.
        varying: fraction of the tokens' mean square that is not their mean over all images and positions, in [0, 1].
        of_images: fraction of that variation that the position does not explain, in [0, 1].
        within_images: fraction of that variation between patches of one image, in [0, 1].
        token_rank: number of directions that the tokens fill after subtraction of their position's mean: exp of the
            entropy of the singular values, as in RankMe, from 1 to D; 0 if position explains all.
        loss: of the predictions, by the recipe's distances (``Loss.is_distance``), weighted as in training.
        loss_mean: with the mean target in place of every prediction.
        loss_position: with the mean target of each position in place of the predictions there.
        loss_other: of the predictions against the targets of another image at the same places.
        features: [N, D], the features that the first measures are of.
    """

    images: int
    masks: int
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
    of_images: float
    within_images: float
    token_rank: float
    loss: float
    loss_mean: float
    loss_position: float
    loss_other: float
    features: FloatArray

    @property
    def relative_to_mean(self) -> float | None:
        """Return loss / loss_mean: 1 is as good as the mean target; None if all targets are equal."""
        return self.loss / self.loss_mean if self.loss_mean > 0 else None

    @property
    def relative_to_position(self) -> float | None:
        """Return loss / loss_position: 1 is as good as knowing positions alone; None if positions determine targets."""
        return self.loss / self.loss_position if self.loss_position > 0 else None

    @property
    def cross_sample_gap(self) -> float:
        """Return 1 - loss / loss_other: near 0, a prediction fits another image's target as well as its own."""
        return 1.0 - self.loss / self.loss_other if self.loss_other > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return every figure except the features, as plain values."""
        names = [f.name for f in fields(self) if f.name != "features"]
        return {n: getattr(self, n) for n in (*names, "relative_to_mean", "relative_to_position", "cross_sample_gap")}


def measure_health(
    jepa: PatchRecipe,
    images: Tensor,
    masker: Masker,
    *,
    encoder: Literal["target", "context"] = "target",
    masks: int = 4,
    seed: int = 0,
    mean: Sequence[float] = DataConfig.mean,
    std: Sequence[float] = DataConfig.std,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Health:
    """Return the health of a JEPA on images; equal arguments give equal figures.

    The networks run in evaluation mode without gradients; their modes, their buffers and torch's random state are
    restored. Statistics are float64, whatever the networks' precision. Needs host memory for about 3 * P * D float32
    numbers, with P over all images.

    Args:
        jepa: on ``device``.
        images: uint8 [N, 3, h, w] on the host, N at least 16.
        masker: the recipe's.
        encoder: whose tokens are measured; the paper evaluates the target encoder.
        masks: q, masks of each image, at least 1; LiDAR needs 2.
        seed: of the masks.
        mean, std: of the channels, as in training.
        device: where the networks are.
        precision: of the matrix products.

    Raises:
        ValueError: if there are too few images or masks, images are not uint8 [N, 3, h, w], the recipe has no
            distance, or outputs are not finite.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}")
    if len(images) < 16:
        raise ValueError(f"images (={len(images)}) must be at least 16 for meaningful figures")
    if masks < 1:
        raise ValueError(f"masks (={masks}) must be at least 1")
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    tokens, predictions, contexts = TokenStatistics(), PredictionStatistics(), []
    with torch.no_grad(), torch.random.fork_rng(cuda), evaluating(jepa), unchanged_buffers(jepa):
        for number, chosen in enumerate(np.array_split(np.arange(len(images)), -(-len(images) // BATCH))):
            drawn = several_masks(masker, chosen, masks, seed=seed, step=number)
            x = normalize(images[torch.from_numpy(chosen)].to(device), mean, std)
            with autocast_of(precision, device)():
                seen = jepa.encoder_for(encoder)(x)  # [B * n, D]
                out, other = _predict(jepa, x, drawn.to(device))
            tokens.add(seen.unflatten(0, (len(x), -1)))
            predictions.add(out, other, drawn)
            contexts.append(_pooled(out.context.double().cpu(), drawn.context))
        losses = predictions.losses(jepa)
    features = np.concatenate(tokens.pooled)
    return Health(
        images=len(images),
        masks=masks,
        encoder=encoder,
        width=features.shape[1],
        lidar=_lidar(contexts),
        features=features,
        std=measures.deviation(features),
        unit_std=measures.unit_deviation(features),
        cosine=measures.mean_cosine(features),
        uniformity=measures.uniformity(features),
        rankme=measures.rankme(features),
        effective_rank=measures.effective_rank(features),
        alpha=measures.alpha_req(features),
        **tokens.figures(),
        **losses,
    )


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


def _predict(jepa: PatchRecipe, images: Tensor, masks: MaskBatch) -> tuple[Prediction, Tensor]:
    """Return the prediction, as ``Recipe.forward``, and the next image's targets [P, D] at the same places."""
    own = masks.targets
    elsewhere = replace(own, image=(own.image + 1) % len(images))
    return jepa.predict(View(images, masks)), jepa.targets_at(images, elsewhere).float()


def _pooled(tokens: Tensor, sets: PatchSets) -> tuple[Tensor, Tensor]:
    """Return the mean of each set [S, D] and its image [S]."""
    sums = torch.zeros(len(sets), tokens.shape[1], dtype=tokens.dtype).index_add_(0, sets.lengths.set_of_token, tokens)
    return sums / torch.tensor(sets.lengths.on_host)[:, None], sets.image


def _lidar(contexts: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return LiDAR with images as classes and contexts as samples; None if images have unequal or single contexts."""
    classes = []
    for pooled, image in contexts:
        counts = torch.bincount(image)
        if int(counts.min()) != int(counts.max()) or int(counts[0]) < 2:
            return None
        classes.append(pooled[torch.argsort(image, stable=True)].unflatten(0, (len(counts), -1)))
    if len({part.shape[1] for part in classes}) > 1:
        return None
    return measures.lidar(torch.cat(classes).numpy())
