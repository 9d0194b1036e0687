"""Token statistics and prediction losses, accumulated batch by batch in float64.

B = images of a batch    n = patches of an image    D = width of a token    P = target patches of a batch
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.evaluation.health.measures import entropy_rank
from jepa_kit.losses import is_distance
from jepa_kit.random_state import seeded
from jepa_kit.recipe import PatchRecipe
from jepa_kit.rng import FloatArray
from jepa_kit.structures import MaskBatch, Prediction

Losses = tuple[Mapping[str, Any], str | None]
"""The four losses of ``Health`` by name, and why one is missing."""
NO_LOSSES: dict[str, float | None] = dict.fromkeys(("loss", "loss_mean", "loss_position", "loss_other"))
POSITIONS = 64
"""Maximum number of positions of an image that ``token_rank`` uses."""
ROUNDING = 1e-12
"""A mean square below this fraction of the tokens' own is float32 rounding and counts as 0."""


class TokenStatistics:
    """Sums over the tokens [B, n, D] of all batches, for the figures of ``Health`` that describe tokens."""

    def __init__(self) -> None:
        self.pooled: list[FloatArray] = []
        """[B, D] of each batch: tokens averaged over the image."""
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
        """Return up to ``POSITIONS`` of n positions, evenly spaced: the products for ``token_rank`` are expensive."""
        return torch.linspace(0, positions - 1, min(positions, POSITIONS)).round().long()

    def figures(self) -> dict[str, Any]:
        """Return ``varying``, ``of_images``, ``within_images`` and ``token_rank``; see ``Health``."""
        at = self.by_position / self.count  # [n, D], the mean at each position
        assert isinstance(at, Tensor)
        square = self.square / self.count
        # variances as differences of mean squares
        total = square - float(at.mean(0).square().sum())
        of_images = square - float(at.square().sum(-1).mean())
        within = square - float(np.square(np.concatenate(self.pooled)).sum(-1).mean())
        total, of_images, within = (0.0 if v < ROUNDING * square else v for v in (total, of_images, within))
        some = at[self.ranked(len(at))]  # [m, D]
        values = torch.linalg.eigvalsh(self.outer - self.count * some.T @ some).clamp(min=0.0)  # [D]
        one = len(at) == 1
        return {
            "varying": total / square if square else 0.0,
            "of_images": None if one else of_images / total if total else 0.0,
            "within_images": None if one else within / total if total else 0.0,
            "token_rank": entropy_rank(values.sqrt().cpu().numpy()) if of_images else 0.0,
        }


class PredictionStatistics:
    """Predictions and targets of all batches, on the host.

    Args:
        jepa: whose predictions they are.
    """

    def __init__(self, jepa: PatchRecipe) -> None:
        self.jepa = jepa
        self.distance: Callable[[Prediction], float] | None = None
        """The recipe's, found with the first batch; None if it has none: then nothing is kept."""
        self.batches: list[tuple[Prediction, Tensor]] = []

    def add(self, out: Prediction, other: Tensor, masks: MaskBatch) -> None:
        """Add a batch; ``other`` [P, D] are the targets of another image at the same places.

        Raises:
            ValueError: if predictions or targets are not finite.
        """
        _check_finite(out)
        here = Prediction(out.prediction.cpu(), out.target.cpu(), out.context.cpu(), masks)
        self.distance = self.distance or distance_of(self.jepa, here)
        if self.distance is not None:
            self.batches.append((here, other.cpu()))

    def mean_targets(self) -> tuple[Tensor, Tensor]:
        """Return the mean target [D] and that of each position [n, D] (0 if no target is there), in float64."""
        h, w = self.batches[0][0].masks.grid
        width = self.batches[0][0].target.shape[1]
        sums, counts = torch.zeros(h * w, width, dtype=torch.float64), torch.zeros(h * w, dtype=torch.float64)
        for out, _ in self.batches:
            index = out.masks.targets.index
            sums.index_add_(0, index, out.target.double())
            counts += torch.bincount(index, minlength=h * w)
        return sums.sum(0) / counts.sum(), sums / counts.clamp(min=1)[:, None]

    def losses(self) -> Losses:
        """Return the losses of ``Health``, each averaged over images as in training."""
        if self.distance is None:
            losses = ", ".join(self.jepa.losses)
            return NO_LOSSES, f"predictions: none of the losses (={losses}) is a distance from predictions to targets"
        mean, at = self.mean_targets()
        sums: defaultdict[str, float] = defaultdict(float)
        images, square = 0, 0.0
        for out, other in self.batches:
            prediction, target, masks = out.prediction.double(), out.target.double(), out.masks
            here = _images(masks)
            pairs = {
                "loss": (prediction, target),
                "loss_mean": (mean.expand_as(target), target),
                "loss_position": (at[masks.targets.index], target),
                "loss_other": (prediction, other.double()),
            }
            for name, (guess, truth) in pairs.items():
                sums[name] += self.distance(Prediction(guess, truth, out.context, masks)) * here
            images += here
            square += float(target.square().mean()) * here
        return {name: 0.0 if value < ROUNDING * square else value / images for name, value in sums.items()}, None


class CodeStatistics:
    """Cross entropies of predicted scores [P, K] with codes [P] or [P, 1], of all batches, on the host."""

    def __init__(self) -> None:
        self.batches: list[tuple[Prediction, Tensor]] = []
        """Cross entropies [P] as prediction with codes [P] as target; cross entropies with another image's codes."""
        self.scores = 0

    def add(self, out: Prediction, other: Tensor, masks: MaskBatch) -> None:
        """Add a batch; see ``PredictionStatistics``."""
        _check_finite(out)
        self.scores = out.prediction.shape[1]
        own, elsewhere = (_cross_entropy(out.prediction, codes.flatten()) for codes in (out.target, other))
        self.batches.append((Prediction(own, out.target.flatten().cpu(), out.context.cpu(), masks), elsewhere))

    def losses(self) -> Losses:
        """Return the losses of ``Health``, each averaged over images as in training.

        The best constant scores are the logarithms of the codes' frequencies.
        """
        counts = torch.bincount(torch.cat([out.target for out, _ in self.batches]), minlength=self.scores)
        surprise = -(counts.double() / counts.sum()).log()  # [K]
        sums: defaultdict[str, float] = defaultdict(float)
        images = 0
        for out, other in self.batches:
            here = _images(out.masks)
            values = {"loss": out.prediction, "loss_mean": surprise[out.target], "loss_other": other}
            for name, value in values.items():
                sums[name] += float(out.mean(value)) * here
            images += here
        why = "loss of each position's frequencies: targets are codes, and so few images do not determine these"
        return NO_LOSSES | {name: value / images for name, value in sums.items()}, why


def _cross_entropy(scores: Tensor, codes: Tensor, rows: int = 4096) -> Tensor:
    """Return [P] float64 on the host, of scores [P, K] in parts of some rows: there may be thousands of codes."""
    pairs = zip(scores.split(rows), codes.split(rows), strict=True)
    return torch.cat([F.cross_entropy(x.double(), y, reduction="none").cpu() for x, y in pairs])


def _images(masks: MaskBatch) -> int:
    """Return the number of images with targets, over which ``Prediction.mean`` averages."""
    return len(masks.targets.image.unique())


def _check_finite(out: Prediction) -> None:
    for name, tokens in (("predictions", out.prediction), ("targets", out.target)):
        if not tokens.isfinite().all():
            raise ValueError(f"{name} must be finite, but the network gives NaN or infinity: it diverged")


def distance_of(jepa: PatchRecipe, example: Prediction) -> Callable[[Prediction], float] | None:
    """Return the weighted sum of the loss terms that are distances between predictions and targets; None without one.

    A regulariser would hide the ratio of two losses, so two kinds of terms are left out: those that declare
    ``is_distance = False``, and those whose value does not change with the targets of ``example``. Every call has the
    same random state.
    """

    def value(name: str, at: Prediction) -> float:
        with seeded(0):
            return float(jepa.losses[name](at))

    elsewhere = Prediction(example.prediction, example.target.flip(-1) + 1.0, example.context, example.masks)
    declared = [name for name, term in jepa.losses.items() if is_distance(term)]
    names = [name for name in declared if value(name, example) != value(name, elsewhere)]
    return (lambda p: sum(jepa.weights[name] * value(name, p) for name in names)) if names else None
