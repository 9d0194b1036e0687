"""The cost of a study on this machine, from a few measured steps of each arm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from jepa_kit.config import Config
from jepa_kit.distributed.collectives import World, choose_device
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.precision import autocast_of, precision_of, products_in
from jepa_kit.progress import duration, number_of
from jepa_kit.studies.cells import Job, Plan
from jepa_kit.studies.jobs import totals
from jepa_kit.trials.recipe_trial import trial_recipe, trial_views

MOST_IMAGES = 64
"""Images of a measured step; the time of a larger batch is in proportion."""
MOST_FLOP = 2e11
"""FLOP of a measured step on a CPU: a few seconds."""
STEPS = 3
"""Measured steps, of which the fastest counts; one more before them warms up."""


def seconds_per_image(config: Config, flop_per_image: float) -> float | None:
    """Return the time of a training step on this machine per image, without the loading of images.

    Args:
        config: of a run.
        flop_per_image: of a training step, which limits the images of a measured step on a CPU.

    Returns:
        None if two images are too much work for a CPU.
    """
    device = choose_device(config.train.device, World())
    count = min(config.train.batch_size, MOST_IMAGES)
    if device.type == "cpu":
        count = min(count, int(MOST_FLOP / flop_per_image))
        if count < min(2, config.train.batch_size):
            return None
    with products_in(precision_of(config), device):
        jepa = trial_recipe(config, device, attention=config.train.attention)
        views = trial_views(config, device, count)
        optimizer = optimizer_of(jepa, config.optim)
        best = float("inf")
        for step in range(1 + STEPS):
            _wait(device)
            start = time.perf_counter()
            train_step(
                jepa,
                optimizer,
                Hyper(0.0, 0.0, 1.0),
                views,
                autocast=autocast_of(config.train.precision, device),
            )
            _wait(device)
            if step:
                best = min(best, time.perf_counter() - start)
    return best / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_cost(plan: Plan, jobs: Sequence[Job], runs: Path, workers: int) -> str:
    """Return the cost of jobs as text: a line for each arm, and the sum."""
    lines, total, unknown = [], 0.0, 0
    for arm, length, cells in zip(plan.arms, plan.lengths, plan.cells, strict=True):
        left = [job for job in cells if job in jobs]
        if not left:
            continue
        each = seconds_per_image(arm.config, length.flop_per_image)
        seconds = 0.0 if each is None else totals(left, runs)[0] * each
        total, unknown = total + seconds, unknown + (each is None)
        lines.append(
            f"{arm.name}: {length.steps:,} steps of {length.batch_size} images, {length.flop / 1e12:.3g} TFLOP a run; "
            f"{number_of('run', len(left))}, "
            + ("too much for this CPU to measure" if each is None else duration(seconds))
        )
    images, tflop = totals(jobs, runs)
    lines.append(
        f"{number_of('job', len(jobs))}: {images:,} images, {tflop:.4g} TFLOP, {duration(total / workers)} on this "
        f"machine with {number_of('worker', workers)} (from measured steps, without reading images and evaluation"
        + (f"; {number_of('arm', unknown)} could not be measured)" if unknown else ")")
    )
    return "\n".join(lines)
