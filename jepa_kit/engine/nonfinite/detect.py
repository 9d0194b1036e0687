"""Losses and gradients that are not finite: seen by all ranks together, and never taken into weights or buffers.

How they are seen without waiting for the device and without a message of their own:

1. ``propagate_nonfinite`` makes every gradient of a rank NaN if its loss is not finite. The average of gradients over
   ranks, which DDP and FSDP take anyway, carries that to all ranks, so that one number shows it: the norm of all
   gradients.
2. ``step_if_finite``: AdamW reads that number on the device and leaves parameters and moments alone where it is bad.
3. ``Buffers`` (buffers.py): the same number, on the device, takes back what the forward pass made of buffers (batch
   norm's statistics, a centre of targets).
4. ``Watch``: the host reads it ``LAG`` steps later, when the device is long past it. All ranks read the number of the
   same step at the same step, so they decide alike.

What a run does about it is in bad_steps.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_kit.data.loader import Batch
from jepa_kit.engine.schedules import Hyper
from jepa_kit.structures import Update

LAG = 2
"""Steps between a step and the host's look at its numbers: the device has that much work before it."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss []; its gradient is NaN everywhere where it is not finite, and unchanged where it is."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """``optimizer.step()``, which changes nothing where ``grad_norm`` [] is not finite; waits for no device.

    Torch's fused AdamW reads ``found_inf`` on the device, as ``torch.amp.GradScaler`` has it do.
    """
    assert all(group["fused"] for group in optimizer.param_groups), "only the fused AdamW reads found_inf"
    optimizer.found_inf = torch.isfinite(grad_norm).logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()


@dataclass(frozen=True, eq=False)
class Suspect:
    """A step whose numbers are on their way to the host.

    Args:
        step: counted from 0.
        hyper: what it ran with.
        batch: of this rank, as the step had it.
        terms: names of the loss's terms.
        numbers: loss, norm of the gradient, and terms of this rank, on the host once ``ready``.
        ready: when they are; None for at once.
    """

    step: int
    hyper: Hyper
    batch: Batch
    terms: tuple[str, ...]
    numbers: Tensor
    ready: torch.cuda.Event | None

    def finite(self) -> bool:
        """Whether the update was taken: the same on every rank."""
        if self.ready is not None:
            self.ready.synchronize()
        return math.isfinite(self.numbers[1])


class Watch:
    """Looks at each step's numbers, later.

    Args:
        lag: steps until then, 0 and up; the batches of so many steps are kept.
    """

    def __init__(self, lag: int = LAG) -> None:
        self.lag = lag
        self.waiting: deque[Suspect] = deque()

    def add(self, step: int, hyper: Hyper, batch: Batch, out: Update) -> None:
        """Sends a step's numbers to the host; waits for nothing."""
        on_device = torch.stack([v.detach().float() for v in (out.loss, out.grad_norm, *out.terms.values())])
        numbers, ready = on_device, None
        if on_device.is_cuda:
            numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            numbers.copy_(on_device, non_blocking=True)
            ready = torch.cuda.Event(blocking=True)  # the host sleeps: a spinning one takes a core from the loader
            ready.record()
        self.waiting.append(Suspect(step, hyper, batch, tuple(out.terms), numbers, ready))

    def found(self, *, flush: bool = False) -> Iterator[Suspect]:
        """The bad ones of the steps that are ``lag`` steps old; with ``flush`` of all, which waits for the device."""
        while self.waiting and (flush or len(self.waiting) > self.lag):
            suspect = self.waiting.popleft()
            if not suspect.finite():
                yield suspect
