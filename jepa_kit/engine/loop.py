"""The training loop: from a config to a run folder.

    train(config) -> build_run -> run_steps -> train_step -> JEPA.forward

A run folder holds ``config.yaml`` (resolved), ``run.json`` (where and what), ``metrics.jsonl``, the latest
``checkpoint_<step>.pt`` and, at the end, ``curves.png``.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jepa_kit.config import Config, versions
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards import ShardDataset
from jepa_kit.data.transforms import normalize
from jepa_kit.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_resumable,
    load_checkpoint,
    optimizer_state,
    plan_resume,
    restore,
    save_checkpoint,
)
from jepa_kit.engine.distributed import (
    World,
    barrier,
    choose_device,
    from_main,
    process_group,
    read_environment,
    wrap,
)
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.engine.telemetry import Journal, Meter, plot_curves
from jepa_kit.interop.start import Start, init_from, resume_official
from jepa_kit.recipe import JEPA, build_masker, build_recipe
from jepa_kit.rng import Stream, generator


def train(config: Config, *, resume: bool = False, resume_from: str | None = None) -> Path:
    """Trains a config, in this process or, under torchrun, in all of its processes.

    Args:
        config: checked.
        resume: go on with the run in ``train.output_dir``; the policy is in checkpoint.py.
        resume_from: a released checkpoint to go on from, while the run folder holds none of its own.

    Returns:
        the run folder.

    Raises:
        ValueError: the config does not fit the data, the machine or the run in the folder.
        StartError: the processes could not join.
        FloatingPointError: loss or weights are no longer finite.
    """
    world = read_environment()
    device = choose_device(config.train.device, world)
    with process_group(world, device):
        folder = Path(config.train.output_dir)
        latest = from_main(lambda: plan_resume(folder, resume or resume_from is not None))
        run = build_run(config, world, device)
        start = start_from(run, latest, resume_from)
        from_main(lambda: announce(run, folder, start, resume))
        run_steps(run, folder, start)
        if world.is_main:
            plot_curves(folder)
            print(f"done: {folder}", flush=True)
        barrier()
    return folder


@dataclass(frozen=True, eq=False)
class Run:
    """A run before its first step; see ``build_run``."""

    config: Config
    world: World
    device: torch.device
    dataset: ShardDataset
    loader: TrainLoader
    jepa: JEPA
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    steps_per_epoch: int


def data_identity(dataset: ShardDataset) -> dict[str, Any]:
    """What tells data sets apart, wherever they lie: their length, and a digest of the sizes of their shards."""
    text = json.dumps([[shard["file"], shard["samples"], shard["bytes"]] for shard in dataset.shards])
    return {"samples": len(dataset), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def build_run(config: Config, world: World, device: torch.device) -> Run:
    """Everything that a config is made of, with first weights that are a function of ``train.seed``.

    Raises:
        ValueError: no data set, or one of less than a batch; a batch that the processes cannot share; what a part
            refuses.
    """
    if config.data.shards is None:
        raise ValueError(
            "data.shards (=None) must name a folder of shards to train; tools/make_shards.py makes one from a folder "
            "of images, an archive, or synthetic:scenes"
        )
    shards = config.data.shards
    from_main(lambda: len(ShardDataset(shards)))  # shards from elsewhere get their index, by one process
    dataset = ShardDataset(shards)
    settings, optim = config.train, config.optim
    loader = TrainLoader(
        dataset=dataset,
        masker=build_masker(config),
        batch_size=settings.batch_size,
        image_size=config.data.image_size,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
        crop_scale=config.data.crop_scale,
        crop_ratio=config.data.crop_ratio,
        flip=config.data.flip,
        shuffle_window=config.data.shuffle_window,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    steps_per_epoch = settings.steps_per_epoch or loader.steps_per_epoch
    torch.manual_seed(settings.seed)
    jepa = build_recipe(config).to(device).train()
    schedule = Schedule(
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        lr=optim.lr,
        start_lr=optim.start_lr,
        final_lr=optim.final_lr,
        warmup_epochs=optim.warmup_epochs,
        weight_decay=optim.weight_decay,
        momentum=jepa.momentum,
        stretch=optim.stretch,
    )
    return Run(
        config=config,
        world=world,
        device=device,
        dataset=dataset,
        loader=loader,
        jepa=jepa,
        forward=wrap(jepa, device),
        optimizer=build_optimizer(jepa, betas=optim.betas, eps=optim.eps),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
    )


def start_from(run: Run, latest: Path | None, resume_from: str | None = None) -> Start:
    """Gives the run its weights: of its own checkpoint, of a released one, of ``train.init_from``, or the first ones.

    Raises:
        CheckpointError: a file that cannot be read, or does not fit.
        FileNotFoundError: there is no such file.
    """
    if latest is not None:
        checkpoint = load_checkpoint(latest)
        check_resumable(checkpoint, run.config.to_dict(), data_identity(run.dataset))
        restore(checkpoint, run.jepa, run.optimizer)
        origin: dict[str, Any] = {
            key: checkpoint.origin[key] for key in ("source", "licence") if key in checkpoint.origin
        }
        return Start(checkpoint.step, origin, [f"resumed at step {checkpoint.step:,}"])
    if resume_from is not None:
        start = resume_official(run.jepa, run.optimizer, resume_from, run.steps_per_epoch)
        if start.step >= run.schedule.steps:
            raise CheckpointError(
                f"{resume_from} is at step {start.step}, and a run of train.epochs (={run.config.train.epochs}) ends "
                f"at step {run.schedule.steps}: there is nothing left to do"
            )
        return start
    if run.config.train.init_from is not None:
        return init_from(run.jepa, run.config.train.init_from)
    return Start(0, {}, [])


def announce(run: Run, folder: Path, start: Start, resume: bool) -> None:
    """Prints and saves what runs where: ``config.yaml`` and ``run.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    run.config.save(folder)
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in run.jepa.named_children()}
    facts = {
        "versions": versions(),
        "device": str(run.device.type),
        "gpu": gpu,
        "world_size": run.world.size,
        "data": data_identity(run.dataset),
        "parameters": {name: count for name, count in parameters.items() if count},
        "steps": run.schedule.steps,
        "steps_per_epoch": run.steps_per_epoch,
        "first_step": start.step,
        "origin": start.origin,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    counts = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if count)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"device: {gpu or 'CPU'}, {run.world.size} process{'es' if run.world.size > 1 else ''}")
    if run.device.type == "cuda" and run.world.size < torch.cuda.device_count():
        print(f"note: {torch.cuda.device_count()} GPUs are here; torchrun --nproc-per-node N uses N of them")
    print(f"data: {len(run.dataset):,} samples, {run.config.data.shards}")
    print(f"parameters: {counts}")
    print(f"steps: {run.schedule.steps:,} ({run.config.train.epochs} epochs of {run.steps_per_epoch:,})")
    for line in start.lines:
        print(line)
    if resume and not start.step:
        print(f"nothing to resume: {folder} holds no checkpoint; starting at step 0")
    print(f"run folder: {folder}", flush=True)


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Makes torch's random numbers (stochastic depth, dropout) a function of seed, step and rank."""
    torch.manual_seed(int(generator(Stream.STEP, seed=seed, epoch=step, lane=rank).integers(2**63)))


def run_steps(run: Run, folder: Path, start: Start) -> None:
    """All steps from the start's to the last, with lines and checkpoints.

    Raises:
        FloatingPointError: loss or weights are no longer finite; no checkpoint is written after it.
    """
    settings, first, last = run.config.train, start.step, run.schedule.steps - 1
    every = settings.checkpoint_every or run.steps_per_epoch
    autocast: Any = nullcontext
    if settings.precision == "bf16":
        autocast = partial(torch.autocast, run.device.type, torch.bfloat16)
    meter = Meter(world=run.world, batch_size=settings.batch_size, steps_per_epoch=run.steps_per_epoch)
    journal = Journal(folder, first_step=first, steps=run.schedule.steps) if run.world.is_main else None
    with journal or nullcontext():
        batches = run.loader.batches(first)
        for step in range(first, run.schedule.steps):
            with meter.waiting():
                _, batch = next(batches)
            batch = batch.to(run.device, non_blocking=True)
            assert batch.masks is not None  # the loader has a masker
            images = normalize(batch.images, run.config.data.mean, run.config.data.std)
            seed_torch(settings.seed, step, run.world.rank)
            hyper = run.schedule(step)
            out = train_step(
                run.jepa,
                run.optimizer,
                hyper,
                images,
                batch.masks,
                forward=run.forward,
                autocast=autocast,
                clip_grad=run.config.optim.clip_grad,
            )
            meter.count(batch.masks)
            saving = (step + 1) % every == 0 or step == last
            if saving or step % settings.log_every == 0:
                record = meter.record(step, hyper, out, batch.masks)
                if journal:
                    journal.write(record)
            if journal:
                journal.advance()
            if saving:
                with meter.pausing():
                    from_main(partial(save, run, folder, step + 1, start.origin))


def save(run: Run, folder: Path, step: int, origin: dict[str, Any]) -> None:
    """Writes the checkpoint of ``step`` updates; ``origin`` is where the run's weights came from.

    Raises:
        FloatingPointError: weights are not finite, so that nothing could go on from them.
    """
    model = run.jepa.state_dict()
    broken = [name for name, value in model.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(model)} weights are not finite after {step} steps, first {broken[0]}: "
            "the run has diverged, and no checkpoint is written"
        )
    checkpoint = Checkpoint(
        step=step,
        model=model,
        optimizer=optimizer_state(run.optimizer),
        config=run.config.to_dict(),
        versions=versions(),
        data=data_identity(run.dataset),
        origin=origin,
    )
    save_checkpoint(folder, checkpoint, keep=run.config.train.keep_checkpoints)
