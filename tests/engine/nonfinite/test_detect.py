"""Bad numbers as the device sees them: nothing is updated, and every rank can tell."""

import math

import pytest
import torch
from torch import nn

from jepa_kit.engine.nonfinite.detect import Watch, propagate_nonfinite, step_if_finite
from jepa_kit.engine.optimizer import build_optimizer, clip_gradients
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.structures import Update

HYPER = Hyper(lr=0.1, weight_decay=0.1, momentum=1.0)


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(2, 3), "predictor": nn.Linear(3, 2)})


def update(model, optimizer, images, scale=1.0):
    set_hyper(optimizer, HYPER)
    loss = scale * model["predictor"](model["encoder"](images)).square().mean()
    propagate_nonfinite(loss).backward()
    grad_norm = clip_gradients(model, None)
    step_if_finite(optimizer, grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def state(model, optimizer):
    moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
    return [v.clone() for v in model.state_dict().values()] + moments


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_makes_every_gradient_nan(scale):
    model = make_model()
    (
        propagate_nonfinite(torch.tensor(scale) * model["predictor"](model["encoder"](torch.ones(1, 2))).mean())
    ).backward()
    assert all(p.grad.isnan().all() for p in model.parameters())


def test_a_loss_that_is_infinite_where_its_gradient_is_finite():
    x = torch.tensor([3e38, 3e38], requires_grad=True)
    loss = x.sum()  # its gradient is 1
    assert loss.item() == math.inf
    propagate_nonfinite(loss).backward()
    assert x.grad.isnan().all()


def test_a_finite_loss_keeps_its_gradient_bit_for_bit():
    gradients = []
    for around in (lambda loss: loss, propagate_nonfinite):
        model = make_model()
        around(model["predictor"](model["encoder"](torch.ones(3, 2))).square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_bad_update_is_not_taken():
    model = make_model()
    optimizer = build_optimizer(model)
    images = torch.randn(4, 2)
    update(model, optimizer, images)
    before = state(model, optimizer)
    _, norm = update(model, optimizer, torch.tensor([[math.nan, 1.0]]))
    assert norm.isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))

    other = make_model()
    other_optimizer = build_optimizer(other)
    update(other, other_optimizer, images)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # goes on as if the bad one had never been
        update(m, o, images)
    assert all(torch.equal(a, b) for a, b in zip(state(model, optimizer), state(other, other_optimizer), strict=True))


def test_a_finite_update_is_that_of_adamw_alone():
    model, plain = make_model(), make_model()
    optimizer, plain_optimizer = build_optimizer(model), build_optimizer(plain)
    images = torch.randn(4, 2)
    for _ in range(3):
        update(model, optimizer, images)
        set_hyper(plain_optimizer, HYPER)
        plain["predictor"](plain["encoder"](images)).square().mean().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(state(model, optimizer), state(plain, plain_optimizer), strict=True))


def test_the_watch_looks_later():
    watch = Watch(lag=2)

    def add(step, norm):
        out = Update(torch.tensor(1.0), {"l2": torch.tensor(1.0)}, grad_norm=torch.tensor(norm))
        watch.add(step, HYPER, None, out)

    add(0, math.nan)
    assert list(watch.found()) == []
    add(1, 1.0)
    assert list(watch.found()) == []
    add(2, math.inf)
    found = list(watch.found())
    assert [s.step for s in found] == [0]
    assert found[0].terms == ("l2",)
    assert [s.step for s in watch.found(flush=True)] == [2]
    assert not watch.waiting
