import json
import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper, Schedule, set_hyper

RELEASED = json.loads((Path(__file__).parents[1] / "fixtures" / "released_schedules.json").read_text())


def make_schedule(**changes):
    values = {
        "epochs": 3,
        "steps_per_epoch": 10,
        "lr": 1e-3,
        "start_lr": 2e-4,
        "final_lr": 1e-6,
        "warmup_epochs": 1,
        "weight_decay": (0.04, 0.4),
        "momentum": lambda where: 0.996 + where * (1.0 - 0.996),
    }
    return Schedule(**{**values, **changes})


@pytest.mark.parametrize("row", RELEASED["steps"], ids=lambda row: str(row["step"]))
def test_equal_to_the_released_run(row):
    first, last = RELEASED["ema"]
    schedule = Schedule(
        epochs=RELEASED["epochs"],
        steps_per_epoch=RELEASED["iterations_per_epoch"],
        lr=RELEASED["lr"],
        start_lr=RELEASED["start_lr"],
        final_lr=RELEASED["final_lr"],
        warmup_epochs=RELEASED["warmup_epochs"],
        weight_decay=(RELEASED["weight_decay"], RELEASED["final_weight_decay"]),
        momentum=lambda where: first + where * (last - first),
        stretch=RELEASED["ipe_scale"],
    )
    hyper = schedule(row["step"])
    assert hyper.lr == pytest.approx(row["lr"], rel=0, abs=1e-12)
    assert hyper.weight_decay == pytest.approx(row["weight_decay"], rel=0, abs=1e-12)
    assert hyper.momentum == pytest.approx(row["momentum"], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "lr", "weight_decay", "momentum"),
    [
        (0, 0.00028000000000000003, 0.040986058833710814, 0.996),
        (8, 0.00092, 0.11419865458735484, 0.9970666666666667),
        (9, 0.001, 0.13, 0.9972),
        (10, 0.0009938503261272714, 0.14678740424635595, 0.9973333333333333),
        (28, 7.149673872728739e-06, 0.3990139411662892, 0.9997333333333334),
        (29, 1e-06, 0.4, 0.9998666666666667),
    ],
)
def test_equal_to_the_released_short_run(step, lr, weight_decay, momentum):
    # 3 epochs of 10 steps, trained by the released code
    assert astuple(make_schedule()(step)) == pytest.approx((lr, weight_decay, momentum), rel=0, abs=1e-12)


def plain_rule(step, *, epochs, per_epoch, warmup_epochs, stretch):
    """The released rules, written as they are told: counts and lengths, no shares of the whole."""
    total = int(stretch * epochs * per_epoch)
    warmup = int(warmup_epochs * per_epoch)
    count = step + 1
    if count < warmup:
        lr = 2e-4 + count / warmup * (1e-3 - 2e-4)
    else:
        lr = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (count - warmup) / max(1, total - warmup)))
    weight_decay = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * count / total))
    momentum = 0.996 + step * (1.0 - 0.996) / (per_epoch * epochs * stretch)  # this length is not rounded
    return lr, weight_decay, momentum


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "warmup_epochs", "stretch"),
    [(3, 10, 0, 1.0), (3, 10, 1, 1.25), (3, 7, 0.5, 1.07), (1, 1, 0, 1.0), (1, 5, 1, 1.0), (2, 5, 3, 1.0)],
    ids=["no warm-up", "stretched", "broken lengths", "one step", "warm-up only", "warm-up cut short"],
)
def test_every_step_of_other_schedules(epochs, per_epoch, warmup_epochs, stretch):
    schedule = make_schedule(epochs=epochs, steps_per_epoch=per_epoch, warmup_epochs=warmup_epochs, stretch=stretch)
    assert schedule.steps == epochs * per_epoch
    for step in range(schedule.steps):
        want = plain_rule(step, epochs=epochs, per_epoch=per_epoch, warmup_epochs=warmup_epochs, stretch=stretch)
        assert astuple(schedule(step)) == pytest.approx(want, rel=0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5, 10])
@pytest.mark.parametrize("counting", ["from_0", "both_ends"])
def test_counting_of_other_methods(counting, warmup):
    """MAE: epochs so far, as a number with a fraction; DINO: a line with both ends, then a cosine without its end."""
    schedule = make_schedule(warmup_epochs=warmup / 10, counting=counting)
    rise = np.linspace(2e-4, 1e-3, warmup, endpoint=counting == "both_ends")
    fall = 1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi * np.arange(30 - warmup) / (30 - warmup))) / 2
    decay = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(30) / 30)) / 2
    for step, values in enumerate(zip(np.concatenate([rise, fall]), decay, strict=True)):
        hyper = schedule(step)
        assert (hyper.lr, hyper.weight_decay) == pytest.approx(values, rel=0, abs=1e-15)


def test_a_stretched_schedule_ends_before_its_end():
    assert make_schedule(stretch=1.25)(29).lr > 1e-4
    assert make_schedule()(29).lr == pytest.approx(1e-6, abs=1e-15)


def test_a_stretched_length_is_rounded_in_the_releases_order():
    """1.15 x 10 x 10 updates are 115, where 1.15 x 100 are 114."""
    schedule = make_schedule(epochs=10, steps_per_epoch=10, stretch=1.15)
    expected = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * 51 / 115))
    assert schedule(50).weight_decay == pytest.approx(expected, rel=0, abs=1e-12)


def test_without_momentum_nothing_moves():
    assert make_schedule(momentum=None)(29).momentum == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs \(=0\) must be at least 1"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch \(=0\) must be at least 1"),
        ({"stretch": 0.5}, r"stretch \(=0.5\) must be at least 1"),
        ({"lr": -1.0}, r"lr \(=-1.0\) must be at least 0"),
        ({"final_lr": math.nan}, r"final_lr \(=nan\) must be at least 0"),
        ({"weight_decay": (0.1, -0.1)}, r"weight_decay\[1\] \(=-0.1\) must be at least 0"),
        ({"warmup_epochs": -1}, r"warmup_epochs \(=-1\) must be at least 0"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**changes)


@pytest.mark.parametrize("step", [-1, 30])
def test_a_step_outside_the_run(step):
    with pytest.raises(ValueError, match=rf"step \(={step}\) must be from 0 to 29: the run has 30 updates"):
        make_schedule()(step)


def test_set_hyper_leaves_undecayed_groups_undecayed():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "predictor": torch.nn.Linear(2, 2)})
    optimizer = build_optimizer(model)
    set_hyper(optimizer, Hyper(lr=0.5, weight_decay=0.25, momentum=0.0))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0, 0.0]
