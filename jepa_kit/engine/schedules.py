"""Learning rate, weight decay and momentum as pure functions of the step.

The rules are those of the released I-JEPA code; its numbers are in ``tests/fixtures/released_schedules.json``.
With n = epochs * steps_per_epoch updates in the run, T = int(stretch * n), W = int(warmup_epochs * steps_per_epoch),
update i = 0, 1, ..., n - 1 uses:

    learning rate  start_lr -> lr, linear in (i + 1) / W, while i + 1 < W;
                   then lr -> final_lr, cosine in (i + 1 - W) / (T - W)
    weight decay   cosine in (i + 1) / T
    momentum       i / (stretch * n): as released, this one starts at 0 and its length is not rounded

The release counts before it uses a value, hence i + 1. The paper (appendix A) has weight decay linear. Other methods
count differently (``Counting``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)

from jepa_kit.config import Config
from jepa_kit.config.sections import Counting


@dataclass(frozen=True)
class Hyper:
    """Learning rate, weight decay and momentum of one update.

    Args:
        lr: learning rate.
        weight_decay: of AdamW, for the parameters that are decayed.
        momentum: EMA coefficient of the target encoder, in [0, 1].
    """

    lr: float
    weight_decay: float
    momentum: float


class WarmupThenCosine(ParamScheduler):
    """Linear from ``start`` to ``peak``, then half a cosine from ``peak`` to ``end``.

    fvcore's CompositeParamScheduler moves the joint by 1e-6 of the run, which is a step in long runs.

    Args:
        start: value at 0.
        peak: value at the end of the warm-up.
        end: value at 1.
        warmup: fraction of the whole that is warm-up, 0 and up; from 1 on the peak is not reached.
        rise: fraction of the whole after which the peak is reached, at most ``warmup``; None for ``warmup``.
    """

    def __init__(self, start: float, peak: float, end: float, warmup: float, rise: float | None = None) -> None:
        self.warmup = warmup
        self.rise_over = warmup if rise is None else rise
        self.rise = LinearParamScheduler(start, peak)
        self.fall = CosineParamScheduler(peak, end)

    def __call__(self, where: float) -> float:
        if where < self.warmup:
            return self.rise(where / self.rise_over if where else 0.0)
        return self.fall((where - self.warmup) / (1.0 - self.warmup) if self.warmup < 1.0 else 0.0)


class Schedule:
    """The three schedules of a run: ``schedule(step)`` returns the values of update ``step`` (from 0).

    Args:
        epochs: of the run.
        steps_per_epoch: updates in an epoch.
        lr: learning rate at the end of the warm-up.
        start_lr: learning rate before the first update.
        final_lr: learning rate at the end.
        warmup_epochs: length of the warm-up, 0 for none.
        weight_decay: (at the start, at the end).
        momentum: fraction of the planned updates [0, 1] -> momentum; ``Recipe.momentum``. None: always 1.
        stretch: length of the schedules in lengths of the run, 1 and up (the release's ``ipe_scale``); the run ends
            before them if it is above 1.
        counting: which progress an update has, see ``Counting``.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        lr: float,
        start_lr: float,
        final_lr: float,
        warmup_epochs: float,
        weight_decay: tuple[float, float],
        momentum: Callable[[float], float] | None = None,
        stretch: float = 1.0,
        counting: Counting = "from_1",
    ) -> None:
        # a run cannot be longer than its schedules, so stretch is at least 1 too
        ones: dict[str, float] = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "stretch": stretch}
        zeros = {"lr": lr, "start_lr": start_lr, "final_lr": final_lr, "warmup_epochs": warmup_epochs}
        zeros |= {f"weight_decay[{k}]": value for k, value in enumerate(weight_decay)}
        for least, values in ((1, ones), (0, zeros)):
            for name, value in values.items():
                if not value >= least:  # also catches nan
                    raise ValueError(f"{name} (={value}) must be at least {least}")
        self.steps = epochs * steps_per_epoch
        self.planned = int(stretch * epochs * steps_per_epoch)  # rounded in the release's order
        self.warmup_steps = int(warmup_epochs * steps_per_epoch)
        self._unrounded = stretch * self.steps
        self._first = 1 if counting == "from_1" else 0
        rise = max(0, self.warmup_steps - 1) if counting == "both_ends" else self.warmup_steps
        self._lr = WarmupThenCosine(start_lr, lr, final_lr, self.warmup_steps / self.planned, rise / self.planned)
        self._weight_decay = CosineParamScheduler(*weight_decay)
        self._momentum = momentum or ConstantParamScheduler(1.0)

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int, momentum: Callable[[float], float] | None = None) -> Schedule:
        """Return the schedules of a config."""
        optim = config.optim
        return cls(
            epochs=config.train.epochs,
            steps_per_epoch=steps_per_epoch,
            lr=optim.lr,
            start_lr=optim.start_lr,
            final_lr=optim.final_lr,
            warmup_epochs=optim.warmup_epochs,
            weight_decay=optim.weight_decay,
            momentum=momentum,
            stretch=optim.stretch,
            counting=optim.counting,
        )

    def __call__(self, step: int) -> Hyper:
        """Return the values of update ``step``; raise ValueError for a step outside the run."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step (={step}) must be from 0 to {self.steps - 1}: the run has {self.steps} updates")
        where = (step + self._first) / self.planned
        return Hyper(self._lr(where), self._weight_decay(where), self._momentum(self.where(step)))

    def where(self, step: int) -> float:
        """Return the fraction of the planned updates before ``step``, in [0, 1)."""
        return step / self._unrounded


def set_hyper(optimizer: torch.optim.Optimizer, hyper: Hyper) -> None:
    """Set each group's learning rate and, if it is decayed, its weight decay, times its factors if it has any."""
    for group in optimizer.param_groups:
        group["lr"] = hyper.lr * group.get("lr_scale", 1.0)
        if group["decayed"]:
            group["weight_decay"] = hyper.weight_decay * group.get("decay_scale", 1.0)
