"""Hooks: when they are called, where their numbers go, and that their time is no training time."""

import time

import pytest

from jepa_kit.engine import train as engine
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.run import due_hooks, run_hooks
from jepa_kit.training import train


class Counting:
    def __init__(self, every, name="own/step", seconds=0.0):
        self.every, self.name, self.seconds, self.steps = every, name, seconds, []

    def __call__(self, run, step):
        self.steps.append(step)
        time.sleep(self.seconds)
        return {self.name: float(step)}


def test_called_every_so_many_steps_and_after_the_last(tiny):
    hook = Counting(4)
    lines = read_metrics(train(tiny("train.log_every=100"), hooks=[lambda run: hook, lambda run: None]))
    assert hook.steps == [3, 5]
    assert {line["step"]: line.get("own/step") for line in lines} == {0: None, 2: None, 3: 3.0, 5: 5.0}


def test_their_time_is_kept_out_of_the_speed(tiny):
    hooks = [lambda run: Counting(1, seconds=3.0)]
    lines = read_metrics(train(tiny("train.epochs=1", "optim.warmup_epochs=0"), hooks=hooks))
    assert lines[-1]["images_per_second"] > 4 / 3.0  # 4 images a step


def test_two_hooks_of_one_name():
    with pytest.raises(ValueError, match="two hooks give own/step for one step: names must be a hook's own"):
        run_hooks([Counting(1), Counting(1)], None, 0)


def test_none_is_due():
    assert due_hooks([Counting(5)], 0, 9) == []


def test_an_evaluation_needs_a_hook(tiny):
    with pytest.raises(ValueError, match=r"evaluate.every \(=2\) needs a hook that evaluates: jepa_kit.training.train"):
        engine.train(tiny("evaluate.every=2"))


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["train.init_from=a.pth"], {}, r"train.init_from \(='a.pth'\) needs `foreign`, which reads such files"),
        ([], {"resume_from": "a.pth"}, r"resume_from \(='a.pth'\) needs `foreign`, which reads such files"),
    ],
)
def test_weights_of_other_formats_need_a_reader(tiny, overrides, options, message):
    with pytest.raises(ValueError, match=message):
        engine.train(tiny(*overrides), **options)
