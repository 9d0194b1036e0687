"""Checkpoints: one file holds all that a run needs to go on, or to be looked at.

A file ``checkpoint_<step>.pt`` holds a mapping of plain values and tensors, read with ``weights_only=True``:

    format     ``jepa_kit/1``
    step       updates done; the next update is number ``step``, counted from 0
    model      name -> tensor, all of ``JEPA.state_dict()``: encoder.*, predictor.*, target_encoder.*, ...
    optimizer  name of the parameter -> AdamW's state for it
    config     the resolved config as a mapping
    versions   jepa_kit, torch, python, git commit, ... that wrote the file
    data       what tells the data set apart: ``samples`` and a digest
    origin     for weights that did not begin here: ``source``, ``licence`` (jepa_kit.interop); else empty

The state of a run is weights, optimiser and step: schedules, masks, crops, order and random numbers follow from those.

Resume policy; the order counts:

1. ``resume`` and the folder has a checkpoint: go on from the latest, exactly. It is an error if its config differs from
   the given one in anything but ``FREE``, if the data set is another one, or if names or shapes do not fit.
2. ``resume`` and the folder has none: go on from the released checkpoint that was named with it
   (jepa_kit/interop/start.py); where none was, start at step 0, and say so.
3. No ``resume`` and the folder holds a run (a checkpoint or metrics): an error asks for ``resume`` or another folder.
4. No ``resume`` and no run there: start at step 0.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = "jepa_kit/1"

FREE = frozenset(
    {
        "data.label",
        "data.num_workers",
        "data.shards",
        "train.attention",
        "train.checkpoint_every",
        "train.device",
        "train.init_from",
        "train.keep_checkpoints",
        "train.log_every",
        "train.output_dir",
    }
)
"""What may change at a resume: it moves no number beyond rounding (shards: the same samples in another place)."""

_ZIP = b"PK\x03\x04"
_NAME = re.compile(r"checkpoint_(\d+)\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, and why."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds; see the text of the module."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    config: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """State of a child of the model, such as ``target_encoder``, under the child's own names.

        Raises:
            CheckpointError: there is no such part; the message lists those that there are.
        """
        state = {key[len(name) + 1 :]: value for key, value in self.model.items() if key.startswith(name + ".")}
        if not state:
            parts = sorted({key.partition(".")[0] for key in self.model})
            raise CheckpointError(f"the checkpoint of step {self.step} has no {name!r}; it has: {', '.join(parts)}")
        return state


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` updates."""
    return folder / f"checkpoint_{step:08d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, by step."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint_*.pt") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the name of the parameter, so that it does not hang on the order of parameters."""
    state: dict[str, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state[name] = dict(optimizer.state.get(parameter, {}))
    return state


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes the file in one piece and deletes older ones.

    A crash at any time leaves either the old files or the new one, never half of one under its name.

    Args:
        folder: of the run.
        checkpoint: what to write.
        keep: how many of the latest checkpoints stay, at least 1.
    """
    path = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f".{path.name}.part"
    content = {"format": FORMAT, **{name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}}
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must survive a power cut
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Reads a checkpoint, or the latest of a run folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        CheckpointError: a folder without a checkpoint, a file cut short, or one that is not a checkpoint of jepa_kit.
    """
    path = Path(path)
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise CheckpointError(f"{path} holds no checkpoint (checkpoint_<step>.pt)")
        path = found[-1]
    if not path.exists():
        beside = [p.name for p in checkpoints(path.parent)]
        raise FileNotFoundError(f"there is no checkpoint {path}; its folder holds: {', '.join(beside) or 'none'}")
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    size = f"{path} ({path.stat().st_size} bytes)"
    if start != _ZIP:  # torch.save writes a zip archive
        raise CheckpointError(f"{size} is not a checkpoint: it does not start like one")
    if not zipfile.is_zipfile(path):  # the archive's directory is at its end
        raise CheckpointError(f"{size} is cut short: its end is missing")
    try:
        content = torch.load(str(path), map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of jepa_kit: it holds other things than tensors and plain values, "
            "which could run code and are not read"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{size} is damaged, or no checkpoint: {str(error).splitlines()[0]}") from error
    found_format = content.get("format") if isinstance(content, dict) else None
    if found_format != FORMAT:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint of jepa_kit: its format is {found_format!r}, not {FORMAT!r} "
            f"(it holds: {keys}); tools/convert_checkpoint.py reads those of other code"
        )
    required = [name for name in Checkpoint.__dataclass_fields__ if name != "origin"]
    return Checkpoint(**{name: content[name] for name in required}, origin=content.get("origin", {}))


def _names(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError with every name that is missing, unexpected or misshapen."""
    complaints = []
    if missing := [name for name in expected if name not in found]:
        complaints.append(f"missing: {_names(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        complaints.append(f"unexpected: {_names(unexpected)}")
    misshapen = [
        f"{name} ({tuple(found[name].shape)}, not {tuple(value.shape)})"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if misshapen:
        complaints.append(f"misshapen: {_names(misshapen)}")
    if complaints:
        raise CheckpointError(f"{what} does not fit the checkpoint; " + "; ".join(complaints))


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Gives model and optimiser the checkpoint's state.

    Raises:
        CheckpointError: names or shapes do not fit; nothing has been changed then.
    """
    check_state(model.state_dict(), checkpoint.model, "the model")
    if optimizer is not None:
        parameters = {
            name: parameter
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        unused = {name: parameters.get(name, torch.empty(0)) for name in checkpoint.optimizer}  # never had a gradient
        moments = {name: state.get("exp_avg", unused[name]) for name, state in checkpoint.optimizer.items()}
        check_state(parameters, moments, "the optimiser")
        content = optimizer.state_dict()
        content["state"] = {
            number: {key: value.to(parameter.device, copy=True) for key, value in checkpoint.optimizer[name].items()}
            for number, (name, parameter) in enumerate(parameters.items())
            if checkpoint.optimizer[name]
        }
        optimizer.load_state_dict(content)
    model.load_state_dict(checkpoint.model)


def plan_resume(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0; see the policy in the module's text.

    Raises:
        ValueError: the folder holds a run, and ``resume`` was not asked for; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.output_dir (={str(folder)!r}) must be a folder, but it is a file")
    found = checkpoints(folder)
    if resume:
        return found[-1] if found else None
    if found or (folder / "metrics.jsonl").exists():
        held = f"{found[-1].name}" if found else "metrics.jsonl"
        raise ValueError(
            f"{folder} already holds a run ({held}): give --resume to go on with it, or another --output-dir"
        )
    return None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}; a tuple is a list."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{path}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    return {key: leaf for name, inner in items for key, leaf in _flat(inner, name).items()}


def check_resumable(checkpoint: Checkpoint, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the run of a checkpoint would not be the run of this config and data.

    Args:
        checkpoint: to go on from.
        config: the resolved config as a mapping; its ``versions`` are not compared.
        data: what tells the data set apart.
    """
    then, now = _flat(checkpoint.config), _flat(config)
    unset = "(not set)"
    differences = [
        f"{key}: {then.get(key, unset)!r} in the checkpoint, {now.get(key, unset)!r} now"
        for key in sorted(then.keys() | now.keys())
        if key not in FREE and not key.startswith("versions.") and then.get(key, unset) != now.get(key, unset)
    ]
    if differences:
        raise CheckpointError(
            f"the run of the checkpoint (step {checkpoint.step}) has another config, so it cannot be resumed:\n  "
            + "\n  ".join(differences)
        )
    if data != checkpoint.data:
        raise CheckpointError(
            f"the run of the checkpoint (step {checkpoint.step}) had another data set: {checkpoint.data}, "
            f"but data.shards holds {dict(data)}"
        )
