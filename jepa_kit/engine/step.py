"""One update: the three lines of I-JEPA, the gradient, AdamW, the target encoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.recipe import JEPA, Output
from jepa_kit.structures import MaskBatch


def train_step(
    jepa: JEPA,
    optimizer: torch.optim.Optimizer,
    hyper: Hyper,
    images: Tensor,
    masks: MaskBatch,
    *,
    forward: nn.Module | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    clip_grad: float | None = None,
) -> Output:
    """Runs one update and returns what the forward pass gave; waits for the device nowhere.

    Args:
        jepa: the recipe, in training mode.
        optimizer: over the parameters of ``jepa``, with no gradients left from before.
        hyper: what this update runs with.
        images: [B, 3, h, w] float, normalised.
        masks: of the B images.
        forward: what is called in place of ``jepa``: a wrapper of it that averages gradients over processes.
        autocast: makes the context of the forward pass.
        clip_grad: largest norm of all gradients together, or None.
    """
    set_hyper(optimizer, hyper)
    with autocast():
        out = (forward or jepa)(images, masks)
    out.loss.backward()
    if clip_grad is not None:
        nn.utils.clip_grad_norm_(jepa.parameters(), clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    jepa.update_target(hyper.momentum)
    return out
