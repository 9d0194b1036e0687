"""Which checkpoint a run goes on from. The order counts:

1. ``resume`` names a checkpoint of the run: go on from that one; later ones are set aside under another name. Location
   torchrun or Slurm starts the same command again, that has been done, and rule 2 holds.
2. ``resume`` and the run has a checkpoint: go on from the latest, exactly. It is an error if it is damaged (an
   earlier one is taken only where it is named, rule 1), if its config differs from the given one in anything but
   ``FREE``, if the data set is another one, or if names or shapes do not fit.
3. ``resume`` and the run has none: go on from the released checkpoint that was named with it
   (jepa_kit/interop/start.py); where none was, start at step 0, and say so. The same command goes on by rule 2 once the
   run has a checkpoint; a file that is neither of the run nor what it began from is an error.
4. No ``resume`` and the folder holds a run (a checkpoint or metrics): an error asks for ``resume`` or another folder.
5. No ``resume`` and no run there: start at step 0, from the weights of ``train.init_from`` where it is given.

The run's checkpoints are in its folder or where ``checkpoint.dir`` says (store.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_kit.config import modernize
from jepa_kit.data.shards.identity import difference
from jepa_kit.engine.checkpoint.format import Checkpoint
from jepa_kit.engine.checkpoint.manager import Location, Store, store_in
from jepa_kit.engine.checkpoint.storage import name_of
from jepa_kit.engine.consistency import flatten
from jepa_kit.errors import CheckpointError
from jepa_kit.run_folder import FACTS, METRICS

FREE = frozenset(
    {
        "checkpoint.dir",
        "checkpoint.every",
        "checkpoint.format",
        "checkpoint.keep",
        "checkpoint.keep_every",
        "data.backoff",
        "data.cache",
        "data.cache_gb",
        "data.max_skipped",
        "data.num_workers",
        "data.prefetch",
        "data.retries",
        "data.shards",
        "data.timeout",
        "encoder.compile",
        "evaluate.every",
        "evaluate.label",
        "evaluate.probe",
        "evaluate.probe_samples",
        "evaluate.samples",
        "evaluate.shards",
        "predictor.compile",
        "train.accumulate",
        "train.activation_checkpointing",
        "train.attention",
        "train.deterministic",
        "train.device",
        "train.init_from",
        "train.log_every",
        "train.nonfinite_limit",
        "train.on_nonfinite",
        "train.output_dir",
        "train.parallel",
        "train.tensorboard",
        "train.wandb",
    }
)
"""What may change at a resume: it moves no number beyond rounding (shards: the same samples in another place).

What ``accumulate``, ``device`` and the number of processes do move: draws of stochastic depth (``drop_path``), made for
each process and part, on the device; losses that compare the samples of a batch, which see those of a process and part;
and masks that hang on a process' batch, the released truncation (parallel.py)."""


def check_folders(store: Store) -> None:
    """Raises ValueError where a folder of the run is a file."""
    for option, folder in (("train.output_dir", store.run), ("checkpoint.dir", store.folder)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} (={str(folder)!r}) must be a folder, but it is a file")


def plan_resume(store: Store, resume: bool, resume_from: str | None = None, *, again: bool = False) -> Location | None:
    """The checkpoint of the run to go on from, or None; see the policy in the module's text.

    Args:
        store: where the run has its checkpoints.
        resume: whether to go on.
        resume_from: what to go on from: a checkpoint of the run (rule 1), or a released one (rule 3).
        again: torchrun or Slurm has started the same command before.

    Raises:
        ValueError: there is a run already, and ``resume`` was not asked for; or the run's checkpoints are in another
            place.
        FileNotFoundError: ``resume_from`` names a checkpoint in the run's place that is not there.
        RemoteError: the place cannot be listed.
    """
    found = store.checkpoints()
    if resume_from is not None and store.owns(resume_from):
        if again and found and went_back_to(store.run) == name_of(resume_from):
            print(f"note: the run went back to {name_of(resume_from)} before; this start goes on from the latest")
            return found[-1]
        named = [location for location in found if location.name == name_of(resume_from)]
        if not named:
            held = ", ".join(location.name for location in found) or "none"
            raise FileNotFoundError(f"there is no checkpoint {resume_from}; its folder holds: {held}")
        return named[0]
    if resume or resume_from is not None:
        check_place(store, found)
        return found[-1] if found else None
    if found or store.begun():
        held = found[-1].name if found else str(store.begun())
        others = "another --output-dir" + (" and checkpoint.dir" if store.apart else "")
        at = store.run if held == METRICS else store
        raise ValueError(f"{at} already holds a run ({held}): give --resume to go on with it, or {others}")
    return None


def went_back_to(run: Path) -> str | None:
    """The checkpoint that the run in a folder was told to go on from, the last time that it started; or None."""
    file = run / FACTS
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return name_of(named) if (named := facts.get("resume_from")) else None


def note_of_start(store: Store, named: str, origin: Mapping[str, Any]) -> str:
    """Return a note that ``named`` is where the run began, and that its latest checkpoint is read instead.

    Args:
        store: where the run has its checkpoints.
        named: a path or an address.
        origin: where the run's weights came from, as its checkpoint has it.

    Raises:
        ValueError: it is not what the run began from.
    """
    began = {origin.get("file"), str(origin.get("source", "")).removesuffix(" (released layout)")}
    if name_of(named) in began:
        return f"note: {named} is where the run began; it goes on from its latest checkpoint"
    held = ", ".join(location.name for location in store.checkpoints())
    source = origin.get("file") or origin.get("source")
    raise ValueError(
        f"--resume (={named!r}) is no checkpoint of the run in {store}, which holds: {held}"
        + (f"; nor is it what the run began from ({source})" if source else "")
        + ". --resume alone goes on from the latest"
    )


def check_place(store: Store, found: Sequence[Location]) -> None:
    """Raises ValueError where the run in the folder left newer checkpoints in another place than ``store``."""
    before = store_in(store.run)
    if str(before) == str(store):
        return
    newest = before.newest()
    if newest is not None and (not found or newest.step > found[-1].step):
        raise ValueError(
            f"checkpoint.dir leads to {store}, which holds {found[-1].name if found else 'no checkpoint'}, "
            f"but the run in {store.run} has {newest}: bring its checkpoints there first, or leave the option as it was"
        )


def advice(store: Store, damaged: Location) -> str:
    """What can be done about a checkpoint that cannot be read: the end of a message."""
    good = store.last_good(damaged)
    if good is None:
        return "no earlier checkpoint of the run is good; another --output-dir starts anew"
    return f"the last good one is {good.name}; `--resume {good}` goes on from it"


def check_resumable(checkpoint: Checkpoint, config: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Check that the run of a checkpoint is the run of this config and data.

    Args:
        checkpoint: to go on from.
        config: the resolved config as a mapping; its ``versions`` are not compared.
        data: the identity of the data set (jepa_kit/data/shards/identity.py).

    Returns:
        Notes on what could not be compared.

    Raises:
        CheckpointError: options or data differ; the message lists the options, or names the first shard.
    """
    then, now = flatten(modernize(checkpoint.config)), flatten(config)
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
