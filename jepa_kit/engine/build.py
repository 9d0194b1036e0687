"""From a config to everything that a run is made of: data, model, optimiser, schedule, first weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from jepa_kit.build import build_masker, build_recipe, every_problem
from jepa_kit.config import Config, located
from jepa_kit.config.sections import TrainConfig
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.remote.fetch import Access
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.identity import brief, identity
from jepa_kit.data.transforms import View, build_view
from jepa_kit.distributed.collectives import World, broadcast_from_rank0, joined, run_on_all_ranks
from jepa_kit.encoders.blocks import checkpoint_activations, compile_blocks
from jepa_kit.engine.checkpoint.dcp import layout, load_sharded
from jepa_kit.engine.checkpoint.files import reading
from jepa_kit.engine.checkpoint.format import check_finite, check_state, load_checkpoint, restore, step_of, verify
from jepa_kit.engine.checkpoint.manager import Store, Where
from jepa_kit.engine.checkpoint.resume import advice, check_resumable, note_of_start
from jepa_kit.engine.checkpoint.state_dict import local_part, state_of
from jepa_kit.engine.consistency import check_same, flatten
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.parallel import parallelize
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.workers import set_workers
from jepa_kit.errors import CheckpointError
from jepa_kit.interfaces import Encoder
from jepa_kit.interop.start import ORIGIN, Start, init_from, resume_official
from jepa_kit.precision import resolve_precision
from jepa_kit.recipe import JEPA
from jepa_kit.trials.contract import check_parts


@dataclass(frozen=True, eq=False)
class Run:
    """All that a run is made of; see ``build_run``."""

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
    """Return what tells data sets apart, wherever they lie; see jepa_kit/data/shards/identity.py."""
    return identity(dataset.shards)


def open_shards(config: Config, shards: str | Sequence[str] | None = None) -> ShardDataset:
    """The training samples of a config, or other shards that are reached in the same way."""
    data = config.data
    shards = data.shards if shards is None else shards
    assert shards is not None
    access = Access(
        cache=data.cache, cache_gb=data.cache_gb, retries=data.retries, backoff=data.backoff, timeout=data.timeout
    )
    return ShardDataset(shards, access=access)


def open_together(config: Config, shards: str | Sequence[str] | None = None) -> ShardDataset:
    """As ``open_shards``, for all ranks: rank 0 is the first, so that one process makes an index that is missing.

    Raises:
        ValueError: what ``ShardDataset`` refuses, or ranks that open different samples; on every rank.
    """
    if not joined():
        return open_shards(config, shards)
    broadcast_from_rank0(lambda: len(open_shards(config, shards)))
    dataset = run_on_all_ranks(lambda: open_shards(config, shards))
    check_same(flatten({"data.shards" if shards is None else "shards": brief(data_identity(dataset))}))
    return dataset


def training_view(config: Config) -> View:
    """What is done to a training image of a config.

    Raises:
        ConfigError: what transforms and parts refuse, a line each; those of transforms begin with ``data``.
    """
    data = config.data
    with every_problem(config), located("data"):
        return build_view(data.view, image_size=data.image_size, decoder=data.decoder, max_pixels=data.max_pixels)


def check_shares(settings: TrainConfig, processes: int) -> None:
    """Raises ValueError where a batch cannot be shared by processes, and by the parts of each."""
    if settings.batch_size % (processes * settings.accumulate):
        raise ValueError(
            f"train.batch_size (={settings.batch_size}) must be divisible by the number of processes (={processes}) "
            f"times train.accumulate (={settings.accumulate})"
        )


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
    dataset = open_together(config)
    settings, optim = config.train, config.optim
    loader = TrainLoader(
        dataset=dataset,
        masker=build_masker(config),
        batch_size=settings.batch_size,
        view=training_view(config),
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
        shuffle_window=config.data.shuffle_window,
        pin_memory=device.type == "cuda",
    )
    set_workers(loader, config.data.num_workers, device)
    steps_per_epoch = settings.steps_per_epoch or loader.steps_per_epoch
    torch.manual_seed(settings.seed)
    jepa = build_recipe(config).to(device).train()
    run_on_all_ranks(lambda: check_parts(config, device, weights_of=jepa))
    compile_blocks(jepa, device, cast(Encoder, jepa.encoder).embed_dim)
    if settings.activation_checkpointing:
        checkpoint_activations(jepa.encoder)
        checkpoint_activations(jepa.predictor)
    check_shares(settings, world.size)
    every = settings.checkpoint_every or steps_per_epoch
    if settings.keep_every is not None and settings.keep_every % every:
        raise ValueError(
            f"train.keep_every (={settings.keep_every}) must be a multiple of the steps between two checkpoints "
            f"(={every}, {'an epoch' if settings.checkpoint_every is None else 'train.checkpoint_every'})"
        )
    forward = parallelize(jepa, device, settings.parallel, settings.accumulate)
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
        forward=forward,
        optimizer=build_optimizer(jepa, betas=optim.betas, eps=optim.eps),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
    )


def resume_run(run: Run, store: Store, latest: Where) -> Start:
    """Gives the run the state of a checkpoint of its own, a file or shards; all ranks must call it.

    Raises:
        CheckpointError: it is damaged, then the message says which one is not; or it is not of this run.
        RemoteError: it lies elsewhere, and did not come.
    """
    path = broadcast_from_rank0(lambda: store.local(latest))
    try:
        alone = (0, 1) if run.world.is_main else None
        share = (run.world.rank, run.world.size) if path.is_dir() else alone  # shards: each reads some of them
        run_on_all_ranks(lambda: None if share is None else verify(path, rank=share[0], size=share[1]))
        checkpoint = load_checkpoint(path, verified=True, with_state=not path.is_dir())
    except CheckpointError as error:
        told = str(error).replace(str(path), str(latest))  # where it lies, and not where it was fetched to
        raise CheckpointError(f"{told}; {broadcast_from_rank0(lambda: advice(store, latest))}") from error
    precision = checkpoint.config["train"]["precision"]
    config = resolve_precision(run.config, run.device, precision)
    notes = check_resumable(checkpoint, config.to_dict(), data_identity(run.dataset))
    if checkpoint.step != step_of(path) or checkpoint.step > run.schedule.steps:
        raise CheckpointError(
            f"{latest} holds step {checkpoint.step}, which is not that of its name, or is after the run's last "
            f"(={run.schedule.steps}); {broadcast_from_rank0(lambda: advice(store, latest))}"
        )
    if path.is_dir():
        with reading(path):
            check_state(run.jepa.state_dict(), layout(path)[0], "the model")
            load_sharded(path, run.jepa, run.optimizer)
    else:
        restore(checkpoint, run.jepa, run.optimizer)
    run_on_all_ranks(lambda: _check_finite(run, str(latest)))  # and all have read it
    broadcast_from_rank0(store.forget)
    origin: dict[str, Any] = {key: checkpoint.origin[key] for key in ORIGIN if key in checkpoint.origin}
    return Start(checkpoint.step, origin, [*notes, f"resumed at step {checkpoint.step:,}"], precision)


def _check_finite(run: Run, what: str) -> None:
    """Raise CheckpointError if weights or moments, as far as this process has them, are NaN or infinite."""
    model, optimizer = state_of(run.jepa, run.optimizer)
    check_finite({name: local_part(x) for name, x in model.items()}, what)
    for name, state in optimizer.items():
        check_finite({key: local_part(x) for key, x in state.items()}, f"the optimiser's state for {name} of {what}")


def start_from(run: Run, store: Store, latest: Where | None, resume_from: str | None = None) -> Start:
    """Gives the run its weights: of its own checkpoint, of a released one, of ``train.init_from``, or the first ones.

    Raises:
        CheckpointError: a file that cannot be read, or does not fit.
        FileNotFoundError: there is no such file.
        ValueError: ``resume_from`` is neither a checkpoint of the run nor what it began from.
    """
    if latest is not None:
        start = resume_run(run, store, latest)
        if resume_from is not None and not store.owns(resume_from):
            start.lines.append(broadcast_from_rank0(lambda: note_of_start(store, resume_from, start.origin)))
        aside = broadcast_from_rank0(lambda: store.set_aside(latest))
        return start._replace(lines=[*start.lines, *(f"set aside: {name}" for name in aside)])
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
