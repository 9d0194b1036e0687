"""The learning rate is compared with the rules for the batch size, if that was changed."""

import math
from pathlib import Path

import pytest

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.config.learning_rate import LearningRate, chosen_rate, note_on_rate, scaled_rates
from jepa_kit.config.shipped import shipped_configs


def note(*overrides, config="ijepa/in1k_vits16"):
    found = load_config(config, overrides)
    return note_on_rate(found.lr_chosen, found.optim, found.train)


def test_the_rules():
    paper = LearningRate(1e-3, 2048)
    assert scaled_rates(paper, 256, "adamw") == pytest.approx((1.25e-4, 1e-3 / math.sqrt(8)))
    assert scaled_rates(paper, 8192, "adamw") == pytest.approx((2e-3, 4e-3))
    assert scaled_rates(paper, 256, "sgd") == pytest.approx((1.25e-4, 1.25e-4))


def test_a_smaller_batch_with_the_rate_of_the_config():
    assert note("train.batch_size=256") == (
        "optim.lr (=0.001) departs from the rules for train.batch_size (=256): the config has 0.001 for 2,048 images, "
        "which gives 0.00013 to 0.00035 (linear and square-root scaling), such as optim.lr=2.1e-04 "
        "optim.start_lr=4.2e-05 (docs/training.md, learning rate and batch size)"
    )


def test_what_the_note_suggests_is_silent():
    assert note("train.batch_size=256", "optim.lr=2.1e-04", "optim.start_lr=4.2e-05") is None
    assert note("train.batch_size=256", "optim.lr=5e-4").startswith("optim.lr (=0.0005) departs ")
    for lr in ("1.25e-4", "3.5e-4"):
        assert note("train.batch_size=256", f"optim.lr={lr}", "optim.start_lr=1e-5") is None


def test_another_rate_at_the_same_batch_size_is_the_users_own_choice():
    assert note("optim.lr=5e-3") is None
    assert note() is None


def test_an_optimiser_with_one_rule():
    raw = {"optim": {"name": "lars", "lr": 4.8, "start_lr": 0}, "train": {"batch_size": 4096}}
    config = load_config("simclr/quick", ["optim.name=sgd", "train.batch_size=1024", "optim.lr=1.0"])
    chosen = chosen_rate([raw])
    assert chosen == LearningRate(4.8, 4096)
    assert "which gives 1.2 (linear scaling), such as optim.lr=1.2e+00" in note_on_rate(
        chosen, config.optim, config.train
    )


def test_the_rate_belongs_to_the_batch_size_where_it_was_set_last(tmp_path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("_BASE_: ijepa/in1k_vits16\noptim: {lr: 5e-4}\ntrain: {batch_size: 512}\n")
    own.write_text(f"_BASE_: {base}\ntrain: {{batch_size: 64}}\n")
    assert load_config(own).lr_chosen == LearningRate(5e-4, 512)
    own.write_text(f"_BASE_: {base}\noptim: {{lr: 1e-4, start_lr: 0}}\ntrain: {{batch_size: 64}}\n")
    assert load_config(own).lr_chosen == LearningRate(1e-4, 64)
    assert chosen_rate([{"train": {"batch_size": 64}}]) == LearningRate(1e-3, 2048)  # the default is the release's


@pytest.mark.parametrize("optim", [None, {"lr": "fast"}, {"lr": None}, {"lr": True}, {"lr": -1}])
def test_what_is_no_rate_is_reported_by_other_checks(optim):
    assert chosen_rate([{"optim": optim}]) is None or optim is None


def test_a_resolved_config_is_what_was_chosen(tmp_path):
    config = load_config("ijepa/in1k_vits16", ["train.batch_size=256"])
    again = config_from_dict(config.to_dict())
    assert again == config
    assert again.lr_chosen == LearningRate(1e-3, 256)


@pytest.mark.parametrize("name", [n for n, f in shipped_configs().items() if Path(f).stem not in ("quick_teacher",)])
def test_no_shipped_config_departs(name):
    config = load_config(name)
    assert note_on_rate(config.lr_chosen, config.optim, config.train) is None
