"""Copy the lines of ``metrics.jsonl`` to TensorBoard and wandb.

A resumed run passes its first step to its loggers, so that no step appears twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in a run folder."""
WANDB_RUN = "wandb_run.txt"
"""File in a run folder with the id of its wandb run."""

SPEED = (
    "images_per_second",
    "tokens_per_second",
    "gflop_per_image",
    "tflops",
    "mfu",
    "reserved_memory_gib",
    "data_wait",
    "peak_memory_gib",
)
GROUPS = {"optim": ("grad_norm", "lr", "weight_decay", "momentum"), "speed": SPEED}
"""Groups of values in a logger. A name with a slash has its group in itself; all others are in ``run``."""


class Logger(Protocol):
    """Receives a copy of each line."""

    def write(self, record: Mapping[str, float]) -> None:
        """Log a line, now or in the background."""
        ...

    def close(self) -> None:
        """Finish, after the last line."""
        ...


def check_loggers(*, tensorboard: bool, wandb: str | None) -> None:
    """Raise ValueError if the package of a requested logger is not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "train.tensorboard (=True) needs the package tensorboard: pip install tensorboard, or give "
            "train.tensorboard=false"
        )
    if wandb is not None and find_spec("wandb") is None:
        raise ValueError(f"train.wandb (={wandb!r}) needs the package wandb: pip install 'jepa_kit[wandb]'")


def open_loggers(
    folder: Path, first_step: int, *, tensorboard: bool, wandb: str | None, config: Mapping[str, Any]
) -> list[Logger]:
    """Return the loggers of a run; only the main process has any.

    Args:
        folder: of the run.
        first_step: of this start; TensorBoard drops what it has from there on, and wandb what it gets again.
        tensorboard: whether to log to TensorBoard.
        wandb: project of wandb, or None for no wandb.
        config: resolved, for wandb.

    Raises:
        ValueError: as ``check_loggers``.
    """
    check_loggers(tensorboard=tensorboard, wandb=wandb)
    loggers: list[Logger] = [TensorBoard(folder / TENSORBOARD, first_step)] if tensorboard else []
    return [*loggers, Wandb(folder, wandb, config)] if wandb is not None else loggers


def tag(name: str) -> str:
    """Return the name of a value in a logger: 'lr' -> 'optim/lr'."""
    if name == "loss":
        return "loss/total"
    group = next((group for group, names in GROUPS.items() if name in names), "run")
    return name if "/" in name else f"{group}/{name}"


class TensorBoard:
    """Event files, flushed after each line; readers drop what earlier files have from ``first_step`` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: Mapping[str, float]) -> None:
        """Write one scalar for each value."""
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(tag(name), value, int(record["step"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A wandb run, resumed together with the run folder; wandb ignores steps that it has already."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder / WANDB_RUN
        run_id = name.read_text().strip() if name.exists() else None
        self.run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=dict(config), id=run_id, resume="allow"
        )
        name.write_text(f"{self.run.id}\n")

    def write(self, record: Mapping[str, float]) -> None:
        """Log the values under their step."""
        self.run.log({tag(name): value for name, value in record.items() if name != "step"}, step=int(record["step"]))

    def close(self) -> None:
        self.run.finish()
