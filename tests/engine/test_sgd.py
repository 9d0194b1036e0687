"""SGD against torch's own, LARS against three steps of released code, and both with bad numbers."""

import math

import pytest
import sgd_cases
import torch
from torch import nn

from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.nonfinite.detect import step_if_finite
from jepa_kit.engine.optimizer import build_optimizer, clip_gradients
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.engine.sgd import TRUST, norms_of
from jepa_kit.training import train
from jepa_kit.trials.recorded import Recorded


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(4, 3), "predictor": nn.Linear(3, 2)}).double()


def draw_gradients(model, step, scale=1.0):
    noise = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, dtype=p.dtype, generator=noise)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum):
    ours, theirs = make_model(), make_model()
    optimizer = build_optimizer(ours, name="sgd", momentum=momentum)
    decayed = [{"params": [p for p in theirs.parameters() if (p.ndim > 1) is kind]} for kind in (True, False)]
    plain = torch.optim.SGD(decayed, momentum=momentum)
    for step in range(4):
        hyper = Hyper(lr=0.1 / (1 + step), weight_decay=0.02 * step, momentum=1.0)
        set_hyper(optimizer, hyper)
        for group, decay in zip(plain.param_groups, (hyper.weight_decay, 0.0), strict=True):
            group |= {"lr": hyper.lr, "weight_decay": decay}
        for model in (ours, theirs):
            draw_gradients(model, step)
        step_if_finite(optimizer, clip_gradients(ours))
        plain.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-15)


def test_lars_is_the_released_one(fixtures):
    recorded = Recorded(fixtures / "methods" / "lars")
    meta = recorded.meta
    assert meta["trust_coefficient"] == TRUST
    values = {name: nn.Parameter(value) for name, value in recorded.under("mae/start/").items()}
    model = nn.ParameterDict(values)
    optimizer = build_optimizer(model, name="lars", momentum=meta["momentum"])
    set_hyper(optimizer, Hyper(lr=meta["lr"], weight_decay=meta["weight_decay"], momentum=1.0))
    for step in range(meta["steps"]):
        for name, gradient in recorded.under(f"grad{step}/").items():
            values[name].grad = gradient
        step_if_finite(optimizer, clip_gradients(model))
        torch.testing.assert_close(dict(model.items()), recorded.under(f"mae/after{step}/"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "lars"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_bad_step_changes_nothing(name, first):
    """Also as the very first step."""
    runs = []
    for bad in (True, False):
        model = make_model()
        optimizer = build_optimizer(model, name=name)
        set_hyper(optimizer, Hyper(lr=0.1, weight_decay=0.1, momentum=1.0))
        for step in range(4):
            if bad and step == first:
                draw_gradients(model, 9)
                next(model.parameters()).grad[0, 0] = math.nan
                step_if_finite(optimizer, clip_gradients(model))
            draw_gradients(model, step)
            step_if_finite(optimizer, clip_gradients(model))
        runs.append((model.state_dict(), [state["velocity"] for state in optimizer.state.values()]))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_parameter_without_a_gradient_stays(name):
    model = make_model()
    optimizer = build_optimizer(model, name=name)
    before = model["predictor"].weight.clone()
    set_hyper(optimizer, Hyper(lr=0.1, weight_decay=0.1, momentum=1.0))
    draw_gradients(model, 0)
    model["predictor"].weight.grad = None
    optimizer.step()
    assert torch.equal(model["predictor"].weight, before)
    assert len(optimizer.state) == 3


def test_no_transfer_to_the_host(monkeypatch):
    model = make_model()
    optimizer = build_optimizer(model, name="lars")

    def reads(*_):
        raise AssertionError("a tensor was read on the host")

    draw_gradients(model, 0)
    for method in ("__bool__", "item", "tolist", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, reads)
    step_if_finite(optimizer, clip_gradients(model, 1.0, each=True))


def test_norms():
    tensors = [torch.randn(3, 4), torch.zeros(2), torch.tensor(-2.0)]
    assert norms_of(tensors).tolist() == [pytest.approx(float(x.norm())) for x in tensors]


@pytest.mark.integration
def test_two_processes_step_as_one(ranks):
    ranks(1, sgd_cases.__file__)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_run_resumes_bit_for_bit(tiny, tmp_path, name):
    options = (f"optim.name={name}", "optim.momentum=0.8", "optim.clip_grad=1.0", "optim.clip_each=true")
    whole = train(tiny(*options, f"train.output_dir={tmp_path / 'whole'}"))
    folder = train(tiny(*options, "checkpoint.every=2", "checkpoint.keep=9"))
    for step in (4, 6):
        (folder / f"checkpoint_{step:08d}.pt").unlink()
    assert train(tiny(*options, "checkpoint.every=2", "checkpoint.keep=9"), resume=True) == folder
    ours, theirs = load_checkpoint(folder), load_checkpoint(whole)
    assert {*next(iter(ours.optimizer.values()))} == {"velocity"}
    torch.testing.assert_close((ours.model, ours.optimizer), (theirs.model, theirs.optimizer), rtol=0, atol=0)
