"""Copies of a run's lines where people look at many runs: TensorBoard, and wandb where it is asked for.

``metrics.jsonl`` is the record of a run; a board gets each line as it is written there. A run that goes on from a
checkpoint tells its boards from which step: no line stands there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in a run folder."""
WANDB_RUN = "wandb_run.txt"
"""File in a run folder that names its run of wandb."""

GROUPS = {
    "loss": "loss",
    "grad_norm": "optim",
    "lr": "optim",
    "weight_decay": "optim",
    "momentum": "optim",
    "images_per_second": "speed",
    "tokens_per_second": "speed",
    "gflop_per_image": "speed",
    "tflops": "speed",
    "mfu": "speed",
    "reserved_memory_gib": "speed",
    "data_wait": "speed",
    "peak_memory_gib": "speed",
}
"""Where a value stands on a board; those with a slash in their name stand where it says, all others under ``run``."""


class Board(Protocol):
    """Somewhere to copy lines to."""

    def write(self, record: Mapping[str, float]) -> None:
        """Copies a line; it is there when this returns, or as soon as the board can."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def check_boards(*, tensorboard: bool, wandb: str | None) -> None:
    """Raises: ValueError: a board is asked for and its package is not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "train.tensorboard (=True) needs the package tensorboard: pip install tensorboard, or give "
            "train.tensorboard=false"
        )
    if wandb is not None and find_spec("wandb") is None:
        raise ValueError(f"train.wandb (={wandb!r}) needs the package wandb: pip install 'jepa_kit[wandb]'")


def open_boards(
    folder: Path, *, first_step: int, tensorboard: bool, wandb: str | None, config: Mapping[str, Any]
) -> list[Board]:
    """The boards of a run; only the main process has any.

    Args:
        folder: of the run.
        first_step: of this start; what boards hold from it on is dropped, or will be written again.
        tensorboard: whether to write for TensorBoard.
        wandb: project of wandb, or None for no wandb.
        config: resolved, for wandb.

    Raises:
        ValueError: as ``check_boards``.
    """
    check_boards(tensorboard=tensorboard, wandb=wandb)
    boards: list[Board] = [TensorBoard(folder / TENSORBOARD, first_step)] if tensorboard else []
    return [*boards, Wandb(folder, wandb, config)] if wandb is not None else boards


def tag(name: str) -> str:
    """The name of a value on a board: 'lr' -> 'optim/lr'."""
    if name == "loss":
        return "loss/total"
    return name if "/" in name else f"{GROUPS.get(name, 'run')}/{name}"


class TensorBoard:
    """Event files, flushed after each line; a reader drops what earlier files hold from ``first_step`` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(tag(name), value, int(record["step"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of wandb, which goes on where this run folder does; a step that it has already is not taken twice."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder / WANDB_RUN
        run_id = name.read_text().strip() if name.exists() else None
        self.run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=dict(config), id=run_id, resume="allow"
        )
        name.write_text(f"{self.run.id}\n")

    def write(self, record: Mapping[str, float]) -> None:
        """Logs the values under their step. (wandb refuses a step below its last one: those are there already.)"""
        self.run.log({tag(name): value for name, value in record.items() if name != "step"}, step=int(record["step"]))

    def close(self) -> None:
        self.run.finish()
