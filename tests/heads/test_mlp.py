"""The MLP head against plain stacks of torch's layers, and against the heads of released code."""

import pytest
import torch
from torch import nn

from jepa_kit.heads import MLPHead
from jepa_kit.registry import HEADS
from jepa_kit.trials.recorded import Recorded

IN, HIDDEN, OUT = 6, 8, 4


def batch_norm(width=HIDDEN, **options):
    return nn.BatchNorm1d(width, **options)


STACKS = {
    "simclr": (
        {"norm": "batch", "bias": False, "last_bias": True},
        lambda: (nn.Linear(IN, HIDDEN, bias=False), batch_norm(), nn.ReLU(), nn.Linear(HIDDEN, OUT)),
    ),
    "simclr, with a norm at the end": (
        {"norm": "batch", "last_norm": "batch", "last_bias": False},
        lambda: (nn.Linear(IN, HIDDEN), batch_norm(), nn.ReLU(), nn.Linear(HIDDEN, OUT, bias=False), batch_norm(OUT)),
    ),
    "moco v3, projector": (
        {"layers": 3, "norm": "batch", "last_norm": "batch", "affine": False, "bias": False},
        lambda: (
            *(nn.Linear(IN, HIDDEN, bias=False), batch_norm(), nn.ReLU()),
            *(nn.Linear(HIDDEN, HIDDEN, bias=False), batch_norm(), nn.ReLU()),
            *(nn.Linear(HIDDEN, OUT, bias=False), batch_norm(OUT, affine=False)),
        ),
    ),
    "msn": (
        {"layers": 3, "norm": "batch", "activation": "gelu"},
        lambda: (
            *(nn.Linear(IN, HIDDEN), batch_norm(), nn.GELU()),
            *(nn.Linear(HIDDEN, HIDDEN), batch_norm(), nn.GELU()),
            nn.Linear(HIDDEN, OUT),
        ),
    ),
    "dino": (
        {"layers": 3, "activation": "gelu"},
        lambda: (
            *(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()),
            nn.Linear(HIDDEN, OUT),
        ),
    ),
    "layer norms": (
        {"norm": "layer", "last_norm": "layer", "affine": False},
        lambda: (
            *(nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, OUT), nn.LayerNorm(OUT, elementwise_affine=False)),
        ),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_is_a_stack_of_torchs_layers(name):
    options, stack = STACKS[name]
    torch.manual_seed(0)
    theirs = nn.Sequential(*stack()).double()
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = MLPHead(in_dim=IN, out_dim=OUT, hidden=HIDDEN, **options).double()
    ours.layers.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(7, IN, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.layers.state_dict(), theirs.state_dict(), rtol=0, atol=1e-14)
    assert ours.out_dim == OUT


def test_one_layer_is_linear():
    head = MLPHead(in_dim=IN, out_dim=OUT, layers=1, bias=False)
    assert [*head.state_dict()] == ["layers.0.weight"]
    x = torch.randn(2, 3, IN)
    torch.testing.assert_close(head(x), x @ head.layers[0].weight.T)


def test_the_start_of_weights():
    torch.manual_seed(0)
    head = MLPHead(in_dim=50, hidden=80, out_dim=60, layers=3, init_std=0.02)
    for name, value in head.state_dict().items():
        if name.endswith("bias"):
            assert not value.any()
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.05)
    torch.manual_seed(0)
    first = MLPHead(in_dim=IN, hidden=HIDDEN, out_dim=OUT).layers[0]
    torch.manual_seed(0)
    assert torch.equal(first.weight, nn.Linear(IN, HIDDEN).weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_dim": 0}, r"out_dim \(=0\) must be at least 1"),
        ({"layers": 0}, r"layers \(=0\) must be at least 1"),
        ({"hidden": -1}, r"hidden \(=-1\) must be at least 1"),
        ({"hidden": None}, r"hidden \(=None\) must be the width of the layers between, as there are 2 layers"),
        ({"layers": 1}, r"hidden \(=8\) has no effect if layers is 1"),
        ({"layers": 1, "hidden": None, "norm": "batch"}, r"norm \(='batch'\) has no effect if layers is 1: last_norm"),
        ({"affine": False}, r"affine \(=False\) has no effect if last_norm is none"),
        ({"init_std": 0.0}, r"init_std \(=0.0\) must be above 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        MLPHead(**{"in_dim": IN, "out_dim": OUT, "hidden": HIDDEN, **options})


def test_released_projector_and_predictor(fixtures):
    """MoCo v3's, in training mode."""
    recorded = Recorded(fixtures / "methods" / "moco_v3")
    hidden, width = recorded.meta["mlp_dim"], recorded.meta["dim"]
    options = {"out_dim": width, "hidden": hidden, "norm": "batch", "last_norm": "batch"}
    options |= {"affine": False, "bias": False}
    projector = MLPHead(in_dim=recorded.meta["in_dim"], layers=3, **options).double()
    predictor = MLPHead(in_dim=width, layers=2, **options).double()
    for head, name in ((projector, "projector/"), (predictor, "predictor/")):
        head.layers.load_state_dict(recorded.under(name), strict=True)
    projected = projector(recorded["head/input"])
    torch.testing.assert_close(projected, recorded["head/projected"], rtol=0, atol=1e-13)
    torch.testing.assert_close(predictor(projected), recorded["head/predicted"], rtol=0, atol=1e-13)
    state = projector.layers.state_dict()
    for name, value in recorded.under("after/projector/").items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-14)


def test_a_config_builds_it():
    assert HEADS.get("mlp") is MLPHead
    assert "in_dim" not in HEADS.options("mlp")
