"""Regularisers that compare embeddings with a standard normal distribution, along random directions.

B = images of this process    N = images of all processes    V = sets of an image    D = width of an embedding
M = directions    T = points of the characteristic function
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jepa_kit.distributed.collectives import gather_with_grad
from jepa_kit.losses.regularisers import Of, Regulariser, check_images, images_of_all
from jepa_kit.registry import LOSSES, check_choice
from jepa_kit.structures import Prediction, Progress


class Sliced(Regulariser):
    """Base: directions are random unit vectors, drawn anew at each step, the same on all processes.

    Args:
        of, projector: see ``Regulariser``.
        widths: of predictions and of tokens; supplied by the recipe.
        slices: M.

    Raises:
        ValueError: an option is outside its range.
    """

    def __init__(self, of: Of, widths: tuple[int, int], projector: dict[str, Any] | None, slices: int) -> None:
        check_choice("of", of, Of)
        if slices < 1:
            raise ValueError(f"slices (={slices}) must be at least 1")
        super().__init__(of, widths, projector)
        self.slices = slices

    def directions(self, progress: Progress, like: Tensor) -> Tensor:
        """Return the directions [D, M] of a step, with the device and type of ``like``."""
        noise = torch.randn(self.width, self.slices, generator=progress.generator(like.device), device=like.device)
        return (noise / noise.norm(dim=0)).to(like.dtype)

    def forward(self, prediction: Prediction) -> Tensor:
        """-> []."""
        z = self.embeddings(prediction)  # [B, V, D]
        with torch.autocast(z.device.type, enabled=False):
            return self.compare(z, self.directions(prediction.progress, z))

    def compare(self, z: Tensor, directions: Tensor) -> Tensor:
        """Return the loss of embeddings [B, V, D] along directions [D, M]: -> []."""
        raise NotImplementedError


@LOSSES.register("sigreg")
class SIGReg(Sliced):
    """Epps and Pulley's test of normality along random directions (LeJEPA, arXiv 2511.08544, section 4).

    N times the integral over t of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), where phi is the characteristic function of
    the images' values along a direction, by the trapezoid rule from -t_max to t_max (t > 0 counts twice). Mean over
    directions. The tables are made in float32, as in the released code.

    Args:
        of: ``prediction`` or ``context``.
        slices: M; the paper finds a few hundred enough if they change at each step.
        points: T, from 0 to ``t_max``, at least 2.
        t_max: above 0.
        projector: see ``Regulariser``.
        embed_dim, out_dim: of tokens and of predictions; supplied by the recipe.

    Raises:
        ValueError: an option is outside its range; in a call, images have unequally many sets.
    """

    t: Tensor
    normal: Tensor
    weights: Tensor

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        of: Of = "prediction",
        slices: int = 256,
        points: int = 17,
        t_max: float = 3.0,
        projector: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(of, (out_dim, embed_dim), projector, slices)
        if points < 2:
            raise ValueError(f"points (={points}) must be at least 2")
        if not 0.0 < t_max < float("inf"):
            raise ValueError(f"t_max (={t_max}) must be above 0 and finite")
        t = torch.linspace(0.0, t_max, points, dtype=torch.float32)  # [T]
        normal = (-t.square() / 2).exp()
        steps = torch.full_like(t, 2.0 * t_max / (points - 1))
        steps[[0, -1]] /= 2
        for name, table in (("t", t), ("normal", normal), ("weights", steps * normal)):
            self.register_buffer(name, table, persistent=False)

    def compare(self, z: Tensor, directions: Tensor) -> Tensor:
        return self.statistics(z, directions).mean()

    def statistics(self, z: Tensor, directions: Tensor) -> Tensor:
        """Return the statistic of each set of an image and each direction: [B, V, D], [D, M] -> [V, M]."""
        t, normal, weights = (table.to(z.dtype) for table in (self.t, self.normal, self.weights))
        angles = (z @ directions)[..., None] * t  # [B, V, M, T]
        own = torch.stack([angles.cos().sum(0), angles.sin().sum(0), torch.full_like(angles[0], len(z))])
        real, imaginary, count = gather_with_grad(own[None]).sum(0)  # [V, M, T] each, over all processes
        error = (real / count - normal).square() + (imaginary / count).square()
        return (error * count) @ weights


@LOSSES.register("visreg")
class VISReg(Sliced):
    """Scale, shape and centre of embeddings (VISReg, arXiv 2606.02572), three terms of equal weight.

        scale   mean over the width of (1 - deviation)^2
        shape   mean squared difference between the values of standardised embeddings along a direction, in order, and
                quantiles of the normal distribution (sliced Wasserstein distance); no gradient through the deviation
        centre  mean over the width of the squared mean

    The deviation is biased, and 1e-6 is added to it. The gradient of the scale does not vanish if embeddings are nearly
    equal, as that of ``sigreg`` does.

    Args:
        of: ``prediction`` or ``context``.
        slices: M.
        projector: see ``Regulariser``.
        embed_dim, out_dim: of tokens and of predictions; supplied by the recipe.

    Raises:
        ValueError: an option is outside its range; in a call, there is only one image, or images have unequally many
            sets.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        out_dim: int,
        of: Of = "prediction",
        slices: int = 4096,
        projector: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(of, (out_dim, embed_dim), projector, slices)

    def compare(self, z: Tensor, directions: Tensor) -> Tensor:
        return torch.stack(list(self.terms(z, directions).values())).sum()

    def terms(self, z: Tensor, directions: Tensor) -> dict[str, Tensor]:
        """Return the three terms, each [], of embeddings [B, V, D] along directions [D, M]."""
        x = images_of_all(z)  # [V, N, D]
        check_images(x)
        mean = x.mean(1, keepdim=True)
        deviation = x.std(1, correction=0, keepdim=True) + 1e-6  # [V, 1, D]
        values = ((x - mean) / deviation.detach()) @ directions  # [V, N, M]
        shape = values.sort(1).values - quantiles(x.shape[1], x.device).to(x.dtype)[:, None]
        terms = {"scale": 1 - deviation, "shape": shape, "centre": mean}
        return {name: term.square().mean() for name, term in terms.items()}


def quantiles(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the quantiles k / (count + 1) of the normal distribution for k from 1 to count, in float32: [count]."""
    levels = torch.arange(1, count + 1, dtype=torch.float32, device=device) / (count + 1)
    return torch.erfinv(2 * levels - 1) * math.sqrt(2)
