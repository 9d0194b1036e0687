"""Health of a JEPA: its features, its tokens, and what its predictions know, on a few hundred images.

The measures of features are in health_measures.py; what they mean together is said in verdict.py.

N = images    B = images of a batch    n = patches of an image    D = width of a token
S = target sets of a batch    P = target patches of a batch    q = masks of an image
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jepa_kit.config import DataConfig
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.buffers import unchanged_buffers
from jepa_kit.evaluation.features import evaluating
from jepa_kit.evaluation.health.measures import (
    alpha_req,
    deviation,
    effective_rank,
    entropy_rank,
    lidar,
    mean_cosine,
    rankme,
    uniformity,
    unit_deviation,
)
from jepa_kit.interfaces import Masker
from jepa_kit.losses import is_distance
from jepa_kit.precision import autocast_of
from jepa_kit.random_state import seeded
from jepa_kit.recipe import JEPA
from jepa_kit.rng import FloatArray
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, PatchSets, Precision, Prediction

EPOCH = 2**32 - 1
"""Masks are those of this epoch, the one before it, ...: no run trains on them."""
BATCH = 64
POSITIONS = 64
"""``token_rank`` looks at so many positions of an image."""
ROUNDING = 1e-12
"""A mean square below this share of the tokens' own is rounding of float32, and counts as 0."""


@dataclass(frozen=True, eq=False)
class Health:
    """What was measured; see docs/evaluation.md for how to read each.

    Args:
        images, masks: N, and q of each image.
        encoder: whose tokens: ``target`` or ``context``.
        width: D.
        std, unit_std, cosine, uniformity, rankme, effective_rank, alpha: of the features (mean over an image's tokens),
            see health_measures.py. alpha is None where the width is too small for it.
        lidar: of the context encoder's features of q contexts of each image; None where an image has one context.
        varying: share of the tokens' mean square that is not their mean over all images and positions, in [0, 1].
        of_images: share of that variation that the position does not explain, in [0, 1].
        within_images: share of that variation that lies between patches of one image, in [0, 1].
        token_rank: how many directions the tokens fill, less the mean of their position: exp of the entropy of the
            singular values, as in RankMe, from 1 to D; 0 where position explains all.
        loss: of the predictions, by the recipe's distances (``Loss.is_distance``), weighted as in training.
        loss_mean: of the mean target in place of every prediction.
        loss_position: of the mean target of each position in place of the predictions there.
        loss_other: of the predictions against the targets of another image at the same places.
        features: [N, D], what the first measures were taken of.
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
        """loss / loss_mean: 1 is as good as the mean target; None where the targets do not differ."""
        return self.loss / self.loss_mean if self.loss_mean > 0 else None

    @property
    def relative_to_position(self) -> float | None:
        """loss / loss_position: 1 is as good as the best that knows positions alone; None where they tell all."""
        return self.loss / self.loss_position if self.loss_position > 0 else None

    @property
    def cross_sample_gap(self) -> float:
        """1 - loss / loss_other: near 0, a prediction fits another image's target as well as its own image's."""
        return 1.0 - self.loss / self.loss_other if self.loss_other > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Every figure but the features, as plain values."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "features"}
        derived = ("relative_to_mean", "relative_to_position", "cross_sample_gap")
        return held | {name: getattr(self, name) for name in derived}


def measure_health(
    jepa: JEPA,
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
    """Measures a JEPA on images; the same for the same arguments.

    Its modules run as they are evaluated and get back their modes and buffers; no gradient is made, and torch's random
    state is left as it is. Statistics are float64, whatever the networks ran in. About 3 * P * D numbers of 4 bytes are
    held for all target patches of all images.

    Args:
        jepa: on ``device``.
        images: uint8 [N, 3, h, w] on the host, N at least 16.
        masker: of the recipe.
        encoder: whose tokens are looked at; the paper evaluates the target encoder.
        masks: q, how many each image is predicted under, at least 1; from 2 on there is a LiDAR.
        seed: of the masks.
        mean, std: of the channels, as in training.
        device: where the networks are.
        precision: of the matrix products.

    Raises:
        ValueError: too few images or masks, images of another kind, a recipe without a distance,
        or outputs that are not finite.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}")
    if len(images) < 16:
        raise ValueError(f"images (={len(images)}) must be at least 16 to say anything about a network")
    if masks < 1:
        raise ValueError(f"masks (={masks}) must be at least 1")
    device = torch.device(device)
    tokens, predictions, contexts = _Tokens(), _Predictions(), []
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda(device)), evaluating(jepa), unchanged_buffers(jepa):
        for number, chosen in enumerate(_batches(len(images))):
            drawn = several_masks(masker, chosen, masks, seed=seed, step=number)
            x = normalize(images[torch.from_numpy(chosen)].to(device), mean, std)
            with autocast_of(precision, device)():
                seen = jepa.encoder_for(encoder)(x)  # [B * n, D]
                out, other = _predict(jepa, x, drawn.to(device))
            tokens.add(seen.unflatten(0, (len(x), -1)))
            predictions.add(out, other, drawn)
            contexts.append(_pooled(out.context.double().cpu(), drawn.context))
        losses = predictions.losses(_distance(jepa, predictions))
    features = np.concatenate(tokens.pooled)
    figures = {name: measure(features) for name, measure in MEASURES.items()}
    return Health(
        images=len(images),
        masks=masks,
        encoder=encoder,
        width=features.shape[1],
        lidar=_lidar(contexts),
        features=features,
        **figures,
        **tokens.figures(),
        **losses,
    )


MEASURES: dict[str, Callable[[FloatArray], Any]] = {
    "std": deviation,
    "unit_std": unit_deviation,
    "cosine": mean_cosine,
    "uniformity": uniformity,
    "rankme": rankme,
    "effective_rank": effective_rank,
    "alpha": alpha_req,
}


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _batches(count: int) -> Iterator[np.ndarray]:
    """The numbers 0 to count - 1 in batches of about one length, at most ``BATCH`` and never 1."""
    yield from np.array_split(np.arange(count), -(-count // BATCH))


def several_masks(masker: Masker, samples: np.ndarray, count: int, *, seed: int, step: int = 0) -> MaskBatch:
    """``count`` masks of each image as one batch: all sets of the first, then of the second, ..."""
    parts = [masker(samples, seed=seed, epoch=EPOCH - k, step=step) for k in range(count)]
    offsets = np.cumsum([0] + [len(part.context) for part in parts])
    return MaskBatch(
        _joined([part.context for part in parts]),
        _joined([part.targets for part in parts]),
        parts[0].grid,
        torch.cat([part.context_of + int(offset) for part, offset in zip(parts, offsets, strict=False)]),
    )


def _joined(parts: Sequence[PatchSets], images: Sequence[Tensor] | None = None) -> PatchSets:
    """The sets of all parts, one part after another; ``images`` names the image of each set anew."""
    lengths = [n for part in parts for n in part.lengths.on_host]
    of = images or [part.image for part in parts]
    index = torch.cat([part.index for part in parts])
    return PatchSets(index, torch.cat(list(of)), SetLengths(lengths, index.device))


def _predict(jepa: JEPA, images: Tensor, masks: MaskBatch) -> tuple[Prediction, Tensor]:
    """As ``JEPA.forward``, and the targets [P, D] of the next image of the batch at the same places."""
    own = masks.targets
    both = _joined([own, own], [own.image, (own.image + 1) % len(images)])
    s_y, s_other = jepa.target(images, both, jepa.target_network).float().chunk(2)
    s_x = jepa.encoder(images, masks.context)
    s_hat_y = jepa.predictor(s_x, masks).float()
    return Prediction(s_hat_y, s_y, s_x, masks), s_other


def _pooled(tokens: Tensor, sets: PatchSets) -> tuple[Tensor, Tensor]:
    """The mean of each set [S, D], and the image of each [S]."""
    sums = torch.zeros(len(sets), tokens.shape[1], dtype=tokens.dtype).index_add_(0, sets.lengths.set_of_token, tokens)
    return sums / torch.tensor(sets.lengths.on_host)[:, None], sets.image


def _lidar(contexts: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """LiDAR of images as classes and their contexts as samples; None where they are not at least 2 of each alike."""
    classes = []
    for pooled, image in contexts:
        counts = torch.bincount(image)
        if int(counts.min()) != int(counts.max()) or int(counts[0]) < 2:
            return None
        classes.append(pooled[torch.argsort(image, stable=True)].unflatten(0, (len(counts), -1)))
    if len({part.shape[1] for part in classes}) > 1:
        return None
    return lidar(torch.cat(classes).numpy())


class _Tokens:
    """Sums over all tokens [B, n, D], in float64."""

    def __init__(self) -> None:
        self.pooled: list[FloatArray] = []
        self.count, self.square = 0, 0.0
        self.by_position: Tensor | float = 0.0
        self.outer: Tensor | float = 0.0

    def add(self, tokens: Tensor) -> None:
        x = tokens.double()
        some = x[:, self.ranked(x.shape[1])].flatten(0, 1)  # [B * m, D]
        self.outer = some.T @ some + self.outer  # [D, D]
        self.pooled.append(x.mean(1).cpu().numpy())
        self.count += len(x)
        self.square += float(x.square().sum(-1).mean(-1).sum())
        self.by_position = x.sum(0) + self.by_position  # [n, D]

    @staticmethod
    def ranked(positions: int) -> Tensor:
        """Up to ``POSITIONS`` of n positions, spread over the image: the products for ``token_rank`` take time."""
        return torch.linspace(0, positions - 1, min(positions, POSITIONS)).round().long()

    def figures(self) -> dict[str, float]:
        """``varying``, ``of_images``, ``within_images`` and ``token_rank``; see ``Health``."""
        at = self.by_position / self.count  # [n, D], the mean at each position
        assert isinstance(at, Tensor)
        square = self.square / self.count
        total = square - float(at.mean(0).square().sum())
        of_images = square - float(at.square().sum(-1).mean())
        within = square - float(np.square(np.concatenate(self.pooled)).sum(-1).mean())
        total, of_images, within = (0.0 if v < ROUNDING * square else v for v in (total, of_images, within))
        some = at[self.ranked(len(at))]  # [m, D]
        values = torch.linalg.eigvalsh(self.outer - self.count * some.T @ some).clamp(min=0.0)  # [D]
        return {
            "varying": total / square if square else 0.0,
            "of_images": of_images / total if total else 0.0,
            "within_images": within / total if total else 0.0,
            "token_rank": entropy_rank(values.sqrt().cpu().numpy()) if of_images else 0.0,
        }


class _Predictions:
    """Predictions and targets of all batches, on the host."""

    def __init__(self) -> None:
        self.held: list[tuple[Prediction, Tensor]] = []

    def add(self, out: Prediction, other: Tensor, masks: MaskBatch) -> None:
        for name, tokens in (("predictions", out.prediction), ("targets", out.target)):
            if not tokens.isfinite().all():
                raise ValueError(f"{name} must be finite, but the network gives NaN or infinity: it diverged")
        self.held.append((Prediction(out.prediction.cpu(), out.target.cpu(), out.context.cpu(), masks), other.cpu()))

    def mean_targets(self) -> tuple[Tensor, Tensor]:
        """The mean target [D], and that of each position [n, D] (0 where no target lies), in float64."""
        h, w = self.held[0][0].masks.grid
        width = self.held[0][0].target.shape[1]
        sums, counts = torch.zeros(h * w, width, dtype=torch.float64), torch.zeros(h * w, dtype=torch.float64)
        for out, _ in self.held:
            index = out.masks.targets.index
            sums.index_add_(0, index, out.target.double())
            counts += torch.bincount(index, minlength=h * w)
        return sums.sum(0) / counts.sum(), sums / counts.clamp(min=1)[:, None]

    def losses(self, distance: Callable[[Prediction], float]) -> dict[str, float]:
        """The four losses of ``Health``, each a mean over images, as the recipe's."""
        mean, at = self.mean_targets()
        names = ("loss", "loss_mean", "loss_position", "loss_other")
        sums, images, square = dict.fromkeys(names, 0.0), 0, 0.0
        for out, other in self.held:
            target, masks = out.target.double(), out.masks
            here = int(masks.targets.image.max()) + 1
            pairs = (
                (out.prediction.double(), target),
                (mean.expand_as(target), target),
                (at[masks.targets.index], target),
                (out.prediction.double(), other.double()),
            )
            for name, (guess, truth) in zip(names, pairs, strict=True):
                sums[name] += distance(Prediction(guess, truth, out.context, masks)) * here
            images += here
            square += float(target.square().mean()) * here
        return {name: 0.0 if value < ROUNDING * square else value / images for name, value in sums.items()}


def _distance(jepa: JEPA, predictions: _Predictions) -> Callable[[Prediction], float]:
    """The weighted sum of the recipe's terms that are distances between predictions and targets.

    A regulariser would hide the ratio of two losses: terms that declare to be none (``Loss.is_distance``) are left out,
    and those that are the same for other targets. Every call has the same random state.

    Raises:
        ValueError: no term is left.
    """

    def value(name: str, at: Prediction) -> float:
        with seeded(0):
            return float(jepa.losses[name](at))

    out, _ = predictions.held[0]
    elsewhere = Prediction(out.prediction, out.target.flip(-1) + 1.0, out.context, out.masks)
    declared = [name for name, term in jepa.losses.items() if is_distance(term)]
    names = [name for name in declared if value(name, out) != value(name, elsewhere)]
    if not names:
        raise ValueError(
            f"losses (={', '.join(jepa.losses)}) must hold a distance: a term that looks at the target, and does not "
            "declare is_distance = False"
        )
    return lambda p: sum(jepa.weights[name] * value(name, p) for name in names)
