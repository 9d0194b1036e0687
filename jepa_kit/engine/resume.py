"""Which checkpoint a run goes on from. The order counts:

1. ``resume`` names a checkpoint of the run folder: go on from that one; later ones are set aside under another name.
2. ``resume`` and the folder has a checkpoint: go on from the latest, exactly. It is an error if it is damaged (an
   earlier one is taken only where it is named, rule 1), if its config differs from the given one in anything but
   ``FREE``, if the data set is another one, or if names or shapes do not fit.
3. ``resume`` and the folder has none: go on from the released checkpoint that was named with it
   (jepa_kit/interop/start.py); where none was, start at step 0, and say so.
4. No ``resume`` and the folder holds a run (a checkpoint or metrics): an error asks for ``resume`` or another folder.
5. No ``resume`` and no run there: start at step 0, from the weights of ``train.init_from`` where it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_kit.engine.checkpoint import Checkpoint, CheckpointError, checkpoints, step_of, verify

FREE = frozenset(
    {
        "data.backoff",
        "data.cache",
        "data.cache_gb",
        "data.label",
        "data.max_skipped",
        "data.num_workers",
        "data.prefetch",
        "data.retries",
        "data.shards",
        "data.timeout",
        "evaluate.every",
        "evaluate.label",
        "evaluate.probe",
        "evaluate.probe_samples",
        "evaluate.samples",
        "evaluate.shards",
        "train.accumulate",
        "train.activation_checkpointing",
        "train.attention",
        "train.bad_numbers",
        "train.bad_numbers_limit",
        "train.checkpoint",
        "train.checkpoint_every",
        "train.device",
        "train.init_from",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.log_every",
        "train.output_dir",
        "train.parallel",
        "train.tensorboard",
        "train.wandb",
    }
)
"""What may change at a resume: it moves no number beyond rounding (shards: the same samples in another place)."""

ASIDE = ".set_aside"
"""Added to the name of a checkpoint that a run did not go on from."""


def plan_resume(folder: Path, resume: bool, resume_from: str | None = None) -> Path | None:
    """The checkpoint of the run folder to go on from, or None; see the policy in the module's text.

    Args:
        folder: of the run.
        resume: whether to go on.
        resume_from: what to go on from: a checkpoint in the folder (rule 1), or a released one (rule 3).

    Raises:
        ValueError: the folder holds a run, and ``resume`` was not asked for; or it is a file.
        FileNotFoundError: ``resume_from`` names a checkpoint in the folder that is not there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.output_dir (={str(folder)!r}) must be a folder, but it is a file")
    found = checkpoints(folder)
    if resume_from is not None and "://" not in resume_from:
        named = Path(resume_from).expanduser()
        if step_of(named) is not None and named.parent.resolve() == folder.resolve():
            if named.name not in [path.name for path in found]:
                held = ", ".join(path.name for path in found) or "none"
                raise FileNotFoundError(f"there is no checkpoint {named}; its folder holds: {held}")
            return folder / named.name
    if resume or resume_from is not None:
        return found[-1] if found else None
    if found or (folder / "metrics.jsonl").exists():
        held = f"{found[-1].name}" if found else "metrics.jsonl"
        raise ValueError(
            f"{folder} already holds a run ({held}): give --resume to go on with it, or another --output-dir"
        )
    return None


def last_good(folder: Path, before: Path | None = None) -> Path | None:
    """The latest checkpoint that can be read from its first byte to its last.

    Args:
        folder: of the run.
        before: only those earlier than this one.
    """
    for path in reversed(checkpoints(folder)):
        if before is None or (step_of(path) or 0) < (step_of(before) or 0):
            try:
                verify(path)
            except (CheckpointError, OSError):  # said by the caller, who has a message of its own about another file
                continue
            return path
    return None


def advice(damaged: Path) -> str:
    """What can be done about a checkpoint that cannot be read: the end of a message."""
    good = last_good(damaged.parent, damaged)
    if good is None:
        return "no earlier checkpoint of the run is good; another --output-dir starts anew"
    return f"the last good one is {good.name}; `--resume {good}` goes on from it"


def set_aside(folder: Path, chosen: Path) -> list[Path]:
    """Renames the checkpoints after the chosen one, so that they are no checkpoints of the run any more."""
    later = [path for path in checkpoints(folder) if (step_of(path) or 0) > (step_of(chosen) or 0)]
    for path in later:
        target, number = path.with_name(path.name + ASIDE), 1
        while target.exists():
            target, number = path.with_name(f"{path.name}{ASIDE}_{number}"), number + 1
        path.rename(target)
    return later


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
