"""Estimate the time of a step before the first one: on images of noise, with a copy of the networks.

The run is the same with and without it: random states are restored, and its weights and buffers are copied.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from jepa_kit.distributed.collectives import all_gather_object
from jepa_kit.engine.run import Run
from jepa_kit.precision import autocast_of
from jepa_kit.progress import number_of
from jepa_kit.random_state import seeded
from jepa_kit.recipe import Recipe
from jepa_kit.structures import View
from jepa_kit.trials.recipe_trial import trial_views

FIRST = 2
"""Images of the first measurement; some losses compare the images of a batch."""
LONG_ENOUGH = 1.0
"""Seconds; with fewer images than take so long, launches and small products may dominate."""
TOO_LONG = 10.0
"""Seconds of a first measurement that is not repeated, though its first pass chooses kernels."""


@dataclass(frozen=True)
class Estimate:
    """The time of a step, without evaluations, checkpoints and the update of the weights.

    Args:
        compute: seconds of forward and backward pass on this rank's images.
        loading: seconds of one core for these images; None if that is unknown, as for remote shards.
        workers: loader processes of a rank.
        images: measured at a time.
        untrained: names of parameters that require a gradient and got none.
    """

    compute: float
    loading: float | None
    workers: int
    images: int
    untrained: tuple[str, ...] = ()

    @property
    def step(self) -> float:
        """Seconds of a step: workers load beside the training process; without any, it loads itself."""
        if not self.workers:
            return self.compute + (self.loading or 0.0)
        return max(self.compute, (self.loading or 0.0) / self.workers)

    def describe(self, steps: int) -> str:
        """Return a line for a run with so many steps left, and a note if some parameters are not trained."""
        loading = note = ""
        if self.untrained:
            note = (
                f"\nnote: no gradient reaches {number_of('parameter', len(self.untrained))}, first "
                f"{self.untrained[0]}: nothing trains them, and DDP fails in the second step; "
                "leave out the option that makes them"
            )
        if self.loading is not None:
            by = f"over {self.workers} workers" if self.workers else "in the same process"
            loading = f", {_seconds(self.loading)} of one core to load its images, {by}"
        return (
            f"time: about {_seconds(self.step)} a step, {timedelta(seconds=round(self.step * steps))} for {steps:,} "
            f"steps without evaluations and checkpoints (forward and backward {_seconds(self.compute)}{loading}; "
            f"measured on {self.images} images){note}"
        )


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def estimate_step(run: Run) -> Estimate | None:
    """Return the estimate of a run; all ranks must call it. None with FSDP, as a copy might not fit into the memory."""
    train, world = run.config.train, run.world
    if train.parallel == "fsdp":
        return None
    own = train.batch_size // world.size  # images of this rank
    at_once = max(1, own // train.accumulate)
    count, seconds, untrained = _measure(run, at_once)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    loading = None if run.dataset.remote else run.loader.seconds_per_image()
    return Estimate(
        compute=seconds * own / at_once,
        loading=None if loading is None else loading * own,
        workers=run.loader.num_workers,
        images=count,
        untrained=untrained,
    )


def _measure(run: Run, most: int) -> tuple[int, float, tuple[str, ...]]:
    """Return the number of measured images, the seconds of a pass of ``most``, and parameters without a gradient.

    A pass is forward and backward.
    """
    jepa = copy.deepcopy(run.jepa)
    for module in jepa.modules():
        if getattr(module, "compiled", False):  # compilation takes longer than a step
            module.compiled = False  # type: ignore[assignment]

    def measure(count: int) -> float:
        views = trial_views(run.config, run.device, count)
        jepa.zero_grad(set_to_none=True)
        with seeded(0):
            return _slowest(lambda: _train(jepa, views, run.config.train.precision, run.device))

    found = grow(measure, most)
    return *found, tuple(name for name, p in jepa.named_parameters() if p.requires_grad and p.grad is None)


def grow(measure: Callable[[int], float], most: int) -> tuple[int, float]:
    """Return a number of images that takes ``LONG_ENOUGH``, or ``most``, and the seconds of ``most`` images.

    These follow from the last two measurements: a part of a step does not depend on the number of images.

    Args:
        measure: number of images -> seconds.
        most: images at a time in the run.
    """
    count = min(FIRST, most)
    seconds = measure(count)
    if seconds < TOO_LONG:
        seconds = measure(count)
    an_image = seconds / count
    while count < most and seconds < TOO_LONG and (count == FIRST or seconds < LONG_ENOUGH):
        more = min(2 * count, most)
        longer = measure(more)
        least, largest = longer / more / 4, longer / more  # other processes disturb the measurements
        an_image = min(max((longer - seconds) / (more - count), least), largest)
        count, seconds = more, longer
    return count, seconds + an_image * (most - count)


def _slowest(train: Callable[[], float]) -> float:
    """Return the seconds of the slowest rank, so that all measure the same numbers of images."""
    return float(max(all_gather_object(train())))


def _train(jepa: Recipe, views: Sequence[View], precision: str, device: torch.device) -> float:
    """Return the seconds of a forward and backward pass."""
    start = time.perf_counter()
    with autocast_of(precision, device)():
        loss = jepa(*views).loss
    if loss.requires_grad:
        loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
