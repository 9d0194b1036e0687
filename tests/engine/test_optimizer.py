import copy
import re

import pytest
import torch
from torch import nn

from jepa_kit.config.sections import GroupConfig
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.optimizer import build_optimizer, clip_gradients, is_decayed, parameter_groups
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.training import train


class Toy(nn.Module):
    """Names and shapes as a JEPA has them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.predictor = nn.Linear(4, 3)
        self.predictor.mask_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.loss = nn.Linear(2, 2)
        self.encoder_head = nn.Linear(2, 2)  # begins like the encoder, but is not of it
        self.target_encoder = nn.Linear(3, 4).requires_grad_(False)


def names(group):
    return [name for name, _ in group["params"]]


def test_groups_of_the_release():
    first, second, third, fourth = parameter_groups(Toy())
    assert names(first) == ["encoder.0.weight"]
    assert names(second) == ["predictor.weight", "predictor.mask_token", "loss.weight", "encoder_head.weight"]
    assert names(third) == ["encoder.0.bias", "encoder.1.weight", "encoder.1.bias"]
    assert names(fourth) == ["predictor.bias", "loss.bias", "encoder_head.bias"]
    assert [group["decayed"] for group in (first, second, third, fourth)] == [True, True, False, False]


def test_every_trained_parameter_once_and_no_other():
    model = Toy()
    grouped = [name for group in parameter_groups(model) for name in names(group)]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_empty_groups_are_left_out():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2, bias=False), "predictor": nn.LayerNorm(2)})
    assert [names(group) for group in parameter_groups(model)] == [
        ["encoder.weight"],
        ["predictor.weight", "predictor.bias"],
    ]


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("encoder.blocks.0.attn.qkv.weight", (6, 2), True),
        ("predictor.mask_token", (1, 1, 2), True),
        ("encoder.norm.weight", (2,), False),
        ("encoder.scale", (), False),
        ("encoder.relative_position_bias", (4, 4), False),
        ("encoder.unbiased.weight", (4, 4), True),
    ],
)
def test_is_decayed(name, shape, decayed):
    assert is_decayed(name, torch.zeros(shape)) is decayed


def test_nothing_to_train():
    with pytest.raises(ValueError, match="the model has no parameter that requires a gradient: there is nothing to"):
        build_optimizer(Toy().requires_grad_(False))


def test_adamw_equals_its_equations():
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "predictor": nn.Linear(2, 2)}).double()
    optimizer = build_optimizer(model, betas=(0.8, 0.95), eps=1e-6)
    state = {name: [p.detach().clone(), 0.0, 0.0] for name, p in model.named_parameters()}
    for t in range(1, 4):
        hyper = Hyper(lr=0.1 / t, weight_decay=0.2 * t, momentum=1.0)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            theta, m, v = state[name]
            theta = theta * (1 - hyper.lr * (hyper.weight_decay if name.endswith("weight") else 0.0))
            m, v = 0.8 * m + 0.2 * p.grad, 0.95 * v + 0.05 * p.grad**2
            theta = theta - hyper.lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
            state[name] = [theta, m, v]
        set_hyper(optimizer, hyper)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), state[name][0], rtol=0, atol=1e-14)


def test_bit_reproducible():
    def run():
        torch.manual_seed(0)
        model = nn.ModuleDict({"encoder": nn.Linear(64, 64), "predictor": nn.Linear(64, 64)})
        optimizer = build_optimizer(model)
        set_hyper(optimizer, Hyper(lr=0.1, weight_decay=0.2, momentum=1.0))
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def steps_of(optimizer, model, count=4):
    torch.manual_seed(1)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fused_is_the_plain_loop_within_rounding():
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"encoder": nn.Linear(32, 16), "predictor": nn.Linear(16, 8)})
        optimizer = build_optimizer(model)
        assert all(group["fused"] for group in optimizer.param_groups)  # where torch offers it, as on this CPU
        set_hyper(optimizer, Hyper(lr=1e-2, weight_decay=0.2, momentum=1.0))
        for group in optimizer.param_groups:
            group.update(fused=fused, foreach=False)
        ends.append(steps_of(optimizer, model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("largest", [None, 1.0, 1e3])
def test_gradients_are_clipped_by_the_norm_of_all(largest):
    model = Toy()
    trained = [p for p in model.parameters() if p.requires_grad]
    for number, p in enumerate(trained[:-1]):  # one has no gradient
        p.grad = torch.full_like(p, number + 1.0)
    before = [p.grad.clone() for p in trained[:-1]]
    norm = torch.cat([g.flatten() for g in before]).double().norm()
    assert clip_gradients(model, largest).item() == pytest.approx(norm.item(), rel=1e-6)
    scale = min(1.0, (largest or float("inf")) / norm.item())
    for p, old in zip(trained[:-1], before, strict=True):
        torch.testing.assert_close(p.grad, old * scale, rtol=1e-6, atol=1e-7)
    assert trained[-1].grad is None


def test_gradients_may_be_clipped_one_by_one():
    """Against torch's function for each parameter alone, as DINO's released code does it."""
    ours, theirs = Toy(), Toy()
    for model in (ours, theirs):
        for number, p in enumerate([p for p in model.parameters() if p.requires_grad][:-1]):
            p.grad = torch.full_like(p, number + 0.1)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    for p in theirs.parameters():
        if p.grad is not None:
            nn.utils.clip_grad_norm_(p, 0.5)
    assert clip_gradients(ours, 0.5, each=True).item() == pytest.approx(wanted.item(), rel=1e-6)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if other.grad is None:
            assert own.grad is None
        else:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=0)


def test_a_parameter_may_be_excepted_from_decay():
    model = Toy()
    model.predictor.mask_token.no_decay = True
    first, second, third, fourth = parameter_groups(model)
    assert names(second) == ["predictor.weight", "loss.weight", "encoder_head.weight"]
    assert names(fourth)[:2] == ["predictor.bias", "predictor.mask_token"]
    assert [group["decayed"] for group in (first, second, third, fourth)] == [True, True, False, False]


RULES = (
    GroupConfig(match="encoder.0.*", lr=0.2),
    GroupConfig(match="encoder.?.*", weight_decay=0.1),
    GroupConfig(match="loss.*", lr=0.5, weight_decay=0.0),
)


def test_groups_with_factors_of_their_own():
    """The first rule that matches counts; a factor of the weight decay applies to biases and scales too."""
    groups = parameter_groups(Toy(), RULES)
    assert [(names(g), g["decayed"], g.get("lr_scale"), g.get("decay_scale")) for g in groups] == [
        (["predictor.weight", "predictor.mask_token", "encoder_head.weight"], True, None, None),
        (["predictor.bias", "encoder_head.bias"], False, None, None),
        (["encoder.0.weight"], True, 0.2, 1.0),
        (["encoder.0.bias"], False, 0.2, 1.0),
        (["encoder.1.weight", "encoder.1.bias"], True, 1.0, 0.1),
        (["loss.weight", "loss.bias"], False, 0.5, 0.0),
    ]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_factors_are_those_of_separate_optimisers(name):
    """Each group moves as if an optimiser of its own had its learning rate and weight decay, in float64."""

    def gradients(model, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)

    torch.manual_seed(0)
    ours = nn.ModuleDict({"encoder": nn.Linear(3, 2), "predictor": nn.Linear(2, 2)}).double()
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer(ours, name=name, rules=(GroupConfig(match="predictor.*", lr=0.5, weight_decay=0.1),))
    parts = [build_optimizer(part, name=name) for part in theirs.values()]
    for group in parts[1].param_groups:
        group["decayed"] = True  # the bias too
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        set_hyper(optimizer, Hyper(lr=0.1, weight_decay=0.2, momentum=1.0))
        for part, hyper in zip(parts, (Hyper(0.1, 0.2, 1.0), Hyper(0.05, 0.02, 1.0)), strict=True):
            set_hyper(part, hyper)
            part.step()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


@pytest.mark.parametrize("match", ["target_encoder.*", "loss", "encoder.0.weight"])
def test_a_rule_that_matches_nothing(match):
    message = (
        rf"optim.groups\[3\].match \(='{re.escape(match)}'\) must match a trained parameter that no entry before it "
        r"matches; there are encoder.0.\*, encoder.1.\*, predictor.weight"
    )
    with pytest.raises(ValueError, match=message):
        parameter_groups(Toy(), (*RULES, GroupConfig(match=match, lr=2.0)))


def test_a_run_with_groups_resumes_bit_for_bit(tiny, tmp_path):
    groups = (
        "optim.groups=[{match: encoder.patch_embed.*, lr: 0.2}, {match: '*norm*', weight_decay: 0.1}]",
        "checkpoint.every=2",
        "checkpoint.keep=9",
    )
    plain = load_checkpoint(train(tiny(f"train.output_dir={tmp_path / 'plain'}")))
    whole = load_checkpoint(train(tiny(*groups, f"train.output_dir={tmp_path / 'whole'}")))
    folder = train(tiny(*groups))
    for step in (4, 6):
        (folder / f"checkpoint_{step:08d}.pt").unlink()
    assert train(tiny(*groups), resume=True) == folder
    ours = load_checkpoint(folder)
    torch.testing.assert_close((ours.model, ours.optimizer), (whole.model, whole.optimizer), rtol=0, atol=0)
    assert not torch.equal(ours.model["encoder.norm.weight"], plain.model["encoder.norm.weight"])
