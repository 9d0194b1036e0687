"""Target updates against their formula in float64, over the whole registry."""

from __future__ import annotations

import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler
from torch import nn

from jepa_kit.registry import TARGET_UPDATES
from jepa_kit.target_updates import EMA, Frozen, NoTargetEncoder, Tied


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def move(encoder: nn.Module) -> None:
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p))


def values(module: nn.Module) -> list[list[float]]:
    return [p.flatten().tolist() for p in module.parameters()]


@pytest.mark.parametrize("name", TARGET_UPDATES.names())
def test_a_target_encoder_begins_as_a_copy_that_no_optimiser_trains(name: str) -> None:
    encoder, update = make_encoder(), TARGET_UPDATES.build(name, {})
    target = update.make(encoder)
    if target is None:
        assert name in ("tied", "none")
        return
    assert values(target) == values(encoder)
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    ours = {p.data_ptr() for p in encoder.parameters()}
    assert not ours & {p.data_ptr() for p in target.parameters()}


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_ema_is_the_moving_average(momentum: float) -> None:
    encoder, update = make_encoder(), EMA()
    target = update.make(encoder)
    for _ in range(3):
        move(encoder)
        before = values(target)
        update.update(target, encoder, momentum)
        for ours, old, new in zip(values(target), before, values(encoder), strict=True):
            expected = [momentum * a + (1.0 - momentum) * b for a, b in zip(old, new, strict=True)]
            assert ours == pytest.approx(expected, rel=1e-15, abs=1e-15)


def test_ema_copies_buffers_as_torch_does_by_default() -> None:
    """torch.optim.swa_utils.AveragedModel, without use_buffers; tables that no state dict has are left alone."""
    encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    encoder.register_buffer("table", torch.zeros(2), persistent=False)
    target = EMA().make(encoder).eval()
    theirs = torch.optim.swa_utils.AveragedModel(encoder, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new)
    theirs.update_parameters(encoder)  # the first is a copy
    for _ in range(3):
        encoder(torch.randn(8, 3) + 2)
        move(encoder)
        encoder.table += 1
        EMA().update(target, encoder, 0.9)
        theirs.update_parameters(encoder)
    torch.testing.assert_close(target.state_dict(), theirs.module.state_dict())
    assert target[0].num_batches_tracked == 3
    assert target.table.tolist() == [0, 0]
    frozen = Frozen()
    target = frozen.make(encoder)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    encoder(torch.randn(8, 3))
    frozen.update(target, encoder, 0.0)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_ema_of_equal_weights_stays_equal() -> None:
    """In float32, m and 1 - m do not add up to 1: m * target + (1 - m) * encoder leaves them, a little each time."""
    encoder, update = make_encoder().float(), EMA()
    target = update.make(encoder)
    product = [p.detach().clone() for p in encoder.parameters()]
    for _ in range(500):
        update.update(target, encoder, 0.9999)
        for p, q in zip(product, encoder.parameters(), strict=True):
            p.mul_(0.9999).add_(q.detach(), alpha=1 - 0.9999)
    assert values(target) == values(encoder)
    assert [p.flatten().tolist() for p in product] != values(encoder)


def test_ema_leaves_the_encoder_and_its_graph_alone() -> None:
    encoder, update = make_encoder(), EMA()
    target = update.make(encoder)
    before = values(encoder)
    loss = encoder(torch.ones(1, 3, dtype=torch.float64)).sum()
    update.update(target, encoder, 0.5)
    loss.backward()
    assert values(encoder) == before
    assert all(p.grad is None and p.grad_fn is None and not p.requires_grad for p in target.parameters())


def test_ema_momentum_is_linear_in_the_share_of_the_run() -> None:
    update = EMA(momentum=(0.99, 0.999))
    assert [update.momentum(w) for w in (0.0, 0.5, 1.0)] == pytest.approx([0.99, 0.9945, 0.999], rel=1e-15)
    assert EMA().momentum(0.25) == pytest.approx(0.997, rel=1e-15)


@pytest.mark.parametrize("until", [1.0, 0.3])
@pytest.mark.parametrize(("schedule", "theirs"), [("linear", LinearParamScheduler), ("cosine", CosineParamScheduler)])
def test_ema_momentum_is_fvcores_schedule(schedule: str, theirs: type, until: float) -> None:
    update = EMA(momentum=(0.99, 0.999), schedule=schedule, until=until)
    wanted = theirs(0.99, 0.999)
    for where in (0.0, 0.1, 0.25, 0.3, 0.8, 1.0):
        assert update.momentum(where) == pytest.approx(wanted(min(1.0, where / until)), rel=1e-15)
    assert update.momentum(until) == update.momentum(1.0) == 0.999


@pytest.mark.parametrize("until", [0.0, -0.1, 1.5, float("nan")])
def test_ema_refuses_an_end_outside_of_training(until: float) -> None:
    with pytest.raises(ValueError, match=r"until \(=.*\) must be a fraction of training, above 0 and at most 1"):
        EMA(until=until)


@pytest.mark.parametrize("momentum", [(1.1, 1.0), (0.9, -0.1), (0.9, float("nan"))])
def test_ema_refuses_a_momentum_outside_its_range(momentum: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"momentum \(=\(.*\)\) must be two numbers in \[0, 1\]"):
        EMA(momentum=momentum)


def test_frozen_never_moves() -> None:
    encoder, update = make_encoder(), Frozen()
    target = update.make(encoder)
    first = values(target)
    for momentum in (0.0, 0.5, 1.0):
        move(encoder)
        update.update(target, encoder, momentum)
    assert values(target) == first
    assert values(encoder) != first


@pytest.mark.parametrize("update", [Tied(), NoTargetEncoder()], ids=["tied", "none"])
def test_tied_and_none_make_nothing_and_change_nothing(update: Tied | NoTargetEncoder) -> None:
    encoder = make_encoder()
    before = values(encoder)
    assert update.make(encoder) is None
    update.update(None, encoder, 0.0)
    assert values(encoder) == before
    assert update.tied is isinstance(update, Tied)


def test_only_tied_may_let_the_gradient_through() -> None:
    assert not Tied(stop_gradient=False).stop_gradient
    for name in TARGET_UPDATES.names():
        assert TARGET_UPDATES.build(name, {}).stop_gradient


@pytest.mark.parametrize("name", [n for n in TARGET_UPDATES.names() if n != "ema"])
def test_updates_without_momentum_say_one(name: str) -> None:
    assert {TARGET_UPDATES.build(name, {}).momentum(w) for w in (0.0, 0.3, 1.0)} == {1.0}
