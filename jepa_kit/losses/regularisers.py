"""Regularisers: losses of how embeddings of different images are distributed, which keep them from collapsing.

B = images of this process    N = images of all processes    S = sets of patches    V = sets of an image
D = width of an embedding    P = patches of all sets
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.distributed.collectives import gather_with_grad
from jepa_kit.registry import HEADS, LOSSES, build_part, check_choice
from jepa_kit.structures import MaskBatch, PatchSets, Prediction, at_least_float32

Of = Literal["prediction", "context"]


def by_set(tokens: Tensor, sets: PatchSets, masks: MaskBatch) -> Tensor:
    """Average tokens [P, D] over each set, and arrange the sets by image: -> [B, V, D].

    Args:
        tokens: packed as ``sets``.
        sets: the contexts or the targets of ``masks``.
        masks: of the batch; the number of sets is read from their copy on the host.

    Raises:
        ValueError: images have unequally many sets.
    """
    host = masks.host()
    assert host is not None, "masks are made on the host"
    counts = np.bincount((host.context if sets is masks.context else host.targets).image.numpy())
    if (counts != counts[0]).any():
        raise ValueError(
            "a regulariser compares images set by set, so that all must have equally many sets, not "
            f"{counts.min()} to {counts.max()}"
        )
    order = sets.image.argsort(stable=True)
    return sets.pool(at_least_float32(tokens))[order].unflatten(0, (len(counts), -1))


def images_of_all(z: Tensor) -> Tensor:
    """Return embeddings of the images of all processes, with gradients: [B, V, D] -> [V, N, D]."""
    return gather_with_grad(z).transpose(0, 1)


class Regulariser(nn.Module):
    """Base of the regularisers: pools tokens of each set of patches, and projects them.

    A set is one context or target block of an image, or, in a recipe of views, one view. Each statistic is over the
    images of all processes, for one set of each, and is averaged over the sets of an image.

    Args:
        of: ``prediction``, the predictions at target patches (of a recipe of views: its embeddings), or ``context``,
            tokens of the context encoder.
        widths: of both; supplied by the recipe.
        projector: a head between pooled tokens and the loss, as name and options in the slot ``head``; None for none.

    Raises:
        ValueError: an option is unknown or outside its range (of the projector: the message begins with it).
    """

    is_distance = False
    nested: ClassVar[dict[str, str]] = {"projector": "head"}

    def __init__(self, of: str, widths: tuple[int, int], projector: dict[str, Any] | None) -> None:
        super().__init__()
        out_dim, embed_dim = widths
        self.of = of
        self.width = embed_dim if of == "context" else out_dim
        self.projector: nn.Module | None = None
        if projector is not None:
            self.projector = build_part("projector", projector, HEADS, in_dim=self.width)
            self.width = int(self.projector.out_dim)  # type: ignore[arg-type]

    def embed(self, prediction: Prediction, *tokens: Tensor) -> list[Tensor]:
        """Return the pooled and projected embeddings of tokens [P, D] at the same patches: -> [B, V, D] of each."""
        masks = prediction.masks
        sets = masks.context if self.of == "context" else masks.targets
        rows = [by_set(x, sets, masks) for x in tokens]
        if self.projector is not None:
            rows = [self.projector(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in rows]
        return [at_least_float32(x) for x in rows]

    def embeddings(self, prediction: Prediction) -> Tensor:
        """Return the embeddings that are regularised, [B, V, D]."""
        return self.embed(prediction, prediction.context if self.of == "context" else prediction.prediction)[0]


@LOSSES.register("vicreg")
class VICReg(Regulariser):
    """Variance, invariance and covariance of embeddings (Bardes et al. 2022, arXiv 2105.04906, section 4.1).

    As in the released code, the variance term is halved and the covariance term is not, when there are two branches.

        invariance  mean squared difference between the two branches
        variance    mean over the width of max(0, 1 - sqrt(variance + 1e-4)), mean of the branches
        covariance  sum of the squared covariances of different features, over the width, sum of the branches

    Variance and covariance are unbiased. For two views of a recipe of views, take ``of: prediction``, twice the
    covariance, and a loss ``l2`` of four times the invariance, as its views are compared with their mean.

    Args:
        of: ``pairs``, predictions and targets as two branches; ``prediction`` or ``context`` as the only branch.
        invariance, variance, covariance: weights of the terms, 0 and up.
        projector: see ``Regulariser``.
        embed_dim, out_dim: of tokens and of predictions; supplied by the recipe.

    Raises:
        ValueError: an option is outside its range, or there is no second branch for the invariance; in a call, there
            is only one image, or images have unequally many sets.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        of: Literal["pairs", "prediction", "context"] = "pairs",
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        projector: dict[str, Any] | None = None,
    ) -> None:
        check_choice("of", of, Literal["pairs", "prediction", "context"])
        super().__init__(of, (out_dim, embed_dim), projector)
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        for name, weight in self.weights.items():
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"{name} (={weight}) must be 0 or more, and finite")
        if of != "pairs" and invariance:
            raise ValueError(f"invariance (={invariance}) must be 0 if of is {of!r}: it compares pairs")

    def forward(self, prediction: Prediction) -> Tensor:
        """-> []."""
        terms = self.terms(prediction)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def terms(self, prediction: Prediction) -> dict[str, Tensor]:
        """Return the unweighted terms, each []."""
        if self.of != "pairs":
            branches = [self.embeddings(prediction)]
        else:
            branches = self.embed(prediction, prediction.prediction, prediction.target)
        with torch.autocast(branches[0].device.type, enabled=False):
            z = [images_of_all(x) for x in branches]  # [V, N, D] of each branch
            check_images(z[0])
            terms = {
                "variance": torch.stack([self.hinge(x) for x in z]).mean(),
                "covariance": torch.stack([self.covariance(x) for x in z]).sum(),
            }
            return {"invariance": F.mse_loss(z[0], z[1]), **terms} if len(z) == 2 else terms

    @staticmethod
    def hinge(z: Tensor) -> Tensor:
        """Return how far deviations are below 1 on average: [V, N, D] -> []."""
        return F.relu(1.0 - (z.var(1) + 1e-4).sqrt()).mean()

    @staticmethod
    def covariance(z: Tensor) -> Tensor:
        """Return the sum of squared covariances of different features over the width: [V, N, D] -> []."""
        centred = z - z.mean(1, keepdim=True)
        matrix = centred.mT @ centred / (z.shape[1] - 1)  # [V, D, D]
        squares = matrix.square().sum((1, 2)) - matrix.diagonal(dim1=1, dim2=2).square().sum(1)
        return squares.mean() / z.shape[2]


def check_images(z: Tensor) -> None:
    """Raise ValueError if embeddings [V, N, D] are those of a single image."""
    if z.shape[1] < 2:
        raise ValueError("a regulariser needs at least 2 images in the batch of all processes, not 1")
