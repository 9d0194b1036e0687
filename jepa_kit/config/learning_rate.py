"""The learning rate for another batch size than that which it was chosen for.

Two rules are in use, and neither is certain far from the batch size that was tried:

    linear         lr * k          for a batch k times as large (Goyal et al. 2017, arXiv 1706.02677, section 2.1; with
                                   AdamW: MAE, MoCo v3, DINO)
    square root    lr * sqrt(k)    for Adam and AdamW (Malladi et al. 2022, arXiv 2205.10287)

The paper of I-JEPA has one batch size, 2,048, with 1e-3, and no rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jepa_kit.config.sections import OptimConfig, TrainConfig

MARGIN = 1.1
"""Rates outside the two rules by less than this factor are not reported: users round."""


class LearningRate(NamedTuple):
    """A learning rate, and the batch size that it was chosen for."""

    lr: float
    batch_size: int


def chosen_rate(levels: Sequence[Mapping[Any, Any]]) -> LearningRate | None:
    """Return the learning rate of files, with the batch size where it was set last.

    Args:
        levels: raw mappings of a config's files, the lowest base first.

    Returns:
        None if a value is not a number.
    """
    lr: Any = OptimConfig.lr
    batch_size: Any = TrainConfig.batch_size
    chosen = batch_size
    for level in levels:
        train, optim = (x if isinstance(x := level.get(name), Mapping) else {} for name in ("train", "optim"))
        batch_size = train.get("batch_size", batch_size)
        if "lr" in optim:
            lr, chosen = optim["lr"], batch_size
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in (lr, chosen))
    return LearningRate(float(lr), int(chosen)) if numbers else None


def scaled_rates(chosen: LearningRate, batch_size: int, optimizer: str) -> tuple[float, float]:
    """Return the lowest and the highest rate that the rules give for a batch size; for SGD and LARS the linear one."""
    factor = batch_size / chosen.batch_size
    rates = [chosen.lr * factor, chosen.lr * (math.sqrt(factor) if optimizer == "adamw" else factor)]
    return min(rates), max(rates)


def note_on_rate(chosen: LearningRate, optim: OptimConfig, train: TrainConfig) -> str | None:
    """Return a message if the learning rate departs from the rules for the run's batch size, else None."""
    if train.batch_size == chosen.batch_size:
        return None
    low, high = scaled_rates(chosen, train.batch_size, optim.name)
    if low / MARGIN <= optim.lr <= high * MARGIN:
        return None
    between = math.sqrt(low * high)
    if optim.name == "adamw":
        rules = f"{low:.2g} to {high:.2g} (linear and square-root scaling)"
    else:
        rules = f"{between:.2g} (linear scaling)"
    start = min(optim.start_lr * between / optim.lr, between)
    return (
        f"optim.lr (={optim.lr:g}) departs from the rules for train.batch_size (={train.batch_size}): the config has "
        f"{chosen.lr:g} for {chosen.batch_size:,} images, which gives {rules}, such as optim.lr={between:.1e} "
        f"optim.start_lr={start:.1e} (docs/training.md, learning rate and batch size)"
    )
