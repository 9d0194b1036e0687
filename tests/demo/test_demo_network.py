"""Encoder, predictor, loss and decoder of the page against PyTorch, and the networks that a page cannot run."""

import base64

import numpy as np
import pytest
import torch
from demo_cases import make_recipe

from jepa_kit.data.transforms import normalize
from jepa_kit.demo.export import add_decoder, check_run
from jepa_kit.demo.page import page_data, prepare_network
from jepa_kit.evaluation.features import LoadedRun
from jepa_kit.evaluation.pictures.decoder import NOISE, Decoder
from jepa_kit.structures import MaskBatch, PatchSets, View

CLOSE = 1e-3
"""What the page promises; the error is measured to be a tenth of it."""
CONTEXT, TARGETS = [0, 1, 2, 9, 10, 17, 40, 47], [[3, 4, 11, 12], [25, 26], [33]]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["encoder.input_norm=image", "encoder.class_token=true", "encoder.registers=2", "predictor.prefix=true"],
        ["encoder.positions=learned", "encoder.class_token=true", "encoder.layer_scale=0.1", "target.norm=none"],
        ["encoder.final_norm=false", "encoder.qkv_bias=false", "encoder.positions=none", "target_update={name: tied}"],
        ["loss=[{name: l2}, {name: cosine, weight: 0.5}, {name: smooth_l1, beta: 0.3}]", "encoder.norm_eps=0.01"],
        ["loss={name: l1}", "encoder.mlp_ratio=2", "predictor.mlp_ratio=3", "target={layers: 2, combine: concat}"],
        ["target={layers: [0, 2], final_norm: false, mean_norm: layer}", "encoder.class_token=true"],
    ],
    ids=["plain", "prefix", "learned", "tied", "losses", "wide", "layers"],
)
def test_the_page_computes_what_pytorch_does(tiny_config, node, overrides):
    config = tiny_config(*overrides)
    recipe = make_recipe(config)
    network = prepare_network(LoadedRun(config, recipe, 1), 2)
    images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
    network.block.add("images", images.flatten(1))
    x = normalize(images, config.data.mean, config.data.std)
    page = {**page_data(config, network), **network.shapes, "tensors": network.block.entries}
    tensors = base64.b64encode(network.block.to_bytes()).decode()
    masks = [{"image": i, "context": CONTEXT, "targets": TARGETS} for i in range(2)]
    found = node("run_network.mjs", {"page": page, "tensors": tensors, "masks": masks})["results"]

    context = PatchSets.pack([torch.tensor(CONTEXT)] * 2)
    blocks = [torch.tensor(block) for block in TARGETS]
    targets = PatchSets.pack(blocks * 2, torch.tensor([0, 0, 0, 1, 1, 1]))
    view = View(x, MaskBatch(context, targets, (6, 8), torch.tensor([0, 0, 0, 1, 1, 1])))
    with torch.no_grad():
        (seen,) = recipe.encoder.forward_tokens(x, context)
        prediction = recipe.predict(view)
        loss = recipe(view).loss
        truth = recipe.targets_at(x, PatchSets.full(2, 48))
    for name, expected in (("seen", seen.patches), ("prefix", seen.prefix.flatten()), ("truth", truth)):
        compare([one[name] for one in found], expected)
    compare([values for one in found for values in one["predictions"]], prediction.prediction)
    energies = [np.mean([np.mean(values) for values in one["energies"]]) for one in found]
    assert np.mean(energies) == pytest.approx(float(loss), abs=CLOSE)


def compare(parts, expected):
    found = torch.tensor([value for part in parts for value in part])
    expected = expected.flatten()
    assert found.shape == expected.shape
    if len(expected):
        assert (found - expected).abs().max() < CLOSE
        assert expected.std() > 0.1  # so that zeros would not pass


def test_the_page_draws_what_the_decoder_does(tiny_config, node):
    config = tiny_config()
    network = prepare_network(LoadedRun(config, make_recipe(config), 1), 2)
    network.block.add("images", torch.zeros(1, 3 * 24 * 32, dtype=torch.uint8))
    decoder = Decoder(dim=16, patch_size=4, hidden=12)
    shapes = {**network.shapes, "decoder": add_decoder(decoder, network.block)}
    page = {**page_data(config, network), **shapes, "tensors": network.block.entries}
    tokens, noise = torch.randn(1, 5, 16), torch.randn(1, 5, NOISE)
    value = {"page": page, "masks": [], "tokens": tokens.flatten().tolist(), "noise": noise.flatten().tolist()}
    found = node("run_network.mjs", {**value, "tensors": base64.b64encode(network.block.to_bytes()).decode()})
    with torch.no_grad():
        compare([found["drawn"]], decoder(tokens, noise))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.positions=rotary"], "encoder.positions (='rotary') must be 'sincos', 'learned' or 'none'"),
        (["encoder.relative_bias=shared"], "encoder.relative_bias must be 'none'"),
        (["encoder.causal=true"], "encoder.causal (=True) must be false"),
        (["encoder={name: conv, patch_size: 4, embed_dim: 16, depth: 1}"], "encoder (=ConvEncoder) must be 'vit'"),
        (["predictor.positions=rotary"], "predictor.positions (='rotary') must be 'sincos'"),
        (
            ["masker={name: in_place}", "encoder.mask_token=true"],
            "encoder.mask_token (=True) must be false: a page leaves hidden patches out, and hides none in place",
        ),
        (["predictor.mask_tokens=2"], "predictor.mask_tokens (=2) must be 1"),
        (["predictor={name: cross, width: 8, depth: 1, num_heads: 2}"], "must be 'vit'"),
        (["target.masked_at=input"], "target.masked_at (='input') must be 'output'"),
        (["target={name: pixel}", "target_update={name: none}"], "target (=PixelTarget) must be 'representation'"),
        (
            ["loss={name: vicreg}"],
            "loss (=vicreg) must have distances out of smooth_l1, l2, l1, cosine",
        ),
    ],
)
def test_a_network_that_a_page_cannot_run_is_refused(tiny_config, overrides, message):
    config = tiny_config(*overrides)
    with pytest.raises(ValueError) as error:
        check_run(make_recipe(config), config)
    assert str(error.value).startswith("a page cannot run this network:\n")
    assert message in str(error.value)
