"""Checkpoints, as one file or as a folder of shards.

A file ``checkpoint_<step>.pt`` is a mapping of plain values and tensors, read with ``weights_only=True``:

    format     ``jepa_kit/1``
    step       number of updates; the next update is number ``step``, counted from 0
    model      name -> tensor, all of ``Recipe.state_dict()``: encoder.*, predictor.*, target_encoder.*, ...
    optimizer  name of the parameter -> the optimiser's state for it
    config     the resolved config as a mapping
    versions   jepa_kit, torch, python, git commit, ... that wrote the file
    data       identity of the data set: ``samples`` and a digest
    position   in the data: ``epoch``, ``step_in_epoch``, ``samples`` read so far
    origin     of weights from another run: ``source``, ``licence`` (jepa_kit.interop); else empty

A folder ``checkpoint_<step>`` is the same in shards: ``run.pt`` with all but ``model`` and ``optimizer``, and with
``files`` (name -> size and CRC-32), beside the shards that dcp.py writes.

Weights, optimiser and step are the whole state of a run: schedules, masks, crops, order and random numbers are
functions of the step.

Both forms get their name by one rename, and are verified when they are read: a file is a zip archive with a CRC-32 of
every record. resume.py chooses the checkpoint to resume from, async_save.py writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.engine.checkpoint.files import FORMAT, HEADER, read_archive, read_header, reading, verify
from jepa_kit.engine.checkpoint.state_dict import load_full_state, parameters_of
from jepa_kit.errors import CheckpointError
from jepa_kit.files import atomic_write, write_archive
from jepa_kit.run_folder import step_of


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint; the module lists the fields."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    config: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the state of a child of the model, such as ``target_encoder``, by the child's own names.

        Raises:
            CheckpointError: there is no such part; the message lists the parts.
        """
        state = {key[len(name) + 1 :]: value for key, value in self.model.items() if key.startswith(name + ".")}
        if not state:
            parts = sorted({key.partition(".")[0] for key in self.model})
            raise CheckpointError(f"the checkpoint of step {self.step} has no {name!r}; it has: {', '.join(parts)}")
        return state


def checkpoint_path(folder: Path, step: int, *, sharded: bool = False) -> Path:
    """Return the path of the checkpoint after ``step`` updates."""
    return folder / (f"checkpoint_{step:08d}" + ("" if sharded else ".pt"))


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a local folder, files and shards, by step."""
    found = [(step, path) for path in folder.glob("checkpoint_*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint file atomically, and return its path.

    Raises:
        OSError: the file could not be written; an earlier one of the same step is unchanged.
    """
    path = checkpoint_path(folder, checkpoint.step)
    with atomic_write(path) as part:
        write_archive({"format": FORMAT, **vars(checkpoint)}, part)
    return path


def load_checkpoint(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    *,
    verified: bool = False,
    with_state: bool = True,
) -> Checkpoint:
    """Read a checkpoint, a file or shards, or the latest of a run folder.

    Args:
        path: of the checkpoint, or a run folder.
        map_location: device of its tensors.
        verified: ``verify`` has been called already; otherwise it is called here, which reads every byte once more.
        with_state: read ``model`` and ``optimizer`` of shards, as whole tensors; otherwise they are empty.

    Raises:
        FileNotFoundError: there is no such file or folder.
        CheckpointError: the folder has no checkpoint, a file is cut short or altered, or it is not a checkpoint of
            jepa_kit.
    """
    path = Path(path)
    if path.is_dir() and not (path / HEADER).exists():
        found = checkpoints(path)
        if not found:
            raise CheckpointError(f"{path} has no checkpoint (checkpoint_<step>.pt)")
        path = found[-1]
    if not path.exists():
        beside = [p.name for p in checkpoints(path.parent)]
        raise FileNotFoundError(f"there is no checkpoint {path}; its folder has: {', '.join(beside) or 'none'}")
    if not verified:
        verify(path)
    with reading(path):
        if path.is_dir():
            from jepa_kit.engine.checkpoint.dcp import read_full  # a second to import

            header = read_header(path)
            model, optimizer = read_full(path) if with_state else ({}, {})
            return as_checkpoint({**header, "model": model, "optimizer": optimizer}, path)
        return as_checkpoint(read_archive(path, map_location), path)


def as_checkpoint(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """Return the checkpoint of a mapping; ``origin`` and ``position`` are newer than the format, and may be missing.

    Raises:
        CheckpointError: a field is missing or has another type; ``path`` is the file in the message.
    """
    content = {"origin": {}, "position": {}, **content}
    wrong = [name for name in Checkpoint.__dataclass_fields__ if not _fits(name, content.get(name))]
    if wrong:
        what = ", ".join(f"{name!r} ({content[name]!r:.40})" if name in content else f"no {name!r}" for name in wrong)
        raise CheckpointError(f"{path} is not a checkpoint of jepa_kit: it has {what}")
    return Checkpoint(**{name: content[name] for name in Checkpoint.__dataclass_fields__})


def _fits(name: str, value: Any) -> bool:
    """Return whether a field of a checkpoint has the right type."""
    if name == "step":
        return isinstance(value, int) and value >= 0
    if not isinstance(value, dict):
        return False
    states = {"model": [value], "optimizer": list(value.values())}.get(name, [])
    return all(isinstance(state, dict) and all(map(torch.is_tensor, state.values())) for state in states)


def _names(names: list[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError with every name that is missing, unexpected or of another shape."""
    common = {name: (tuple(found[name].shape), tuple(expected[name].shape)) for name in expected if name in found}
    complaints = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [f"{name} ({shape}, not {wanted})" for name, (shape, wanted) in common.items() if shape != wanted],
    }
    if any(complaints.values()):
        listed = "; ".join(f"{fault}: {_names(names)}" for fault, names in complaints.items() if names)
        raise CheckpointError(f"{what} does not fit the checkpoint; {listed}")


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError with the names of tensors that contain NaN or an infinity."""
    bad = [name for name, x in state.items() if x.is_floating_point() and not bool(torch.isfinite(x).all())]
    if bad:
        raise CheckpointError(f"{what} has weights that are NaN or infinite: {_names(bad, 5)}")


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the checkpoint's state into the model and the optimiser.

    Raises:
        CheckpointError: names or shapes do not fit; nothing is changed then.
    """
    check_state(model.state_dict(), checkpoint.model, "the model")
    if optimizer is not None:
        parameters = parameters_of(optimizer)
        unused = {name: parameters.get(name, torch.empty(0)) for name in checkpoint.optimizer}  # never had a gradient
        moments = {
            name: next((x for x in state.values() if x.ndim), unused[name])
            for name, state in checkpoint.optimizer.items()
        }
        check_state(parameters, moments, "the optimiser")
    load_full_state(model, checkpoint.model, optimizer, checkpoint.optimizer)
