"""The formula against two counters that we did not write: fvcore's (from a trace) and torch's (from what ran)."""

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from jepa_kit.config import config_from_dict
from jepa_kit.encoders import ViT, packed
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.planning import flops as flops_module
from jepa_kit.planning.flops import (
    Lengths,
    count_flops,
    encoder_flops,
    flops_of,
    has_formula,
    model_flops,
    predictor_flops,
)
from jepa_kit.structures import View
from jepa_kit.targets import RepresentationTarget

IMAGES, PIXELS, WIDTH = 3, 3 * 4 * 4, 24


@pytest.fixture(autouse=True)
def no_rows_beside_tokens(monkeypatch):
    """The formula leaves out rows that are filled up."""
    monkeypatch.setattr(packed, "COUNTS", 1 << 30)


def config(masker="multiblock", target=None, update="ema"):
    return config_from_dict(
        {
            "masker": {"name": masker},
            "encoder": {"name": "vit", "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "patch_size": 4},
            "predictor": {"name": "vit", "width": 16, "depth": 2, "num_heads": 2},
            "target": {"name": "representation", **(target or {})},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": update} if isinstance(update, str) else update,
            "data": {"image_size": 32},
            "train": {"attention": "reference"},  # torch's fused backward pass computes some of the forward pass again
        }
    )


def make(tiny):
    torch.manual_seed(0)
    masks = build_masker(tiny)(np.arange(IMAGES), seed=0, epoch=0)
    return build_recipe(tiny), torch.randn(IMAGES, 3, 32, 32), masks, Lengths.of(masks, IMAGES)


class Encode(nn.Module):
    """The part of a recipe that fvcore traces: a function of tensors alone."""

    def __init__(self, encoder, patches):
        super().__init__()
        self.encoder, self.patches = encoder, patches

    def forward(self, images):
        return self.encoder(images, self.patches)


class Predict(nn.Module):
    def __init__(self, predictor, masks):
        super().__init__()
        self.predictor, self.masks = predictor, masks

    def forward(self, tokens):
        return self.predictor(tokens, self.masks)


def fvcore_products(module, inputs):
    """FLOP of matrix products; fvcore counts a multiply-add as one, and counts norms too, which the formula leaves.

    Those of an einsum come out of a text of numpy's with four digits: hence a tolerance.
    """
    counted = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    operators = counted.by_operator()
    assert set(operators) <= {"linear", "addmm", "mm", "bmm", "matmul", "einsum", "layer_norm"}
    return pytest.approx(2 * sum(count for name, count in operators.items() if name != "layer_norm"), rel=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("masker", ["multiblock", "multigroup"])
def test_the_forward_pass_against_fvcore(masker):
    jepa, images, masks, lengths = make(config(masker))
    encoder, predictor = encoder_flops(jepa.encoder), predictor_flops(jepa.predictor)
    with torch.no_grad():
        assert encoder(lengths.context) == fvcore_products(Encode(jepa.encoder, masks.context), images)
        assert encoder(np.full(IMAGES, 64)) == fvcore_products(Encode(jepa.encoder, None), images)
        tokens = jepa.encoder(images, masks.context)
        assert predictor(lengths) == fvcore_products(Predict(jepa.predictor, masks), tokens)


@pytest.mark.parametrize(
    ("target", "update"),
    [
        (None, "ema"),
        ({"masked_at": "input"}, "ema"),
        (None, "tied"),
        (None, {"name": "tied", "stop_gradient": False}),
    ],
)
def test_a_training_step_against_torch(target, update):
    jepa, images, masks, lengths = make(config(target=target, update=update))
    flops = model_flops(jepa)
    with FlopCounterMode(display=False) as counter:
        jepa(View(images, masks)).loss.backward()
    # Nothing is differentiated with respect to pixels: the patch embedding's backward pass is once its forward pass,
    # and the formula has it as twice.
    embedded = lengths.context.sum() + (flops.seen(lengths).sum() if flops.targets_trained else 0)
    assert flops.training(lengths) == counter.get_total_flops() + 2 * PIXELS * WIDTH * embedded


def test_a_causal_encoder_has_half_of_the_pairs():
    jepa, _, _, lengths = make(config())
    plain = encoder_flops(jepa.encoder)
    jepa.encoder.causal = True
    pairs = sum(n * (n + 1) // 2 for n in lengths.context.tolist())
    wanted = plain.per_token * lengths.context.sum() + plain.per_pair * pairs
    assert encoder_flops(jepa.encoder)(lengths.context) == pytest.approx(wanted, rel=1e-12)


def test_a_target_of_the_first_layers_is_counted():
    """The formula is that of the whole encoder, so it is not used."""
    tiny = config(target={"layers": [0], "final_norm": False}, update="tied")
    jepa, whole = make(tiny)[0], make(config(update="tied"))[0]
    assert not model_flops(jepa).has_formula
    assert model_flops(whole).has_formula
    assert count_flops(tiny, torch.device("cpu")) < 0.9 * count_flops(config(update="tied"), torch.device("cpu"))


def test_sums_over_images():
    """An image's FLOP depends on its own sets alone."""
    tiny = config()
    jepa, _, masks, lengths = make(tiny)
    flops = model_flops(jepa)
    alone = [build_masker(tiny)(np.array([i]), seed=0, epoch=0) for i in range(IMAGES)]
    assert flops.training(lengths) == pytest.approx(sum(flops.training(Lengths.of(m, 1)) for m in alone), rel=1e-12)
    assert masks.context.num_patches == lengths.context.sum()


class SeesAll(ViT):
    """Encodes every patch, and takes those of the context out at the end."""

    def forward(self, images, patches=None):
        tokens = super().forward(images)
        return tokens if patches is None else patches.gather(tokens.unflatten(0, (len(images), -1)))


class Renamed(ViT):
    inherits_flops = True


class Below(Renamed):
    """Declares nothing in its own body."""


class TargetWithNetwork(RepresentationTarget):
    def __init__(self, embed_dim):
        super().__init__(embed_dim=embed_dim)
        self.own = nn.Linear(embed_dim, embed_dim).requires_grad_(False)

    def forward(self, images, patches, encoder):
        return self.own(super().forward(images, patches, encoder))


class Head(nn.Module):
    """A loss with a network of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, prediction):
        return (self.head(prediction.prediction) - prediction.target).square().mean()


def with_parts(monkeypatch, tiny, **parts):
    """The recipe of a config in which some parts are replaced, also where it is built for the count."""

    def replaced(of, *_, **__):
        jepa = build_recipe(of)
        for name, change in parts.items():
            change(jepa) if name == "change" else setattr(jepa, name, parts[name])
        return jepa

    monkeypatch.setattr(flops_module, "trial_recipe", replaced)
    return replaced(tiny)


def as_class(cls):
    def change(jepa):
        jepa.encoder.__class__ = cls

    return change


@pytest.mark.parametrize(
    "parts",
    [
        {"change": as_class(SeesAll)},
        {"change": as_class(Below)},
        {"target": TargetWithNetwork(WIDTH)},
        {"losses": nn.ModuleDict({"smooth_l1": Head()})},
    ],
    ids=["sees all", "says nothing", "target", "loss"],
)
def test_parts_without_a_formula_are_counted(monkeypatch, parts):
    """Against torch's counter on the batch that is counted, and not the formula of another network."""
    tiny = config()
    jepa = with_parts(monkeypatch, tiny, **parts)
    assert not model_flops(jepa).has_formula
    found = flops_of(tiny, jepa, torch.device("cpu"))
    masks = build_masker(tiny)(np.arange(8), seed=0, epoch=0)
    with FlopCounterMode(display=False) as counter:
        jepa(View(torch.randn(8, 3, 32, 32), masks)).loss.backward()
    assert found.training(Lengths.of(masks, 8)) == pytest.approx(counter.get_total_flops())
    assert found.training(Lengths.of(build_masker(tiny)(np.arange(3), seed=0, epoch=0), 3)) == pytest.approx(
        3 / 8 * counter.get_total_flops()
    )


def test_a_subclass_that_sees_all_patches_is_not_taken_for_one_that_sees_the_context(monkeypatch):
    tiny = config()
    plain, _, masks, lengths = make(tiny)
    found = flops_of(tiny, with_parts(monkeypatch, tiny, change=as_class(SeesAll)), torch.device("cpu"))
    assert found.training(lengths) > 1.2 * model_flops(plain).training(lengths)
    assert masks.context.num_patches < 0.7 * IMAGES * 64


def test_a_target_with_a_network_of_its_own_counts(monkeypatch):
    tiny = config()
    plain = count_flops(tiny, torch.device("cpu"))
    more = flops_of(tiny, with_parts(monkeypatch, tiny, target=TargetWithNetwork(WIDTH)), torch.device("cpu")).counted
    targets = build_masker(tiny)(np.arange(8), seed=0, epoch=0).targets.num_patches
    assert more - plain == pytest.approx(2 * WIDTH**2 * targets / 8)


def test_a_subclass_that_declares_it_has_the_formula():
    jepa, _, _, lengths = make(config())
    wanted = model_flops(jepa).training(lengths)
    jepa.encoder.__class__ = Renamed
    assert flops_of(config(), jepa, torch.device("cpu")).counted is None
    assert model_flops(jepa).training(lengths) == wanted
    sharded = type("FSDPViT", (FSDPModule, ViT), {"__module__": FSDPModule.__module__})
    assert has_formula(object.__new__(sharded), ViT)


def test_random_states_stay_as_they_are():
    before = torch.get_rng_state()
    count_flops(config(), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_without_a_formula():
    jepa, _, _, lengths = make(config())
    jepa.predictor = nn.Linear(1, 1)
    flops = model_flops(jepa)
    assert flops.forward(lengths)[2] is None
    assert flops.training(lengths) is None
    jepa.encoder = nn.Linear(1, 1)
    assert model_flops(jepa).forward(lengths)[:2] == (None, None)
