"""Self-distillation: a student's distributions over prototypes are matched to those of a teacher, which are centred.

V = views of the student    T = views of the teacher    B = images of a batch    K = prototypes

Not in the registry: the targets of these losses need a teacher's logits, so a recipe calls them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.distributed.collectives import mean_over_ranks
from jepa_kit.structures import Progress


class CentredTargets(nn.Module):
    """Turn a teacher's logits into distributions: softmax((logits - centre) / temperature).

    Source: DINO (Caron et al. 2021, arXiv 2104.14294, section 3.1, equation 4). The centre is an exponential moving
    average of the mean logit of each prototype; without it, one prototype would win for all images. The temperature
    rises linearly from epoch to epoch, then it stays.

    Args:
        prototypes: K.
        temperature: above 0, after the warm-up.
        warmup: temperature of the first epoch, above 0.
        warmup_epochs: number of epochs that have a temperature of their own; the last of them has ``temperature``
            already. 0 for no warm-up. A single one has ``warmup``.
        momentum: of the centre, in [0, 1].

    Raises:
        ValueError: a value is outside its range.
    """

    centre: Tensor

    def __init__(
        self, prototypes: int, *, temperature: float, warmup: float, warmup_epochs: int, momentum: float
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("warmup_temperature", warmup)):
            check_temperature(name, value)
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs (={warmup_epochs}) must be 0 or more")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"centre_momentum (={momentum}) must be in [0, 1]")
        self.temperature, self.warmup, self.warmup_epochs = temperature, warmup, warmup_epochs
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(prototypes))  # [K]

    def temperature_at(self, epoch: int) -> float:
        """Return the temperature of an epoch, from 0."""
        if epoch >= self.warmup_epochs:
            return self.temperature
        return self.warmup + (self.temperature - self.warmup) * epoch / max(1, self.warmup_epochs - 1)

    @torch.no_grad()
    def forward(self, logits: Tensor, progress: Progress) -> Tensor:
        """Return distributions [..., K] of logits [..., K]; in training, move the centre afterwards.

        The mean is over all rows of all processes.
        """
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        targets = F.softmax((logits - self.centre) / self.temperature_at(progress.epoch), dim=-1)
        if self.training:
            self.centre.lerp_(mean_over_ranks(logits.flatten(0, -2).mean(0)), 1.0 - self.momentum)
        return targets


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError if a temperature is not above 0."""
    if not value > 0.0:
        raise ValueError(f"{name} (={value}) must be above 0")


def log_distributions(logits: Tensor, temperature: float) -> Tensor:
    """Return the logarithms of a student's distributions, [..., K] -> [..., K], in float32 or better."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.log_softmax(logits / temperature, dim=-1)


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


def entropy(targets: Tensor) -> Tensor:
    """Return the mean entropy of distributions [..., K] in nats: -> []."""
    return torch.special.entr(targets).sum(-1).mean()
