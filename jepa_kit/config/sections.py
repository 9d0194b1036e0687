"""The sections of a config but ``data``: options that belong to no part.

Types are checked by check.py, as those of parts are; ranges are checked at construction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jepa_kit.config.section import Section, above_0, at_least, option
from jepa_kit.registry import Backend

Counting = Literal["from_1", "from_0", "both_ends"]
"""Which progress update i = 0, 1, ... of a schedule has.

``from_1`` is i + 1 (the released I-JEPA), ``from_0`` is i (MAE), and so is ``both_ends`` (DINO, BEiT), but there the
last update of the warm-up, and not the one after it, is the first with the highest learning rate.
"""


OptimizerName = Literal["adamw", "sgd", "lars"]
"""Optimisers of a run."""

OPTIONS_OF: dict[str, tuple[str, ...]] = {"adamw": ("betas", "eps"), "sgd": ("momentum",), "lars": ("momentum",)}
"""Optimiser -> its own options."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig(Section):
    """Parameters with a learning rate and a weight decay of their own, as factors of those of the schedules.

    Args:
        match: their names, as in a checkpoint, with * for any characters and ? for one: "encoder.patch_embed.*".
        lr: factor of the learning rate.
        weight_decay: factor of the weight decay, which then applies to all of them, also to biases and scales; 0 for no
            decay, None to decay those that would be decayed without this entry.

    Raises:
        ConfigError: a value is outside its range, or the entry changes nothing.
    """

    match: str = option("a pattern of names", bool)
    lr: float = at_least(0, 1.0)
    weight_decay: float | None = option("at least 0 and finite", lambda x: 0 <= x < math.inf, None)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        if values["lr"] == 1 and values["weight_decay"] is None:
            return [f"match (={values['match']!r}) has no effect without lr or weight_decay"]
        return []


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimiser and its schedules; the defaults are the release's.

    Args:
        name: "adamw"; "sgd"; or "lars", SGD with a rate for each weight (jepa_kit/engine/sgd.py).
        lr: learning rate at the end of the warm-up.
        start_lr: learning rate at the start of the warm-up.
        final_lr: learning rate at the end of the cosine decay.
        warmup_epochs: length of the linear warm-up.
        weight_decay: (first, last) value of its cosine.
        betas, eps: of AdamW.
        momentum: of SGD and LARS.
        clip_grad: largest norm of all gradients; None for no clipping.
        clip_each: ``clip_grad`` is the largest norm of each parameter's gradient, as in DINO.
        stretch: length of the schedules over the length of the run (the release's ``ipe_scale``).
        counting: which progress an update has: "from_1" as in the release, "from_0", or "both_ends" (``Counting``).
        groups: parameters with a learning rate or weight decay of their own; the first entry that matches one counts.

    Raises:
        ConfigError: a value is outside its range.
    """

    name: OptimizerName = "adamw"
    lr: float = above_0(1e-3)
    start_lr: float = at_least(0, 2e-4)
    final_lr: float = at_least(0, 1e-6)
    warmup_epochs: float = at_least(0, 40.0)
    weight_decay: tuple[float, float] = option(
        "at least 0 and finite each", lambda x: all(0 <= v < math.inf for v in x), (0.04, 0.4)
    )
    betas: tuple[float, float] = option("in [0, 1) each", lambda x: all(0 <= v < 1 for v in x), (0.9, 0.999))
    eps: float = above_0(1e-8)
    momentum: float = option("in [0, 1)", lambda x: 0 <= x < 1, 0.9)
    clip_grad: float | None = above_0(None)
    clip_each: bool = False
    stretch: float = at_least(1, 1.0)
    counting: Counting = "from_1"
    groups: Sequence[GroupConfig] | None = option("a list of at least one", bool, None, items=GroupConfig)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """Return learning rates above the peak, and options that do nothing."""
        lr, problems = values["lr"], []
        for name in ("start_lr", "final_lr"):
            if (value := values[name]) > lr:
                is_default = value == getattr(cls, name)  # perhaps not given by the user
                note, hint = (", its default", f": give {name} too, at most {lr!r}") if is_default else ("", "")
                problems.append(f"{name} (={value!r}{note}) must not be above lr (={lr!r}){hint}")
        others = {option for options in OPTIONS_OF.values() for option in options} - {*OPTIONS_OF[values["name"]]}
        problems += [
            f"{name} (={values[name]!r}) has no effect if name is {values['name']}"
            for name in sorted(others)
            if values[name] != getattr(cls, name)
        ]
        if values["clip_each"] and values["clip_grad"] is None:
            problems.append("clip_each (=True) has no effect if clip_grad is null")
        return problems


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The run: its length, seed, precision, devices and log.

    Args:
        batch_size: images of one update, over all ranks.
        epochs: length of the run.
        steps_per_epoch: updates per epoch; None for one pass over the data.
        precision: of matrix products (jepa_kit/precision.py); weights and optimiser stay float32. "auto" is bf16 on
            CUDA, and on a CPU the faster of bf16 and float32; the choice is stored in the resolved config.
        seed: of all random numbers, 0 to 2**63 - 1.
        output_dir: the run folder, on this machine or on a shared file system.
        init_from: initial weights, in any format that ``jepa_kit.interop`` reads; None for random ones.
        log_every: steps between two lines of the log.
        on_nonfinite: what to do if a loss or a gradient is not finite (jepa_kit/engine/nonfinite/policy.py): "stop";
            "skip" leaves the batch out; "rollback" returns to the last checkpoint and leaves the batch out.
        nonfinite_limit: most such steps in a row, or most returns to one checkpoint, before the run stops anyway.
        attention: backend of ``attend``.
        parallel: parallelism over processes (jepa_kit/engine/parallel.py): "ddp" copies the model to each, "fsdp"
            shards it; "auto" is "ddp" if there are several; "none" is for one.
        accumulate: number of parts into which each rank's batch is split; they run one after another, which saves
            memory.
        activation_checkpointing: keep only the input of each block of encoder and predictor for the backward pass and
            recompute the rest: less memory, more time.
        device: torch's name of the device; "auto" is CUDA if available.
        deterministic: on CUDA, use kernels with reproducible bits (docs/faults.md), at some cost; an operator without
            such a kernel is an error. No effect on a CPU.
        tensorboard: also write each line for TensorBoard, in the run folder.
        wandb: project of wandb (Weights & Biases) that also gets each line; None for no wandb.

    Raises:
        ConfigError: a value is outside its range.
    """

    batch_size: int = at_least(1, 2048)
    epochs: int = at_least(1, 300)
    steps_per_epoch: int | None = at_least(1, None)
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"
    seed: int = option("from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63, 0)
    output_dir: str = option("a local path, not a URL", lambda x: x and "://" not in x, "output")
    init_from: str | None = option("a path or a URL", bool, None)
    log_every: int = at_least(1, 10)
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    nonfinite_limit: int = at_least(1, 3)
    attention: Backend = "auto"
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    accumulate: int = at_least(1, 1)
    activation_checkpointing: bool = False
    device: str = option("a device", bool, "auto")
    deterministic: bool = False
    tensorboard: bool = True
    wandb: str | None = option("a project's name", bool, None)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        limit = values["nonfinite_limit"]
        if values["on_nonfinite"] == "stop" and limit != cls.nonfinite_limit:
            return [f"nonfinite_limit (={limit}) has no effect if on_nonfinite is stop"]
        return []


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints of a run; they are written in the background.

    Args:
        format: "file" is one file; "sharded" a folder to which each rank writes its part; "auto" is "sharded" if
            ``train.parallel`` is "fsdp", else "file".
        dir: another folder than ``train.output_dir``, or a URL that a handler of iopath opens
            (jepa_kit/engine/checkpoint/manager.py); None for the run folder.
        every: steps between two checkpoints; None for one each epoch. The last step always has one.
        keep: number of the latest checkpoints to keep.
        keep_every: keep every checkpoint whose step is a multiple of this, which must be a multiple of ``every``; None
            for none.

    Raises:
        ConfigError: a value is outside its range.
    """

    format: Literal["auto", "file", "sharded"] = "auto"
    dir: str | None = option("a path or a URL", bool, None)
    every: int | None = at_least(1, None)
    keep: int = at_least(1, 2)
    keep_every: int | None = at_least(1, None)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        every, keep_every = values["every"], values["keep_every"]
        if every is None or keep_every is None or keep_every % every == 0:
            return []
        return [f"keep_every (={keep_every}) must be a multiple of every (={every})"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Evaluation inside a run (jepa_kit/evaluation/online.py): health, a verdict, and a probe of the target encoder.

    Args:
        every: steps between two evaluations, besides one after the last step; None for no evaluation.
        samples: number of images for health, the first of the evaluated ones.
        probe: ``knn``, ``linear`` (ridge regression), or ``none``; accuracy is leave-one-out.
        probe_samples: number of labelled images for the probe.
        label: name of the label that the probe predicts.
        shards: folder of held-out images; None for images of ``data.shards``, whose labels training does not use.

    Raises:
        ConfigError: a value is outside its range or has no effect, or a probe has no label.
    """

    every: int | None = at_least(1, None)
    samples: int = at_least(16, 256)
    probe: Literal["none", "knn", "linear"] = "none"
    probe_samples: int = at_least(32, 2048)
    label: str | None = None
    shards: str | None = option("a path", bool, None)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        changed = [f.name for f in dataclasses.fields(cls) if values[f.name] != f.default]
        if values["every"] is None:
            return [f"{name} (={values[name]!r}) has no effect if every is null" for name in changed]
        if values["probe"] == "none":
            unused = [name for name in changed if name in ("probe_samples", "label")]
            return [f"{name} (={values[name]!r}) has no effect if probe is none" for name in unused]
        if values["label"] is None:
            return [f"label (=None) must name the label that probe (={values['probe']!r}) predicts"]
        return []


def between_sections(optim: OptimConfig, train: TrainConfig) -> list[str]:
    """Return problems between sections that are valid alone."""
    length = optim.stretch * train.epochs
    if optim.warmup_epochs < length:
        return []
    planned = f"train.epochs (={train.epochs})"
    if optim.stretch != 1:
        planned = f"optim.stretch times train.epochs (={length})"
    return [f"optim.warmup_epochs (={optim.warmup_epochs!r}) must be below {planned}"]
