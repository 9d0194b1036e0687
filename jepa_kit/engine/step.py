"""One update: the forward pass of the recipe, the gradient, the optimiser, the target encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from jepa_kit.config import Config
from jepa_kit.data.batch import Batch
from jepa_kit.data.transforms import normalize
from jepa_kit.distributed.buffers import Buffers
from jepa_kit.engine.nonfinite.detect import propagate_nonfinite, step_if_finite
from jepa_kit.engine.optimizer import clip_gradients
from jepa_kit.engine.run import Run
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.precision import autocast_of
from jepa_kit.recipe import Recipe
from jepa_kit.rng import Stream, generator
from jepa_kit.structures import START, Progress, Update, View


def train_step(
    jepa: Recipe,
    optimizer: torch.optim.Optimizer,
    hyper: Hyper,
    views: Sequence[View],
    *,
    progress: Progress = START,
    forward: nn.Module | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    clip_grad: float | None = None,
    clip_each: bool = False,
) -> Update:
    """Run one update and return the output of the forward pass with the gradient's norm; never waits for the device.

    If the loss of any rank or a gradient is not finite, parameters, optimiser and buffers do not change
    (nonfinite/detect.py); only the target encoder moves.

    Args:
        jepa: the recipe, in training mode.
        optimizer: over the parameters of ``jepa``, with no gradients left from before.
        hyper: learning rate, weight decay and momentum of this update.
        views: of B images [B, 3, h, w], float and normalised.
        progress: of the run before this update.
        forward: called in place of ``jepa``: for several processes, or parts of the batch (parallel.py).
        autocast: makes the context of the forward pass.
        clip_grad: largest joint norm of all gradients, or None.
        clip_each: ``clip_grad`` is for each parameter's gradient.
    """
    set_hyper(optimizer, hyper)
    buffers = Buffers(jepa)
    with autocast():
        out = (forward or jepa)(*views, progress=progress)
    propagate_nonfinite(out.loss).backward()
    jepa.adjust_gradients(progress)
    grad_norm = clip_gradients(jepa, clip_grad, each=clip_each)
    step_if_finite(optimizer, grad_norm)
    buffers.restore_unless(torch.isfinite(grad_norm))
    optimizer.zero_grad(set_to_none=True)
    jepa.update_target(hyper.momentum)
    return Update(**vars(out), grad_norm=grad_norm)


def train_on(run: Run, step: int, batch: Batch) -> Update:
    """Run the update ``step`` (from 0) of a run on this rank's batch.

    Random numbers of torch (stochastic depth, dropout) are those of seed, step and rank.
    """
    config = run.config
    seed_torch(config.train.seed, step, run.world.rank)
    return train_step(
        run.jepa,
        run.optimizer,
        run.schedule(step),
        normalized(batch.views, config),
        progress=run.progress(step),
        forward=run.forward,
        autocast=autocast_of(config.train.precision, run.device),
        clip_grad=config.optim.clip_grad,
        clip_each=config.optim.clip_each,
    )


def normalized(views: Sequence[View], config: Config) -> list[View]:
    """Return views of uint8 images with images that are normalised as the config's data, float32."""
    data = config.data
    return [replace(view, images=normalize(view.images, data.mean, data.std)) for view in views]


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Make torch's random numbers (stochastic depth, dropout) a function of seed, step and rank."""
    torch.manual_seed(int(generator(Stream.STEP, seed=seed, epoch=step, lane=rank).integers(2**63)))
