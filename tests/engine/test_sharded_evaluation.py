"""FSDP: networks that are called by themselves before the first step, as an evaluation after a skipped batch does."""

import math
import os
from pathlib import Path

import pytest
import torch
from parallel_cases import Training, batch, launch

from jepa_kit.distributed.collectives import World, process_group
from jepa_kit.engine import step as update
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.nonfinite.policy import read_record
from jepa_kit.training import train


def spoil_step(bad, rank):
    """Put a NaN into rank 1's images of a step, whenever it is run."""
    seed, normalize, now = update.seed_torch, update.normalize, []

    def seed_torch(of_run, step, of_rank):
        now[:] = [step]
        seed(of_run, step, of_rank)

    def spoilt(images, mean, std):
        images = normalize(images, mean, std)
        if rank == 1 and now == [bad]:
            images[0] = math.nan
        return images

    update.seed_torch, update.normalize = seed_torch, spoilt


def one_rank(world, config, bad):
    with process_group(world, torch.device("cpu")):
        wanted, run = Training(world, "fsdp"), Training(world, "fsdp")
        images = batch(0, World())[0]
        with torch.no_grad():
            for network in (run.jepa.encoder_for("target"), run.jepa.encoder):
                network(images)
        assert torch.equal(run.step(0), wanted.step(0))
    os.environ.update(RANK=str(world.rank), LOCAL_RANK=str(world.rank), WORLD_SIZE=str(world.size))
    spoil_step(bad, world.rank)
    train(config)


@pytest.mark.integration
def test_an_evaluation_after_a_roll_back_to_a_skipped_batch(tiny):
    """The first step after the roll back is the one without its batch, and an evaluation is due at it."""
    config = tiny(
        "train.parallel=fsdp",
        "train.on_nonfinite=rollback",
        "checkpoint.every=2",
        "train.epochs=2",
        "evaluate.every=3",
        "evaluate.samples=16",
        "encoder.drop_path=0.0",
    )
    launch(2, one_rank, config, 2)
    run = Path(config.train.output_dir)
    assert [(bad.step, bad.checkpoint) for bad in read_record(run)] == [(2, 2)]
    lines = {line["step"]: line for line in read_metrics(run)}
    assert sorted(lines) == [0, 1, 2, 3, 4, 5]
    assert "loss" not in lines[2]
    assert math.isfinite(lines[2]["eval/loss"])
    assert math.isfinite(lines[5]["loss"])
