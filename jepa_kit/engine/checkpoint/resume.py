"""Choose the checkpoint that a run resumes from. The order of the rules counts:

1. ``resume`` names a checkpoint of the run: resume from it, and set later ones aside under another name. If torchrun or
   Slurm starts the same command again, this has been done, and rule 2 applies.
2. ``resume``, and the run has a checkpoint: resume from the latest, exactly. It is an error if the latest is damaged
   (an earlier one must be named, rule 1), if its config differs from the given one in an option that is not in
   ``FREE``, if the data set differs, or if names or shapes do not fit.
3. ``resume``, and the run has none: start from the released checkpoint that ``resume`` names
   (jepa_kit/interop/start.py); if it names none, start at step 0, and print it. The same command follows rule 2 once
   the run has a checkpoint; a file that is neither of the run nor what it began from is an error.
4. No ``resume``, and the folder contains a run (a checkpoint or metrics): an error; give ``resume`` or another folder.
5. No ``resume``, and no run there: start at step 0, with the weights of ``train.init_from`` if it is given.

The run's checkpoints are in its folder or in ``checkpoint.dir`` (manager.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_kit.config import config_from_dict, modernize
from jepa_kit.data.shards.index import difference
from jepa_kit.engine.checkpoint.format import Checkpoint
from jepa_kit.engine.checkpoint.manager import Location, Store, store_in
from jepa_kit.engine.checkpoint.storage import name_of
from jepa_kit.engine.consistency import flatten
from jepa_kit.errors import CheckpointError, ConfigError
from jepa_kit.run_folder import FACTS, METRICS

_FREE = {
    "checkpoint": ("dir", "every", "format", "keep", "keep_every"),
    "data": ("backoff", "cache", "cache_gb", "max_skipped", "num_workers", "prefetch", "retries", "shards", "timeout"),
    "encoder": ("compile",),
    "evaluate": ("every", "label", "probe", "probe_samples", "samples", "shards"),
    "predictor": ("compile",),
    "train": (
        *("accumulate", "activation_checkpointing", "attention", "deterministic", "device", "init_from", "log_every"),
        *("nonfinite_limit", "on_nonfinite", "output_dir", "parallel", "tensorboard", "wandb"),
    ),
}
FREE = frozenset(f"{section}.{option}" for section, options in _FREE.items() for option in options)
"""Options that may change at a resume: they change no number beyond rounding (shards: the same samples elsewhere).

But ``accumulate``, ``device`` and the number of processes change the draws of stochastic depth (``drop_path``), made
for each process and part, on the device; losses that compare the samples of a batch, which get those of a process and
part; and masks that depend on a process's batch, the released truncation (parallel.py)."""


def check_folders(store: Store) -> None:
    """Raise ValueError if a folder of the run is a file."""
    for option, folder in (("train.output_dir", store.run), ("checkpoint.dir", store.folder)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} (={str(folder)!r}) must be a folder, but it is a file")


def plan_resume(store: Store, resume: bool, resume_from: str | None = None, *, again: bool = False) -> Location | None:
    """Return the checkpoint to resume from, or None, by the rules of this module.

    Args:
        store: the checkpoints of the run.
        resume: whether to resume.
        resume_from: a checkpoint of the run (rule 1), or a released one (rule 3).
        again: torchrun or Slurm has started the same command before.

    Raises:
        ValueError: there is a run already, and ``resume`` is False; or newer checkpoints of the run are elsewhere.
        FileNotFoundError: ``resume_from`` names a checkpoint of the run that does not exist.
        RemoteError: the remote storage cannot be listed.
    """
    found = store.checkpoints()
    if resume_from is not None and store.owns(resume_from):
        if again and found and last_resumed_from(store.run) == name_of(resume_from):
            print(f"note: the run was resumed from {name_of(resume_from)} before; this start resumes from the latest")
            return found[-1]
        named = [location for location in found if location.name == name_of(resume_from)]
        if not named:
            names = ", ".join(location.name for location in found) or "none"
            raise FileNotFoundError(f"there is no checkpoint {resume_from}; its folder has: {names}")
        return named[0]
    if resume or resume_from is not None:
        check_place(store, found)
        return found[-1] if found else None
    if found or store.begun():
        sign = found[-1].name if found else str(store.begun())
        others = "another --output-dir" + (" and checkpoint.dir" if store.apart else "")
        at = store.run if sign == METRICS else store
        raise ValueError(f"{at} already contains a run ({sign}): give --resume to resume it, or {others}")
    return None


def last_resumed_from(run: Path) -> str | None:
    """Return the name of the checkpoint that the last start of a run was given to resume from, or None."""
    file = run / FACTS
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return name_of(named) if (named := facts.get("resume_from")) else None


def note_of_start(store: Store, named: str, origin: Mapping[str, Any]) -> str:
    """Return a note that ``named`` is what the run began from, and that its latest checkpoint is read instead.

    Args:
        store: the checkpoints of the run.
        named: a path or URL.
        origin: of the run's weights, from its checkpoint.

    Raises:
        ValueError: the run did not begin from ``named``.
    """
    began = {origin.get("file"), str(origin.get("source", "")).removesuffix(" (released layout)")}
    if name_of(named) in began:
        return f"note: {named} is where the run began; it resumes from its latest checkpoint"
    names = ", ".join(location.name for location in store.checkpoints())
    source = origin.get("file") or origin.get("source")
    raise ValueError(
        f"--resume (={named!r}) is not a checkpoint of the run in {store}, which has: {names}"
        + (f"; nor is it what the run began from ({source})" if source else "")
        + ". --resume alone resumes from the latest"
    )


def check_place(store: Store, found: Sequence[Location]) -> None:
    """Raise ValueError if the run in the folder left newer checkpoints outside ``store``."""
    before = store_in(store.run)
    if str(before) == str(store):
        return
    newest = before.newest()
    if newest is not None and (not found or newest.step > found[-1].step):
        raise ValueError(
            f"checkpoint.dir leads to {store}, which has {found[-1].name if found else 'no checkpoint'}, "
            f"but the run in {store.run} has {newest}: bring its checkpoints there first, or leave the option as it was"
        )


def advice(store: Store, damaged: Location) -> str:
    """Return the end of a message about a damaged checkpoint: what to do."""
    good = store.last_good(damaged)
    if good is None:
        return "no earlier checkpoint of the run is good; give another --output-dir to start a new run"
    return f"the last good one is {good.name}; `--resume {good}` resumes from it"


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's config under present names, with the defaults of options that are newer than it.

    Nothing is imported: the config to compare with has registered the parts. A config that is not valid today is
    returned with its names alone.
    """
    own = {key: config[key] for key in ("imports", "versions") if key in config}
    renamed = modernize(config)
    try:
        found = config_from_dict({key: value for key, value in renamed.items() if key not in own})
    except ConfigError:
        return renamed
    return {**found.to_dict(), **own}


def check_resumable(checkpoint: Checkpoint, config: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Check that the run of a checkpoint is the run of this config and data.

    Args:
        checkpoint: to resume from.
        config: the resolved config as a mapping; its ``versions`` are not compared.
        data: the identity of the data set (jepa_kit/data/shards/index.py).

    Returns:
        Notes on what could not be compared.

    Raises:
        CheckpointError: options or data differ; the message lists the options, or names the first shard.
    """
    then, now = flatten(with_defaults(checkpoint.config)), flatten(config)
    unset = "(not set)"
    differences = [
        f"{key}: {then.get(key, unset)!r} in the checkpoint, {now.get(key, unset)!r} now"
        for key in sorted(then.keys() | now.keys())
        if key.partition("[")[0] not in FREE
        and not key.startswith("versions.")
        and then.get(key, unset) != now.get(key, unset)
    ]
    if differences:
        raise CheckpointError(
            f"the run of the checkpoint (step {checkpoint.step}) has another config, so it cannot be resumed:\n  "
            + "\n  ".join(differences)
            + "\nGive the values of the checkpoint; or, for a longer run or any other one, start a new run from its "
            "weights: train.init_from=CHECKPOINT and another --output-dir"
        )
    fault, note = difference(checkpoint.data, data)
    if fault:
        raise CheckpointError(
            f"the run of the checkpoint (step {checkpoint.step}) had another data set than data.shards names, so it "
            f"cannot be resumed: {fault}"
        )
    return [] if note is None else [f"note: {note}"]
