"""The sections of a config: options that belong to no part.

Types are checked by check.py, as those of parts are; ranges are checked at construction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jepa_kit.config.renamed import RELEASED_CROP
from jepa_kit.errors import ConfigError
from jepa_kit.registry import TRANSFORMS, Backend, PartRegistry


def _option(
    allowed: str,
    is_valid: Callable[[Any], bool],
    default: Any = dataclasses.MISSING,
    *,
    parts: PartRegistry | None = None,
) -> Any:
    """Return a field with a range.

    Args:
        allowed: the range in English, for messages.
        is_valid: returns whether a value is in the range; not called for None, which is always valid.
        default: of the field; none if it is required.
        parts: registry of the parts that the value lists, each as a mapping.
    """
    return field(default=default, metadata={"allowed": allowed, "is_valid": is_valid, "parts": parts})


def _above_0(default: Any) -> Any:
    return _option("above 0 and finite", lambda x: 0 < x < math.inf, default)


def _at_least(low: int, default: Any) -> Any:
    allowed = f"at least {low}" + (" and finite" if isinstance(default, float) else "")
    return _option(allowed, lambda x: low <= x < math.inf, default)


class _Section:
    """Base of the sections: checks all ranges at construction and reports every problem."""

    def __post_init__(self) -> None:
        if problems := self.out_of_range(vars(self)) or self.relations(vars(self)):
            raise ConfigError(problems)

    @classmethod
    def out_of_range(cls, values: Mapping[str, Any]) -> list[str]:
        """Return a message for each value of the right type that is out of range: 'lr (=0.0) must be above 0'."""
        checks = {f.name: f.metadata for f in dataclasses.fields(cls) if f.metadata}  # type: ignore[arg-type]
        return [
            f"{name} (={value!r}) must be {checks[name]['allowed']}"
            for name, value in values.items()
            if name in checks and value is not None and not checks[name]["is_valid"](value)
        ]

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """Return problems between fields whose values are valid alone."""
        return []


LARGEST_SIDE = 65_536
"""Largest side of an image, in pixels."""
MOST_WORKERS = 1024
"""Largest number of loader processes of a rank; no machine has more cores."""
_SCALE = ", as pixel values are in [0, 1]: divide values of the scale from 0 to 255 by 255"


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """The images, and how they are read and transformed.

    Args:
        image_size: (height, width) in pixels; in YAML one number means a square.
        shards: folder of shards, pattern of shards or list of these, local or remote (docs/data.md); needed to train,
            not to build a recipe.
        cache: folder of cached remote shards; None for a temporary folder of each process.
        cache_gb: limit of that folder in 10**9 bytes; None for no limit, or 20 if it is temporary.
        retries: retries after a stream broke, stalled or was refused; progress resets the count.
        backoff: seconds before the first retry; each next wait is twice as long, up to a minute.
        timeout: seconds without a byte after which a stream counts as stalled.
        max_skipped: fraction of an epoch's samples that may be skipped as unreadable (8 always may) before the run
            stops; 0 stops it at the first.
        transforms: applied to a training image, in order: the name and the options of each (docs/data.md); in YAML
            null means the release's random resized crop, the default.
        decoder: "pillow"; or "fast": simplejpeg and torch's resizing, within one level of 255 of "pillow".
        max_pixels: largest number of pixels (rows times columns) of an image that is decoded.
        mean, std: of the channels, for pixel values in [0, 1]; by default those of ImageNet.
        shuffle_window: number of samples that are shuffled together.
        num_workers: loader processes of each rank; 0 loads in the training process. "auto" is its usable cores on CUDA,
            a quarter of them on a CPU, and 0 if loading takes a negligible time (jepa_kit/data/workers.py).
        prefetch: batches that are copied to a CUDA device ahead of their step; 0 copies each when it is needed.

    Raises:
        ConfigError: a value is outside its range.
    """

    image_size: tuple[int, int] = _option(
        f"from 1 to {LARGEST_SIDE:,} pixels each way", lambda x: min(x) >= 1 and max(x) <= LARGEST_SIDE
    )
    shards: str | tuple[str, ...] | None = _option("a path, or at least one", bool, None)
    cache: str | None = _option("a path", bool, None)
    cache_gb: float | None = _above_0(None)
    retries: int = _at_least(0, 5)
    backoff: float = _at_least(0, 1.0)
    timeout: float = _above_0(60.0)
    max_skipped: float = _option("in [0, 1]", lambda x: 0 <= x <= 1, 0.01)
    transforms: Sequence[Mapping[str, Any]] = _option(
        "a list of at least one", bool, (RELEASED_CROP,), parts=TRANSFORMS
    )
    decoder: Literal["pillow", "fast"] = "pillow"
    max_pixels: int = _at_least(1, 89_478_485)
    mean: tuple[float, float, float] = _option(
        f"in [0, 1] each{_SCALE}", lambda x: all(0 <= v <= 1 for v in x), (0.485, 0.456, 0.406)
    )
    std: tuple[float, float, float] = _option(
        f"in (0, 1] each{_SCALE}", lambda x: all(0 < v <= 1 for v in x), (0.229, 0.224, 0.225)
    )
    shuffle_window: int = _at_least(1, 16384)
    num_workers: int | Literal["auto"] = _option(
        f'from 0 to {MOST_WORKERS}, or "auto"', lambda x: x == "auto" or 0 <= x <= MOST_WORKERS, "auto"
    )
    prefetch: int = _at_least(0, 2)

    @property
    def num_views(self) -> int:
        """Number of views of each image."""
        return 1

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        names = [part.get("name") for part in values["transforms"]]
        crops = [name for name in TRANSFORMS.names() if hasattr(TRANSFORMS.get(name), "window")]
        if set(names) & set(crops):
            return []
        return [f"transforms (={names}) must have one that sets the size: {', '.join(crops)}"]


Counting = Literal["from_1", "from_0", "both_ends"]
"""Which progress update i = 0, 1, ... of a schedule has.

``from_1`` is i + 1 (the released I-JEPA), ``from_0`` is i (MAE), and so is ``both_ends`` (DINO, BEiT), but there the
last update of the warm-up, and not the one after it, is the first with the highest learning rate.
"""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Section):
    """AdamW and its schedules; the defaults are the release's.

    Args:
        lr: learning rate at the end of the warm-up.
        start_lr: learning rate at the start of the warm-up.
        final_lr: learning rate at the end of the cosine decay.
        warmup_epochs: length of the linear warm-up.
        weight_decay: (first, last) value of its cosine.
        betas, eps: of AdamW.
        clip_grad: largest norm of all gradients; None for no clipping.
        stretch: length of the schedules over the length of the run (the release's ``ipe_scale``).
        counting: which progress an update has: "from_1" as in the release, "from_0", or "both_ends" (``Counting``).

    Raises:
        ConfigError: a value is outside its range.
    """

    lr: float = _above_0(1e-3)
    start_lr: float = _at_least(0, 2e-4)
    final_lr: float = _at_least(0, 1e-6)
    warmup_epochs: float = _at_least(0, 40.0)
    weight_decay: tuple[float, float] = _option(
        "at least 0 and finite each", lambda x: all(0 <= v < math.inf for v in x), (0.04, 0.4)
    )
    betas: tuple[float, float] = _option("in [0, 1) each", lambda x: all(0 <= v < 1 for v in x), (0.9, 0.999))
    eps: float = _above_0(1e-8)
    clip_grad: float | None = _above_0(None)
    stretch: float = _at_least(1, 1.0)
    counting: Counting = "from_1"

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        lr, problems = values["lr"], []
        for name in ("start_lr", "final_lr"):
            if (value := values[name]) > lr:
                is_default = value == getattr(cls, name)  # perhaps not given by the user
                note, hint = (", its default", f": give {name} too, at most {lr!r}") if is_default else ("", "")
                problems.append(f"{name} (={value!r}{note}) must not be above lr (={lr!r}){hint}")
        return problems


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
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

    batch_size: int = _at_least(1, 2048)
    epochs: int = _at_least(1, 300)
    steps_per_epoch: int | None = _at_least(1, None)
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"
    seed: int = _option("from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63, 0)
    output_dir: str = _option("a local path, not a URL", lambda x: x and "://" not in x, "output")
    init_from: str | None = _option("a path or a URL", bool, None)
    log_every: int = _at_least(1, 10)
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    nonfinite_limit: int = _at_least(1, 3)
    attention: Backend = "auto"
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    accumulate: int = _at_least(1, 1)
    activation_checkpointing: bool = False
    device: str = _option("a device", bool, "auto")
    deterministic: bool = False
    tensorboard: bool = True
    wandb: str | None = _option("a project's name", bool, None)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        limit = values["nonfinite_limit"]
        if values["on_nonfinite"] == "stop" and limit != cls.nonfinite_limit:
            return [f"nonfinite_limit (={limit}) has no effect if on_nonfinite is stop"]
        return []


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Section):
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
    dir: str | None = _option("a path or a URL", bool, None)
    every: int | None = _at_least(1, None)
    keep: int = _at_least(1, 2)
    keep_every: int | None = _at_least(1, None)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        every, keep_every = values["every"], values["keep_every"]
        if every is None or keep_every is None or keep_every % every == 0:
            return []
        return [f"keep_every (={keep_every}) must be a multiple of every (={every})"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Section):
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

    every: int | None = _at_least(1, None)
    samples: int = _at_least(16, 256)
    probe: Literal["none", "knn", "linear"] = "none"
    probe_samples: int = _at_least(32, 2048)
    label: str | None = None
    shards: str | None = _option("a path", bool, None)

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


SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "evaluate": EvaluateConfig,
}
"""Key in YAML -> schema. A new section needs an entry here and a field of ``Config``."""


def between_sections(optim: OptimConfig, train: TrainConfig) -> list[str]:
    """Return problems between sections that are valid alone."""
    length = optim.stretch * train.epochs
    if optim.warmup_epochs < length:
        return []
    planned = f"train.epochs (={train.epochs})"
    if optim.stretch != 1:
        planned = f"optim.stretch times train.epochs (={length})"
    return [f"optim.warmup_epochs (={optim.warmup_epochs!r}) must be below {planned}"]


def plain(value: Any) -> Any:
    """Return a copy of a value as YAML has it, with tuples as lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
