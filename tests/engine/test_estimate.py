"""The estimate of a step's time: right, and without effect on the run."""

import json
from types import SimpleNamespace

import pytest
import torch

from jepa_kit.distributed.collectives import World
from jepa_kit.engine import estimate
from jepa_kit.engine.build import build_run
from jepa_kit.engine.estimate import Estimate, estimate_step, grow
from jepa_kit.training import train


def test_the_number_of_images_grows_until_they_take_long_enough():
    measured = []

    def measure(count):
        measured.append(count)
        return 0.01 + 0.03 * count

    assert grow(measure, 256) == (64, pytest.approx(0.01 + 0.03 * 256))
    assert measured == [2, 2, 4, 8, 16, 32, 64]  # the first one twice, since its first pass chooses kernels
    measured.clear()
    assert grow(measure, 5) == (5, pytest.approx(0.16))
    assert measured == [2, 2, 4, 5]
    assert grow(lambda count: 12.0 * count, 256) == (2, 12.0 * 256)
    assert grow(lambda count: 2.0 if count == 2 else 1.8, 8) == (4, pytest.approx(1.8 + 4 * 1.8 / 4 / 4))


def test_loading_is_added_or_hidden():
    assert Estimate(compute=2.0, loading=0.5, workers=0, images=8).step == 2.5
    assert Estimate(compute=2.0, loading=3.0, workers=2, images=8).step == 2.0
    assert Estimate(compute=2.0, loading=9.0, workers=3, images=8).step == 3.0
    assert Estimate(compute=2.0, loading=None, workers=3, images=8).step == 2.0


def test_what_people_read():
    assert Estimate(compute=0.2, loading=0.1, workers=0, images=8).describe(12_000) == (
        "time: about 0.3 s a step, 1:00:00 for 12,000 steps without evaluations and checkpoints (forward and backward "
        "0.2 s, 0.1 s of one core to load its images, in the same process; measured on 8 images)"
    )
    assert "about 21 s a step, 0:00:21 for 1 steps without evaluations and checkpoints (forward and backward 21 s;" in (
        Estimate(compute=21.2, loading=None, workers=0, images=2).describe(1)
    )


def test_a_parameter_that_nothing_trains(tiny):
    """The masker hides no patch in place."""
    for option, untrained in (("true", ("encoder.mask_token",)), ("false", ())):
        config = tiny(f"encoder.mask_token={option}", "train.precision=float32")
        found = estimate_step(build_run(config, World(), torch.device("cpu")))
        assert found.untrained == untrained
        note = (
            "\nnote: no gradient reaches 1 parameter, first encoder.mask_token: nothing trains them, and DDP fails in "
            "the second step; leave out the option that makes them"
        )
        assert found.describe(5).endswith(f"measured on 4 images){note if untrained else ''}")


def test_a_step_takes_what_was_estimated(tiny, monkeypatch):
    """With a clock that only a forward pass moves, by 10 ms an image."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(estimate, "time", clock)
    run = build_run(tiny("train.batch_size=20", "train.precision=float32"), World(), torch.device("cpu"))
    forward = type(run.jepa).forward

    def slow(self, *views, **options):
        clock.now += 0.01 * len(views[0])
        return forward(self, *views, **options)

    monkeypatch.setattr(type(run.jepa), "forward", slow)
    found = estimate_step(run)
    assert found.images == 20
    assert found.compute == pytest.approx(0.2)
    assert 0 < found.loading < 0.2


def test_fsdp_has_none(tiny):
    run = build_run(tiny(), World(), torch.device("cpu"))
    sharded = tiny("train.parallel=fsdp")
    assert estimate_step(type(run)(**{**vars(run), "config": sharded})) is None


def test_the_run_is_the_same_without_it(tiny, whole_runs, tmp_path, monkeypatch, capsys):
    first = train(tiny(f"train.output_dir={tmp_path / 'with'}", "encoder.drop_path=0.5"))
    assert "\ntime: about " in capsys.readouterr().out
    monkeypatch.setattr("jepa_kit.engine.train.estimate_step", lambda run: None)
    second = train(tiny(f"train.output_dir={tmp_path / 'without'}", "encoder.drop_path=0.5"))
    assert "\ntime: about " not in capsys.readouterr().out
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (first, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_no_gradient_of_the_copy_is_kept(tiny):
    run = build_run(tiny(), World(), torch.device("cpu"))
    before = {name: value.clone() for name, value in run.jepa.state_dict().items()}
    state = torch.get_rng_state()
    estimate.estimate_step(run)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in run.jepa.state_dict().items())
    assert all(p.grad is None for p in run.jepa.parameters())
