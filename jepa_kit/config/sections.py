"""The sections of a config that are not parts: data, optim, train.

Their fields are checked by the same code as the options of a part; ranges are checked when one is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jepa_kit.config.errors import ConfigError

Range = Callable[[Any], bool]


def _option(right: str, holds: Range, default: Any = dataclasses.MISSING) -> Any:
    """A field whose value must be ``right`` (words), which ``holds`` tells (None is always allowed)."""
    return field(default=default, metadata={"right": right, "holds": holds})


def _finite(low: float, *, strict: bool = False) -> Range:
    return lambda x: math.isfinite(x) and (x > low if strict else x >= low)


def _above_0(default: Any) -> Any:
    return _option("above 0", _finite(0, strict=True), default)


def _at_least(low: int, default: Any) -> Any:
    return _option(f"at least {low}", _finite(low), default)


def range_problem(section: type, name: str, value: Any) -> str | None:
    """What is wrong with a field's value of the right type: 'lr (=0.0) must be above 0', or None."""
    checks = section.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    if value is None or not checks or checks["holds"](value):
        return None
    return f"{name} (={value!r}) must be {checks['right']}"


class _Section:
    """Checks the ranges of a dataclass when one is made; reports all at once."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        problems = [p for k, v in values.items() if (p := range_problem(type(self), k, v))]
        if problems := problems or self.relations(values):
            raise ConfigError(problems)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong between fields whose own values are right."""
        return []


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Which images, and what is done to them before the encoder.

    Args:
        image_size: (height, width) in pixels; in YAML one number means a square.
        shards: folder of shards; needed to train, not to build.
        crop_scale: (least, most) share of the image's area that a random crop keeps.
        crop_ratio: (least, most) width over height of a random crop.
        flip: probability of a horizontal flip.
        mean, std: of the channels, for pixel values in [0, 1]; ImageNet's.
        shuffle_window: samples that are shuffled together.
        num_workers: loader processes of each rank.
        label: name of the label that a sample carries, or None.

    Raises:
        ConfigError: a value outside its range.
    """

    image_size: tuple[int, int] = _option("at least 1 pixel each way", lambda x: min(x) >= 1)
    shards: str | None = None
    crop_scale: tuple[float, float] = _option("ascending, in (0, 1]", lambda x: 0 < x[0] <= x[1] <= 1, (0.3, 1.0))
    crop_ratio: tuple[float, float] = _option(
        "ascending, above 0", lambda x: 0 < x[0] <= x[1] < math.inf, (3 / 4, 4 / 3)
    )
    flip: float = _option("in [0, 1]", lambda x: 0 <= x <= 1, 0.0)
    mean: tuple[float, float, float] = _option("finite", lambda x: all(map(math.isfinite, x)), (0.485, 0.456, 0.406))
    std: tuple[float, float, float] = _option(
        "above 0 each", lambda x: all(0 < v < math.inf for v in x), (0.229, 0.224, 0.225)
    )
    shuffle_window: int = _at_least(1, 16384)
    num_workers: int = _at_least(0, 2)
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Section):
    """AdamW and its schedules; the defaults are the release's.

    Args:
        lr: learning rate at the end of the warm-up.
        start_lr: learning rate at its start.
        final_lr: learning rate at the end of the cosine.
        warmup_epochs: length of the linear warm-up.
        weight_decay: (first, last) of its cosine.
        betas: AdamW's.
        eps: AdamW's.
        clip_grad: largest norm of all gradients together, or None for no clipping.
        stretch: the schedules are laid out for so many times the run's length (the release's ``ipe_scale``).

    Raises:
        ConfigError: a value outside its range.
    """

    lr: float = _above_0(1e-3)
    start_lr: float = _at_least(0, 2e-4)
    final_lr: float = _at_least(0, 1e-6)
    warmup_epochs: float = _at_least(0, 40.0)
    weight_decay: tuple[float, float] = _option(
        "at least 0 each", lambda x: all(0 <= v < math.inf for v in x), (0.04, 0.4)
    )
    betas: tuple[float, float] = _option("in [0, 1) each", lambda x: all(0 <= v < 1 for v in x), (0.9, 0.999))
    eps: float = _above_0(1e-8)
    clip_grad: float | None = _above_0(None)
    stretch: float = _at_least(1, 1.0)

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        lr = values["lr"]
        return [
            f"{name} (={values[name]!r}) must not be above lr (={lr!r})"
            for name in ("start_lr", "final_lr")
            if values[name] > lr
        ]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """The run.

    Args:
        batch_size: images of one update, over all ranks.
        epochs: length of the run.
        steps_per_epoch: updates of an epoch; None for as many as the data give.
        precision: of the matrix products; weights and optimiser are float32 either way.
        seed: of everything random, 0 to 2**63 - 1.
        output_dir: the run folder.
        init_from: weights to start from, in any format that ``jepa_kit.interop`` reads; None for fresh ones.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints; None for one each epoch.
        keep_checkpoints: how many of the latest checkpoints stay.
        attention: backend of ``attend``.
        device: torch's name of the device; "auto" takes CUDA where there is one.

    Raises:
        ConfigError: a value outside its range.
    """

    batch_size: int = _at_least(1, 2048)
    epochs: int = _at_least(1, 300)
    steps_per_epoch: int | None = _at_least(1, None)
    precision: Literal["float32", "bf16"] = "bf16"
    seed: int = _option("from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63, 0)
    output_dir: str = _option("a path", bool, "output")
    init_from: str | None = _option("a path or an address", bool, None)
    log_every: int = _at_least(1, 10)
    checkpoint_every: int | None = _at_least(1, None)
    keep_checkpoints: int = _at_least(1, 2)
    attention: Literal["auto", "xformers", "sdpa", "reference"] = "auto"
    device: str = _option("a device", bool, "auto")


SECTIONS: dict[str, type[Any]] = {"data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
"""Key in YAML -> its schema. A new section is an entry here and a field of ``Config``."""


def between_sections(optim: OptimConfig, train: TrainConfig) -> list[str]:
    """What is wrong between sections that are right alone."""
    length = optim.stretch * train.epochs
    if optim.warmup_epochs < length:
        return []
    planned = f"train.epochs (={train.epochs})"
    if optim.stretch != 1:
        planned = f"optim.stretch times train.epochs (={length})"
    return [f"optim.warmup_epochs (={optim.warmup_epochs!r}) must be below {planned}"]
