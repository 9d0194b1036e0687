"""Detect losses and gradients that are not finite, on all ranks, and keep them out of weights and buffers.

This needs neither a wait for the device nor an all-reduce of its own:

1. ``propagate_nonfinite`` makes every gradient of a rank NaN if its loss is not finite. The average of gradients over
   ranks, which DDP and FSDP take anyway, carries that to all ranks, so that one number shows it: the norm of all
   gradients.
2. ``step_if_finite``: the optimiser reads that number on the device, and changes neither parameters nor its state if it
   is not finite.
3. ``Buffers`` (distributed/buffers.py) then restores what the forward pass changed in buffers (batch norm's statistics,
   a centre of targets), also on the device.
4. ``Watch``: the host reads the number ``LAG`` steps later, when the device has finished that step. All ranks read the
   number of the same step at the same step, so they decide alike.

policy.py is what a run does about it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_kit.data.batch import Batch
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.sgd import SGD
from jepa_kit.structures import Update

LAG = 2
"""Steps after which the host reads a step's numbers; the device has as many steps queued meanwhile."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss []; if it is not finite, all its gradients are NaN."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Call ``optimizer.step()``, which changes nothing if ``grad_norm`` [] is not finite; never waits for the device.

    Torch's fused AdamW and our ``SGD`` read ``found_inf`` on the device; ``torch.amp.GradScaler`` sets it likewise.
    """
    reads = isinstance(optimizer, SGD) or all(group["fused"] for group in optimizer.param_groups)
    assert reads, "only the fused AdamW and our SGD read found_inf"
    optimizer.found_inf = torch.isfinite(grad_norm).logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()


@dataclass(frozen=True, eq=False)
class Suspect:
    """A step whose numbers are being copied to the host.

    Args:
        step: counted from 0.
        hyper: its learning rate, weight decay and momentum.
        batch: of this rank.
        terms: names of the loss's terms.
        numbers: loss, norm of the gradient, and terms of this rank, on the host once ``ready``.
        ready: recorded after the copy; None if the numbers are on the host already.
    """

    step: int
    hyper: Hyper
    batch: Batch
    terms: tuple[str, ...]
    numbers: Tensor
    ready: torch.cuda.Event | None

    def finite(self) -> bool:
        """Return whether the update was applied; the same on every rank."""
        if self.ready is not None:
            self.ready.synchronize()
        return math.isfinite(self.numbers[1])


class Watch:
    """Reads each step's numbers some steps later.

    Args:
        lag: how many, 0 and up; the batches of so many steps stay in memory.
    """

    def __init__(self, lag: int = LAG) -> None:
        self.lag = lag
        self.waiting: deque[Suspect] = deque()

    def add(self, step: int, hyper: Hyper, batch: Batch, out: Update) -> None:
        """Begin to copy a step's numbers to the host."""
        on_device = torch.stack([v.detach().float() for v in (out.loss, out.grad_norm, *out.terms.values())])
        numbers, ready = on_device, None
        if on_device.is_cuda:
            numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            numbers.copy_(on_device, non_blocking=True)
            ready = torch.cuda.Event(blocking=True)  # the host sleeps: a spinning one takes a core from the loader
            ready.record()
        self.waiting.append(Suspect(step, hyper, batch, tuple(out.terms), numbers, ready))

    def found(self, *, flush: bool = False) -> Iterator[Suspect]:
        """Yield steps that are not finite, of those at least ``lag`` steps old, or of all with ``flush`` (it waits)."""
        while self.waiting and (flush or len(self.waiting) > self.lag):
            suspect = self.waiting.popleft()
            if not suspect.finite():
                yield suspect
