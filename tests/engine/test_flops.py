"""The formula against two counters that we did not write: fvcore's (from a trace) and torch's (from what ran)."""

import math

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jepa_kit.config import config_from_dict
from jepa_kit.engine.flops import Lengths, encoder_flops, model_flops, predictor_flops
from jepa_kit.recipe import build_masker, build_recipe

IMAGES, PIXELS, WIDTH = 3, 3 * 4 * 4, 24


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


BY_ONEDNN = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, out_shape, **__: 2 * math.prod(x) * weight[0],
}
"""torch has no formula for this operator: x [R, K], weight [N, K]."""


def make(held):
    torch.manual_seed(0)
    masks = build_masker(held)(np.arange(IMAGES), seed=0, epoch=0)
    return build_recipe(held), torch.randn(IMAGES, 3, 32, 32), masks, Lengths.of(masks, IMAGES)


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
    with FlopCounterMode(display=False, custom_mapping=BY_ONEDNN) as counter:
        jepa(images, masks).loss.backward()
    # Nothing is differentiated with respect to pixels: the patch embedding's backward pass is once its forward pass,
    # and the formula has it as twice.
    embedded = lengths.context.sum() + (flops.seen(lengths).sum() if flops.targets_trained else 0)
    assert flops.training(lengths) == counter.get_total_flops() + 2 * PIXELS * WIDTH * embedded


def test_sums_over_images():
    """An image's FLOP depends on its own sets alone."""
    held = config()
    jepa, _, masks, lengths = make(held)
    flops = model_flops(jepa)
    alone = [build_masker(held)(np.array([i]), seed=0, epoch=0) for i in range(IMAGES)]
    assert flops.training(lengths) == pytest.approx(sum(flops.training(Lengths.of(m, 1)) for m in alone), rel=1e-12)
    assert masks.context.num_patches == lengths.context.sum()


def test_a_network_without_a_formula():
    jepa, _, _, lengths = make(config())
    jepa.predictor = nn.Linear(1, 1)
    flops = model_flops(jepa)
    assert flops.forward(lengths)[2] is None
    assert flops.training(lengths) is None
    jepa.encoder = nn.Linear(1, 1)
    assert model_flops(jepa).forward(lengths)[:2] == (None, None)
