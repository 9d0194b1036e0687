"""The types of a training run: what it is made of (``Run``) and where it begins (``Start``)."""

from __future__ import annotations

import os
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
from jepa_kit.recipe import JEPA


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
    jepa: JEPA
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    steps_per_epoch: int

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

    def init_from(self, jepa: JEPA, path_or_url: str | os.PathLike[str]) -> Start:
        """Load the weights of any file into a new run (``train.init_from``)."""
        ...

    def resume_official(
        self,
        jepa: JEPA,
        optimizer: torch.optim.Optimizer,
        path_or_url: str | os.PathLike[str],
        steps_per_epoch: int,
    ) -> Start:
        """Load weights, optimiser state and epoch of a released checkpoint (``--resume FILE``)."""
        ...
