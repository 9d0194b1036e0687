"""From a config to a run: data, model, optimiser, schedule, first weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from jepa_kit.config import Config
from jepa_kit.config.sections import TrainConfig
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.remote.fetch import Access
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import brief, identity
from jepa_kit.data.transforms import build_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.distributed.collectives import World, broadcast_from_rank0, joined, run_on_all_ranks
from jepa_kit.encoders.blocks import checkpoint_activations, compile_blocks
from jepa_kit.engine.consistency import check_same, flatten
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.parallel import parallelize
from jepa_kit.engine.run import Run
from jepa_kit.engine.schedules import Schedule
from jepa_kit.from_config import build_masker, build_recipe, every_problem, patch_grid_of
from jepa_kit.interfaces import Encoder
from jepa_kit.registry import located
from jepa_kit.trials.contract import check_parts


def open_shards(config: Config, shards: str | Sequence[str] | None = None) -> ShardDataset:
    """Return the training samples of a config, or other shards read with the same cache and retries."""
    data = config.data
    shards = data.shards if shards is None else shards
    assert shards is not None
    access = Access(
        cache=data.cache, cache_gb=data.cache_gb, retries=data.retries, backoff=data.backoff, timeout=data.timeout
    )
    return ShardDataset(shards, access=access)


def open_together(config: Config, shards: str | Sequence[str] | None = None) -> ShardDataset:
    """As ``open_shards``, on all ranks: rank 0 first, so that one process writes a missing index.

    Raises:
        ValueError: as ``ShardDataset``, or ranks open different samples; on every rank.
    """
    if not joined():
        return open_shards(config, shards)
    broadcast_from_rank0(lambda: len(open_shards(config, shards)))
    dataset = run_on_all_ranks(lambda: open_shards(config, shards))
    return same_on_all_ranks(dataset, "data.shards" if shards is None else "shards")


def same_on_all_ranks(dataset: ShardDataset, name: str = "dataset") -> ShardDataset:
    """Return the data set; raise ValueError on all ranks if it has other samples on one of them."""
    if joined():
        check_same(flatten({name: brief(identity(dataset.shards))}))
    return dataset


def training_views(config: Config) -> list[ViewMaker]:
    """Return how each view of a config's training images is made; masks are on the grid of the view's own size.

    Raises:
        ConfigError: all errors of transforms and parts, a line each; those of transforms begin with their path.
    """
    data, makers = config.data, []
    with every_problem(config):
        for path, view in data.entries():
            with located(path):
                pipeline = build_pipeline(
                    view.transforms or data.transforms,
                    image_size=view.image_size or data.image_size,
                    decoder=data.decoder,
                    max_pixels=data.max_pixels,
                )
            masked = view.masked and "masker" in config.slots
            grid = patch_grid_of(config, view.image_size) if masked and view.image_size else None
            masker = build_masker(config, grid) if masked else None
            made = ViewMaker(pipeline=pipeline, masker=masker, same_draws=view.same_draws, action=view.action)
            makers += [made] * view.count
    return makers


def check_shares(settings: TrainConfig, processes: int) -> None:
    """Raise ValueError if processes and accumulated parts do not divide the batch."""
    if settings.batch_size % (processes * settings.accumulate):
        raise ValueError(
            f"train.batch_size (={settings.batch_size}) must be divisible by the number of processes (={processes}) "
            f"times train.accumulate (={settings.accumulate})"
        )


def build_run(config: Config, world: World, device: torch.device, dataset: ShardDataset | None = None) -> Run:
    """Return the run of a config; its first weights are a function of ``train.seed``. All ranks must call it.

    Args:
        config: checked.
        world: of this process.
        device: of this process.
        dataset: the training samples, the same on all ranks; None for those of ``data.shards``.

    Raises:
        ValueError: no data set, or fewer samples than a batch; a batch that the processes do not divide; or an error of
            a part.
    """
    if config.data.shards is None and dataset is None:
        raise ValueError(
            "data.shards (=None) must name a folder of images or of shards to train; jepa-shards makes shards "
            "from a folder, an archive, or synthetic:scenes"
        )
    dataset = same_on_all_ranks(dataset) if dataset is not None else open_together(config)
    settings, optim = config.train, config.optim
    torch.manual_seed(settings.seed)
    jepa = build_recipe(config).to(device).train()
    encoder = cast(Encoder, jepa.encoder)
    loader = TrainLoader(
        dataset=dataset,
        batch_size=settings.batch_size,
        views=training_views(config),
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
        shuffle_window=config.data.shuffle_window,
        pin_memory=device.type == "cuda",
    )
    loader.set_workers(config.data.num_workers, device)
    steps_per_epoch = settings.steps_per_epoch or loader.steps_per_epoch
    run_on_all_ranks(lambda: check_parts(config, device, weights_of=jepa))
    compile_blocks(jepa, device, encoder.embed_dim)
    if settings.activation_checkpointing:
        checkpoint_activations(jepa)
    check_shares(settings, world.size)
    every = config.checkpoint.every or steps_per_epoch
    keep_every = config.checkpoint.keep_every
    if keep_every is not None and keep_every % every:
        raise ValueError(
            f"checkpoint.keep_every (={keep_every}) must be a multiple of the steps between two checkpoints "
            f"(={every}, {'an epoch' if config.checkpoint.every is None else 'checkpoint.every'})"
        )
    forward = parallelize(jepa, device, settings.parallel, settings.accumulate)
    return Run(
        config=config,
        world=world,
        device=device,
        dataset=dataset,
        loader=loader,
        jepa=jepa,
        forward=forward,
        optimizer=optimizer_of(jepa, optim),
        schedule=Schedule.of(config, steps_per_epoch, jepa.momentum),
        steps_per_epoch=steps_per_epoch,
    )
