"""The types of a training run: what it is made of (``Run``), where it begins (``Start``) and its hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from jepa_kit.config import Config
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import identity
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.schedules import Schedule
from jepa_kit.recipe import Recipe
from jepa_kit.structures import Progress


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a run is made of; ``build_run`` makes it.

    Args:
        config: resolved.
        world: of this process.
        device: of this process.
        dataset: the training samples.
        loader: reads this rank's batches of it.
        jepa: the recipe, in training mode.
        forward: is called in place of ``jepa`` in a step: DDP around it, parts of the batch (parallel.py).
        optimizer: over the parameters of ``jepa``.
        schedule: step -> learning rate, weight decay and momentum.
        steps_per_epoch: updates in an epoch.
    """

    config: Config
    world: World
    device: torch.device
    dataset: ShardDataset
    loader: TrainLoader
    jepa: Recipe
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    steps_per_epoch: int

    def progress(self, step: int) -> Progress:
        """Return the progress before the update ``step``."""
        train = self.config.train
        return Progress(step, self.schedule.where(step), step // self.steps_per_epoch, train.epochs, train.seed)

    @property
    def data_identity(self) -> dict[str, Any]:
        """Names and checksums that distinguish the data set, wherever it is stored (data/shards/index.py)."""
        return identity(self.dataset.shards)


ORIGIN = ("source", "licence", "file")
"""Keys of ``Start.origin``; ``file`` is the name of the file that ``--resume`` named."""


class Start(NamedTuple):
    """Where a run begins.

    Args:
        step: its next step.
        origin: of its weights, as its checkpoints record it.
        lines: messages to print.
        precision: of the run whose checkpoint was read; None for a new run.
    """

    step: int
    origin: dict[str, Any]
    lines: list[str]
    precision: str | None = None


class ForeignWeights(Protocol):
    """Reads weights that are not in a checkpoint of the run; the module ``jepa_kit.interop.start`` is one."""

    def init_from(self, jepa: Recipe, path_or_url: str | os.PathLike[str]) -> Start:
        """Load the weights of any file into a new run (``train.init_from``)."""
        ...

    def resume_official(
        self,
        jepa: Recipe,
        optimizer: torch.optim.Optimizer,
        path_or_url: str | os.PathLike[str],
        steps_per_epoch: int,
    ) -> Start:
        """Load weights, optimiser state and epoch of a released checkpoint (``--resume FILE``)."""
        ...


class Hook(Protocol):
    """Something that a run does between updates, such as an evaluation every n steps.

    A hook is called on every process after the update of a step if ``(step + 1) % every == 0``, and after the last
    step. The numbers that it returns are added to the step's line of ``metrics.jsonl``. Its time does not count in
    ``images_per_second``.

    A hook must not change weights, gradients or ``train()``. It may use torch's random numbers, which are seeded again
    for each step.
    """

    every: int

    def __call__(self, run: Run, step: int) -> dict[str, float]:
        """Run after the update of ``step`` (counted from 0), on every process.

        Returns:
            numbers for the step's line, the same on all processes; their names must be the hook's own ("eval/...").
        """
        ...


HookFactory = Callable[[Run], Hook | None]
"""Makes a hook for a run before its first step, on every process; None if the run's config does not ask for it."""


def check_hooks(config: Config, factories: Sequence[HookFactory]) -> None:
    """Raise ValueError if the config asks for an evaluation inside the run and there is no hook to do it."""
    if config.evaluate.every is not None and not factories:
        raise ValueError(
            f"evaluate.every (={config.evaluate.every}) needs a hook that evaluates: jepa_kit.training.train passes it"
        )


def due_hooks(hooks: Sequence[Hook], step: int, last: int) -> list[Hook]:
    """Return the hooks to call after ``step``; ``last`` is the last step of the run."""
    return [hook for hook in hooks if (step + 1) % hook.every == 0 or step == last]


def run_hooks(hooks: Sequence[Hook], run: Run, step: int) -> dict[str, float]:
    """Call hooks in their order and return all their numbers.

    Raises:
        ValueError: two hooks return the same name.
    """
    numbers: dict[str, float] = {}
    for hook in hooks:
        found = hook(run, step)
        if twice := numbers.keys() & found.keys():
            raise ValueError(f"two hooks give {', '.join(sorted(twice))} for one step: names must be a hook's own")
        numbers.update(found)
    return numbers
