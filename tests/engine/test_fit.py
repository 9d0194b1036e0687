"""Notes at the start of a run: each mistake has one, with what would be right, which then has none."""

import numpy as np
import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.build import build_run
from jepa_kit.engine.fit import notes_on_fit, notes_on_length, notes_on_masks, notes_on_momentum
from jepa_kit.engine.schedules import Schedule
from jepa_kit.from_config import build_masker
from jepa_kit.maskers.block import Block
from jepa_kit.precision import resolve_precision
from jepa_kit.target_updates import EMA


def own_images(*overrides):
    return load_config("own_images_small", overrides)


def length(samples, *overrides):
    config = own_images(*overrides)
    steps = samples // config.train.batch_size
    return list(notes_on_length(config, samples, steps, Schedule.of(config, steps)))


def test_the_first_run_fits_folders_of_2600_images_and_more():
    for samples in (2600, 20_000, 10**6):
        assert length(samples) == []
        config = own_images()
        schedule = Schedule.of(config, samples // 256)
        assert list(notes_on_momentum(schedule, EMA(momentum=(0.996, 1.0)))) == []
    for size, side in ((96, 8), (160, 16), (224, 16)):
        config = own_images(f"data.image_size={size}", f"encoder.patch_size={side}")
        assert list(notes_on_masks(config, build_masker(config))) == []


def test_few_updates_in_an_epoch():
    (note,) = length(900)
    assert note == (
        "train.batch_size (=256) makes 3 updates of 900 images, and leaves out 132 of them in each epoch; "
        "train.batch_size=64 makes 14"
    )
    (note,) = length(768)
    assert note == "train.batch_size (=256) makes 3 updates of 768 images; train.batch_size=64 makes 12"
    assert length(900, "train.batch_size=64") == []


def test_few_updates():
    (note,) = length(2600, "train.epochs=20", "optim.warmup_epochs=1")
    assert note == (
        "the run has 200 updates in train.epochs (=20), and networks learn little in fewer than 300: "
        "train.epochs=30 or more, or a smaller batch"
    )
    assert length(2600, "train.epochs=30", "optim.warmup_epochs=1") == []


def test_a_long_warm_up():
    (note,) = length(10_000, "train.epochs=50")
    assert note == (
        "optim.warmup_epochs (=15) is 30% of the schedule, in which the learning rate is below its peak; a tenth is "
        "optim.warmup_epochs=5"
    )
    assert length(10_000, "train.epochs=50", "optim.warmup_epochs=5") == []


def schedule(steps):
    return Schedule(
        epochs=1, steps_per_epoch=steps, lr=1, start_lr=0, final_lr=0, warmup_epochs=0, weight_decay=(0.0, 0.0)
    )


@pytest.mark.parametrize("steps", [400, 5000])
def test_the_first_weights_of_the_target_encoder(steps):
    """What is left of them, by the update itself: a target of 1 that follows an encoder of 0."""
    for first, last in ((0.996, 1.0), (0.9995, 1.0), (0.98, 0.999)):
        update, target = EMA(momentum=(first, last)), 1.0
        for step in range(steps):
            target *= update.momentum(step / steps)
        notes = list(notes_on_momentum(schedule(steps), update))
        assert bool(notes) == (target > 0.1)
        for note in notes:
            assert f"leaves {target:.0%} of the target encoder's random first weights after {steps:,} updates" in note
            better = note.partition("target_update.momentum='[")[2].partition(",")[0]
            assert list(notes_on_momentum(schedule(steps), EMA(momentum=(float(better), last)))) == []


def test_a_run_that_is_too_short_for_any_momentum():
    (note,) = notes_on_momentum(schedule(10), EMA(momentum=(0.996, 1.0)))
    assert note.endswith("target_update.momentum='[0.9, 1]', or a longer run")


def test_small_grids():
    config = own_images("data.image_size=64")
    assert list(notes_on_masks(config, build_masker(config))) == [
        f"{what} have {mean} patches on average, on a grid of 4 x 4: a smaller encoder.patch_size or a larger "
        "data.image_size gives more"
        for what, mean in (("contexts", "7.6"), ("targets", "3.1"))
    ]


def test_a_masker_with_few_sets_on_its_grid():
    """The largest block of a small grid fits in few places; four quadrants are few on every grid, by design."""
    config = own_images(
        "masker={name: block, target_scale: [0.6, 0.6], target_aspect_ratio: [1, 1]}", "data.image_size=80"
    )
    masker = build_masker(config)
    places = {tuple(cells.tolist()) for cells in masker(np.arange(1000), seed=0, epoch=0).targets.split()}
    (note,) = notes_on_masks(config, masker)
    assert f"masker 'block' draws {len(places)} different target sets for 128 images on a grid of 5 x 5, and " in note
    assert isinstance(masker, Block)
    for name in ("rasterized", "causal", "random"):
        config = own_images(f"masker={{name: {name}}}")
        assert list(notes_on_masks(config, build_masker(config))) == []


def test_all_notes_of_a_run(tiny):

    device = torch.device("cpu")
    run = build_run(resolve_precision(tiny("train.batch_size=5", "optim.warmup_epochs=1.5"), device), World(), device)
    found = [note.partition(" (=")[0].partition(" have ")[0] for note in notes_on_fit(run)]
    assert found == [
        "optim.lr",
        "train.batch_size",
        "the run has 6 updates in train.epochs",
        "optim.warmup_epochs",
        "target_update.momentum",
        "contexts",
        "targets",
    ]
    tied = build_run(tiny("target_update={name: tied}", "train.init_from=null"), World(), device)
    assert not any("momentum" in note for note in notes_on_fit(tied))
