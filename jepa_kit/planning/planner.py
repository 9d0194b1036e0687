"""Plan a run from its config: operations, memory, time, data and network, without the device.

The networks are built on the meta device, and the masker draws masks for the images of one process (the released masker
depends on their number). Time is the operations over an assumed fraction of the device's published peak; the fraction
that a run reaches must be measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from jepa_kit.config import Config
from jepa_kit.encoders.blocks import blocks_of
from jepa_kit.from_config import build_masker, build_recipe, patch_grid_of
from jepa_kit.planning.device_specs import Device
from jepa_kit.planning.flops import Lengths, ModelFlops, flops_of, model_flops
from jepa_kit.planning.memory import (
    FLOAT32,
    Memory,
    has_memory_formula,
    kept_by_an_image,
    parameter_counts,
    training_memory,
)
from jepa_kit.precision import precision_of, with_precision
from jepa_kit.recipe import Recipe
from jepa_kit.rng import IntArray
from jepa_kit.trials.contract import check_parts

DRAWN = 512
"""Least number of images whose masks are drawn, in whole parts of the batch."""

SHARD_BYTES = 256e6
"""Size of a shard: many fit on a node, and one is read in seconds."""


@dataclass(frozen=True)
class Workload:
    """The part of a plan that does not depend on the device.

    Args:
        parameters: number of parameters of each network.
        gflop_per_image: of a forward pass of encoder, target encoder and predictor if they have a formula, and of a
            training step.
        context, targets, sequences: mean number of patches of a set.
        samples: images of the data set.
        steps: of the run.
        images: processed in the run.
        flop: of the run.
    """

    parameters: dict[str, int]
    gflop_per_image: dict[str, float]
    context: float
    targets: float
    sequences: float
    samples: int
    steps: int
    images: int
    flop: float


@dataclass(frozen=True)
class Plan:
    """Needs of a run on a number of devices.

    Args:
        gpus: number of devices, one process each.
        precision: of matrix products; ``train.precision``, or the precision that ``auto`` means on the device.
        images_per_gpu: per step.
        memory: name of (parallelism, checkpointing) -> part -> bytes.
        measured: activations are those of a trial, without temporary values, as a network has no formula.
        fits: the same names -> whether a device has that memory.
        step_seconds, images_per_second: at the assumed fraction of the peak.
        hours: of the run.
        gpu_hours: sum over all devices.
        read_mb_per_second: encoded images, over all nodes.
        decode_cores: CPU cores for decoding and cropping, over all nodes; None if no time per image is given.
        network_gb_per_second: out of each device, averaged over the step, with DDP and FSDP.
    """

    gpus: int
    precision: str
    images_per_gpu: int
    workload: Workload
    memory: dict[str, dict[str, float]]
    measured: bool
    fits: dict[str, bool]
    step_seconds: float
    images_per_second: float
    hours: float
    gpu_hours: float
    read_mb_per_second: float
    decode_cores: float | None
    network_gb_per_second: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions of a plan.

    Args:
        device: of each process.
        peak_share: fraction of its published peak that the run reaches, in (0, 1].
        samples: images of the data set.
        bytes_per_image: size of an encoded image; 110 kB is ImageNet-1k's mean (138 GB, 1.28 M images).
        decode_ms: milliseconds of one core per image, or None.

    Raises:
        ValueError: a value is outside its range.
    """

    device: Device
    peak_share: float = 0.4
    samples: int
    bytes_per_image: float = 110e3
    decode_ms: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.peak_share <= 1:
            raise ValueError(f"peak_share (={self.peak_share}) must be above 0 and at most 1")
        for name in ("samples", "bytes_per_image", "decode_ms"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} (={value}) must be above 0 and finite")


def plan_run(config: Config, gpus: Sequence[int], assumptions: Assumptions) -> list[Plan]:
    """Return one plan for each number of devices.

    Raises:
        ValueError: a number is below 1, the batch is not divisible by devices and parts or is larger than the data set,
            or the device does not have the precision.
    """
    # As precision.py resolves ``auto`` on such a device.
    if config.train.precision == "auto":
        config = with_precision(config, "float32" if assumptions.device.bf16_tflops is None else "bf16")
    with torch.device("meta"):
        jepa = build_recipe(config)
    flops, host = model_flops(jepa), torch.device("cpu")
    if not flops.has_formula:
        check_parts(config, host)
        flops = flops_of(config, jepa, host)
    kept = None if has_memory_formula(jepa) else _measured_activations(config, jepa)
    return [_plan(config, jepa, flops, n, assumptions, kept) for n in gpus]


def _measured_activations(config: Config, jepa: Recipe) -> dict[bool, float]:
    """Return the bytes that an image keeps, without and, if the recipe has blocks, with checkpoints."""
    precision = precision_of(config)
    return {
        again: kept_by_an_image(config, precision=precision, checkpointing=again)
        for again in (False, True)
        if not again or blocks_of(jepa)
    }


def _plan(
    config: Config,
    jepa: Recipe,
    flops: ModelFlops,
    gpus: int,
    given: Assumptions,
    kept: Mapping[bool, float] | None,
) -> Plan:
    batch = config.train.batch_size
    if gpus < 1:
        raise ValueError(f"gpus (={gpus}) must be at least 1")
    for parts, name in ((1, ""), (config.train.accumulate, f" times train.accumulate (={config.train.accumulate})")):
        if batch % (gpus * parts):
            raise ValueError(f"train.batch_size (={batch}) must be divisible by gpus (={gpus}){name}")
    part = batch // gpus
    lengths = draw_lengths(config, part)
    work = _workload(config, jepa, flops, lengths, given.samples)
    memory = _memory(config, jepa, lengths, part, gpus, kept)
    total = batch * work.gflop_per_image["training step"] * 1e9
    precision = precision_of(config)
    seconds = total / (gpus * given.device.peak(precision) * 1e12 * given.peak_share)
    hours = work.steps * seconds / 3600
    return Plan(
        gpus=gpus,
        precision=precision,
        images_per_gpu=part,
        workload=work,
        memory={name: {**asdict(m), "total": m.total} for name, m in memory.items()},
        measured=kept is not None,
        fits={name: m.total < 1e9 * given.device.memory_gb for name, m in memory.items()},
        step_seconds=seconds,
        images_per_second=batch / seconds,
        hours=hours,
        gpu_hours=gpus * hours,
        read_mb_per_second=batch / seconds * given.bytes_per_image / 1e6,
        decode_cores=None if given.decode_ms is None else batch / seconds * given.decode_ms / 1e3,
        network_gb_per_second=_network(jepa, gpus, seconds),
    )


def training_flop_per_image(config: Config) -> float:
    """Return the FLOP of a training step of a config per image, with masks as one process draws them for the batch.

    Raises:
        ConfigError: a part refuses its options.
    """
    with torch.device("meta"):
        jepa = build_recipe(config)
    lengths = draw_lengths(config, config.train.batch_size)
    training = flops_of(config, jepa, torch.device("cpu")).training(lengths)
    assert training is not None  # counted if there is no formula
    return training / lengths.images


def draw_lengths(config: Config, part: int) -> Lengths:
    """Return lengths of the masks of at least ``DRAWN`` images, drawn by a process with ``part`` images per step.

    Without a masker, contexts are whole images, and there are no targets.
    """
    if "masker" not in config.slots:
        (h, w), none = patch_grid_of(config), np.empty(0, dtype=np.int64)
        return Lengths(np.full(part, h * w), none, none, part, h * w)
    masker = build_masker(config)
    steps = max(1, -(-DRAWN // part))
    samples = np.arange(steps * part).reshape(steps, part)
    drawn = [masker(samples[step], seed=config.train.seed, epoch=0, step=step) for step in range(steps)]
    each = [Lengths.of(masks, part) for masks in drawn]
    context, targets, sequences = (
        np.concatenate([getattr(x, name) for x in each]) for name in ("context", "targets", "sequences")
    )
    return Lengths(context, targets, sequences, steps * part, each[0].patches)


def _workload(config: Config, jepa: Recipe, flops: ModelFlops, lengths: Lengths, samples: int) -> Workload:
    training = flops.training(lengths)
    assert training is not None  # counted if there is no formula
    parts = dict(zip(("encoder", "target encoder", "predictor"), flops.forward(lengths), strict=True))
    per_image = {name: value / lengths.images / 1e9 for name, value in parts.items() if value is not None}
    batch = config.train.batch_size
    per_epoch = config.train.steps_per_epoch or samples // batch
    if per_epoch < 1:
        raise ValueError(f"train.batch_size (={batch}) must be at most the data set's {samples} samples")
    steps = config.train.epochs * per_epoch
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in jepa.named_children()}
    return Workload(
        parameters={name: count for name, count in counts.items() if count},
        gflop_per_image={**per_image, "training step": training / lengths.images / 1e9},
        context=_mean(lengths.context),
        targets=_mean(lengths.targets),
        sequences=_mean(lengths.sequences),
        samples=samples,
        steps=steps,
        images=steps * batch,
        flop=steps * batch * training / lengths.images,
    )


def _mean(lengths: IntArray) -> float:
    return float(lengths.mean()) if lengths.size else 0.0


def _memory(
    config: Config, jepa: Recipe, lengths: Lengths, part: int, gpus: int, kept: Mapping[bool, float] | None
) -> dict[str, Memory]:
    at_once = -(-part // config.train.accumulate)
    # Memory depends on the sums alone.
    sums = (x.sum() for x in (lengths.context, lengths.targets, lengths.sequences))
    context, targets, sequences = (np.array([round(at_once / lengths.images * x)]) for x in sums)
    scaled = Lengths(context, targets, sequences, at_once, lengths.patches)
    needed = partial(
        training_memory,
        jepa,
        scaled,
        precision=precision_of(config),
        accumulate=config.train.accumulate,
        optimizer_states=2 if config.optim.name == "adamw" else 1,
    )
    shards = {"DDP": 1, "FSDP": gpus} if gpus > 1 else {"one process": 1}
    return {
        name + (", checkpointed" if again else ""): needed(
            shards=n, checkpointing=again, kept_per_image=None if kept is None else kept[again]
        )
        for name, n in shards.items()
        for again in ((False, True) if kept is None else kept)
    }


def _network(jepa: Recipe, gpus: int, seconds: float) -> dict[str, float]:
    """Return GB/s out of each device: in a ring, (N - 1) / N of each tensor per gather or scatter, in float32."""
    if gpus == 1:
        return {}
    trained, target = parameter_counts(jepa)
    once = FLOAT32 * (gpus - 1) / gpus / seconds / 1e9
    # DDP scatters and gathers gradients. FSDP gathers weights in both passes and those of the target encoder in the
    # forward pass, and scatters gradients.
    return {"DDP": 2 * trained * once, "FSDP": (3 * trained + target) * once}


def describe(plan: Plan, given: Assumptions) -> str:
    """Return a plan as text."""
    work = plan.workload
    counts = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:.1f} M" for name, count in work.parameters.items())
    flop = ", ".join(f"{name} {value:.1f}" for name, value in work.gflop_per_image.items() if name != "training step")
    data = work.samples * given.bytes_per_image
    lines = [
        f"{plan.gpus} x {given.device.name}, {plan.images_per_gpu} images each, at {given.peak_share:.0%} of "
        f"{given.device.peak(plan.precision):,.4g} TFLOP/s ({plan.precision})",
        f"parameters   {counts}",
        f"masks        context {work.context:.1f} patches, target {work.targets:.1f}, sequence {work.sequences:.1f}"
        if work.targets
        else "masks        none: the recipe sees whole views",
        f"an image     {work.gflop_per_image['training step']:.1f} GFLOP to train"
        + (f"; forward: {flop}" if flop else " (counted, as these networks have no formula)"),
        f"the run      {work.steps:,} steps, {work.images:,} images, {work.flop:.3g} FLOP",
        f"time         {plan.step_seconds:.3g} s a step, {plan.images_per_second:,.0f} images/s, "
        f"{plan.hours:,.1f} hours, {_rate(plan.gpu_hours)} GPU hours",
        f"data         {data / 1e9:,.0f} GB in {max(1, round(data / SHARD_BYTES)):,} shards of "
        f"{SHARD_BYTES / 1e6:.0f} MB; {plan.read_mb_per_second:,.0f} MB/s to read"
        + (f", {plan.decode_cores:,.0f} cores to decode" if plan.decode_cores is not None else ""),
    ]
    if plan.network_gb_per_second:
        speeds = ", ".join(f"{name} {_rate(value)} GB/s" for name, value in plan.network_gb_per_second.items())
        lines.append(f"network      out of each GPU, spread over the step: {speeds}")
    return "\n".join([*lines, *_memory_table(plan, given)])


SHORT = {"optimizer": "optimiser", "target_encoder": "target", "activations": "kept"}
"""Parts of ``Memory`` -> headings of their columns; others have their own name."""


def _memory_table(plan: Plan, given: Assumptions) -> list[str]:
    width = max(len(name) for name in plan.memory)
    parts = next(iter(plan.memory.values()))
    rows = [f"memory, GB   {'':{width}} " + " ".join(f"{SHORT.get(part, part):>9}" for part in parts)]
    for name, values in plan.memory.items():
        cells = " ".join(f"{value / 1e9:9.2f}" for value in values.values())
        fits = "fits" if plan.fits[name] else f"above {given.device.memory_gb:.0f}"
        rows.append(f"             {name:{width}} {cells}  {fits}")
    note = "values kept are those of a trial on this machine, as there is no formula; temporary values are left out"
    return [*rows, f"             {note}"] if plan.measured else rows


def table(plans: Sequence[Plan]) -> str:
    """Return a table of plans, one line each."""
    head = ("GPUs", "images each", "s/step", "images/s", "hours", "GPU hours", "MB/s", "GB/s DDP", "GB/s FSDP", "fits")
    rows: list[tuple[str, ...]] = [head]
    for p in plans:
        network = [_rate(p.network_gb_per_second.get(name, 0.0)) for name in ("DDP", "FSDP")]
        times = f"{p.images_per_second:,.0f}", f"{p.hours:,.1f}", _rate(p.gpu_hours), f"{p.read_mb_per_second:,.0f}"
        fits = [name for name, fits in p.fits.items() if fits]
        fits += ["nothing: train.accumulate"]
        rows.append((f"{p.gpus}", f"{p.images_per_gpu}", f"{p.step_seconds:.3g}", *times, *network, fits[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
