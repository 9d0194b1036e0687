"""Self-distillation: a student's distributions over prototypes are matched to those of a teacher, which are centred.

V = views of the student    T = views of the teacher    B = images of a batch    K = prototypes
N = patches of a view       P = target patches of T views, packed

Not in the registry: the targets of these losses need a teacher's logits, so a recipe calls them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.distributed.collectives import mean_over_ranks
from jepa_kit.structures import MaskBatch, Progress, at_least_float32


class CentredTargets(nn.Module):
    """Turn a teacher's logits into distributions: softmax((logits - centre) / temperature).

    Source: DINO (Caron et al. 2021, arXiv 2104.14294, section 3.1, equation 4). The centre is an exponential moving
    average of the mean logit of each prototype; without it, one prototype would win for all images. The temperature
    rises linearly from epoch to epoch, then it stays.

    Args:
        prototypes: K.
        temperature: of the first epoch and after the warm-up, each above 0.
        warmup_epochs: number of epochs from the first temperature to the second, which the last of them has already;
            1 is the first temperature in the first epoch, 0 never.
        momentum: of the centre, in [0, 1].

    Raises:
        ValueError: a value is outside its range.
    """

    centre: Tensor

    def __init__(
        self, prototypes: int, *, temperature: tuple[float, float], warmup_epochs: int, momentum: float
    ) -> None:
        super().__init__()
        for value in temperature:
            check_temperature("temperature", value)
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs (={warmup_epochs}) must be 0 or more")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"centre_momentum (={momentum}) must be in [0, 1]")
        self.temperature, self.warmup_epochs, self.momentum = temperature, warmup_epochs, momentum
        self.register_buffer("centre", torch.zeros(prototypes))  # [K]

    def temperature_at(self, epoch: int) -> float:
        """Return the temperature of an epoch, from 0."""
        first, last = self.temperature
        if epoch >= self.warmup_epochs:
            return last
        return first + (last - first) * epoch / max(1, self.warmup_epochs - 1)

    def forward(self, logits: Tensor, progress: Progress) -> Tensor:
        """Return distributions [..., K] of logits [..., K]; in training, ``update`` the centre afterwards."""
        targets = self.distributions(logits, progress)
        self.update(logits)
        return targets

    @torch.no_grad()
    def distributions(self, logits: Tensor, progress: Progress) -> Tensor:
        """Return distributions [..., K] of logits [..., K], in float32 or better."""
        return F.softmax((at_least_float32(logits) - self.centre) / self.temperature_at(progress.epoch), dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """In training, move the centre towards the mean of the logits [..., K] over all rows of all processes."""
        if self.training:
            mean = logits.flatten(0, -2).mean(0, dtype=self.centre.dtype)
            self.centre.lerp_(mean_over_ranks(mean), 1.0 - self.momentum)


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError if a temperature is not above 0."""
    if not value > 0.0:
        raise ValueError(f"{name} (={value}) must be above 0")


def log_distributions(logits: Tensor, temperature: float) -> Tensor:
    """Return the logarithms of a student's distributions, [..., K] -> [..., K], in float32 or better."""
    return F.log_softmax(at_least_float32(logits) / temperature, dim=-1)


def cross_entropy(targets: Tensor, log_p: Tensor) -> Tensor:
    """Return -sum_k targets log p of each row: [..., K] twice -> [...]."""
    return -(targets * log_p).sum(-1)


def across_views(targets: Tensor, log_p: Tensor) -> Tensor:
    """Average the cross entropy over images and over pairs of different views: -> [] (DINO, equation 3).

    Args:
        targets: [T, B, K] of the teacher.
        log_p: [V, B, K] of the student; its view i < T is the teacher's view i, and this pair is left out.
    """
    pairs = [cross_entropy(q, p).mean() for i, q in enumerate(targets) for j, p in enumerate(log_p) if i != j]
    return torch.stack(pairs).mean()


def hidden_in(masks: Sequence[MaskBatch]) -> Tensor:
    """Return which patches are hidden in the contexts of T views, each of B whole images: [T * B * N] bool."""
    hidden = [of_view.context.hidden for of_view in masks]
    return torch.cat([x for x in hidden if x is not None])


def at_targets(x: Tensor, masks: Sequence[MaskBatch]) -> Tensor:
    """Select the target patches of each view from those of all views: [T * B * N, ...] -> [P, ...]."""
    dense = x.unflatten(0, (len(masks), len(masks[0].context), -1))  # [T, B, N, ...]
    return torch.cat([of_view.targets.gather(own) for of_view, own in zip(masks, dense, strict=True)])


def over_hidden(errors: Tensor, masks: Sequence[MaskBatch]) -> Tensor:
    """Average errors [P] over the target patches of an image, then over images and views: -> [] (iBOT, equation 2).

    An image whose targets are not hidden counts as 0, as in the released code.

    Args:
        errors: of the target patches of T views, as from ``at_targets``.
        masks: of these views, with one context and one target set for each image (``in_place``).
    """
    errors = errors * at_targets(hidden_in(masks), masks)
    parts = errors[:, None].split([of_view.targets.num_patches for of_view in masks])
    sums = [of_view.targets.pool(part).sum() for of_view, part in zip(masks, parts, strict=True)]
    return torch.stack(sums).sum() / sum(len(of_view.context) for of_view in masks)


def entropy(targets: Tensor) -> Tensor:
    """Return the mean entropy of distributions [..., K] in nats: -> []."""
    return torch.special.entr(targets).sum(-1).mean()
