import pytest

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.planning.device_specs import DEVICES
from jepa_kit.planning.planner import Assumptions, plan_run, training_flop_per_image
from jepa_kit.studies.matching import Length, matched_length, own_length, with_length

BASE = Length(epochs=4, steps_per_epoch=126, batch_size=64, flop_per_image=1e8)


@pytest.mark.parametrize("match", ["steps", "images", "flops"])
@pytest.mark.parametrize(("batch", "flop"), [(64, 1e8), (64, 0.37e8), (48, 2.9e8), (256, 1.01e8)])
def test_costs_are_equal_within_a_percent(match, batch, flop):
    arm = Length(epochs=2, steps_per_epoch=500, batch_size=batch, flop_per_image=flop)
    found = matched_length(arm, BASE, match)
    assert found.cost(match) == pytest.approx(BASE.cost(match), rel=0.01)
    assert (found.epochs, found.batch_size, found.flop_per_image) == (arm.epochs, batch, flop)


def test_without_a_match_each_arm_keeps_its_length():
    arm = Length(epochs=7, steps_per_epoch=3, batch_size=8, flop_per_image=5.0)
    assert matched_length(arm, BASE, "none") == arm
    assert (arm.steps, arm.images, arm.flop) == (21, 168, 840.0)


def test_a_cost_that_cannot_be_matched():
    arm = Length(epochs=100, steps_per_epoch=1, batch_size=64, flop_per_image=1e8)
    with pytest.raises(ValueError, match=r"train.epochs \(=100\) of 5 steps cost 7.4 % less steps than the base arm"):
        matched_length(arm, Length(epochs=1, steps_per_epoch=540, batch_size=64, flop_per_image=1e8), "steps")


def test_the_length_of_a_config(tiny):
    config = tiny("train.epochs=3", "train.steps_per_epoch=null")
    assert own_length(config, samples=21, flop_per_image=2.0) == Length(3, 5, 4, 2.0)
    assert own_length(tiny("train.steps_per_epoch=2"), 21, 2.0).steps_per_epoch == 2
    with pytest.raises(ValueError, match=r"train.batch_size \(=4\) must be at most the data set's 3 samples"):
        own_length(config, samples=3, flop_per_image=2.0)
    written = with_length(config, Length(3, 9, 4, 2.0)).train
    assert (written.epochs, written.steps_per_epoch) == (3, 9)


def test_flop_are_those_of_the_plan_of_a_run():
    config = load_config("quickstart", ["train.batch_size=512"])
    given = Assumptions(device=DEVICES["a100"], samples=5120)
    planned = plan_run(config, [1], given)[0].workload.gflop_per_image["training step"]
    assert training_flop_per_image(config) == pytest.approx(1e9 * planned, rel=1e-12)


def test_flop_of_a_recipe_without_a_formula_are_counted(tiny):
    formula = training_flop_per_image(tiny())
    with_token = config_from_dict({**tiny().to_dict(), "encoder": {**tiny().to_dict()["encoder"], "class_token": True}})
    assert training_flop_per_image(with_token) > formula
