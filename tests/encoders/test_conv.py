"""The convolutional encoder against ConvNeXt's blocks of `transformers` on images, and on what a set sees of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders import ConvEncoder
from jepa_kit.structures import PatchSets

SMALL: dict[str, Any] = {"image_size": (20, 28), "patch_size": 4, "embed_dim": 12, "depth": 3, "kernel": 7}


def make_encoder(**options: Any) -> ConvEncoder:
    torch.manual_seed(0)
    encoder = ConvEncoder(**{**SMALL, "mask_token": True, **options}).double()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.3)
    return encoder.eval()


def make_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 20, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def their_layers(encoder: ConvEncoder) -> list[nn.Module]:
    module = pytest.importorskip("transformers.models.convnext.modeling_convnext")
    config = pytest.importorskip("transformers").ConvNextConfig(layer_scale_init_value=0.0)
    layers = [module.ConvNextLayer(config, 12).double() for _ in encoder.blocks]
    names = {"dwconv": "conv", "layernorm": "norm", "pwconv1": "fc1", "pwconv2": "fc2"}
    for layer, block in zip(layers, encoder.blocks, strict=True):
        ours = block.state_dict()
        layer.load_state_dict({f"{t}.{p}": ours[f"{o}.{p}"] for t, o in names.items() for p in ("weight", "bias")})
    return layers


def some_sets() -> PatchSets:
    """Two sets of one image, in an order of their own, with hidden patches."""
    sets = PatchSets.pack([torch.tensor(x) for x in ([9, 2, 3, 30], [34, 0], [*range(35)])], torch.tensor([1, 0, 1]))
    return replace(sets, hidden=torch.arange(41) % 3 == 0)


def plain(encoder: ConvEncoder, images: Tensor, sets: PatchSets) -> list[Tensor]:
    """Each layer's tokens: dense blocks on each set's grid, of which all else is set to zero after every block."""
    assert sets.hidden is not None
    layers = their_layers(encoder)
    content = F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=4)
    found: list[list[Tensor]] = [[] for _ in range(4)]
    for image, index, hidden in zip(sets.image, sets.split(), sets.hidden.split(sets.lengths.on_host), strict=True):
        x = torch.zeros(12, 35, dtype=torch.float64)
        x[:, index] = content[image].flatten(1)[:, index]
        x[:, index[hidden]] = encoder.mask_token.detach().T  # type: ignore[union-attr]
        seen = torch.zeros(35, dtype=torch.float64).index_fill(0, index, 1.0).view(5, 7)
        x = x.view(1, 12, 5, 7)
        found[0].append(x[0].flatten(1).T[index])
        for number, layer in enumerate(layers, start=1):
            x = layer(x) * seen
            found[number].append(x[0].flatten(1).T[index])
    return [torch.cat(tokens) for tokens in found]


def test_sets_equal_convnexts_blocks_on_what_they_see() -> None:
    encoder, images, sets = make_encoder(), make_images(), some_sets()
    expected = plain(encoder, images, sets)
    outputs = encoder.forward_layers(images, sets, layers=(0, 1, 2, 3), norm=False)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-11)
    last = F.layer_norm(expected[3], (12,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    torch.testing.assert_close(encoder(images, sets), last, rtol=0, atol=1e-11)
    second, first = encoder.forward_layers(images, sets, layers=(2, 1), norm=False)
    assert torch.equal(second, outputs[2])
    assert torch.equal(first, outputs[1])


def test_all_patches_are_the_full_sets() -> None:
    encoder, images = make_encoder(), make_images()
    expected = encoder(images, PatchSets.full(2, 35))
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-12)
    assert encoder.grid == (5, 7)


def test_pixels_outside_a_set_and_of_hidden_patches_change_nothing() -> None:
    encoder, images = make_encoder(), make_images(1)
    index = torch.tensor([0, 3, 11, 12, 20])
    hidden = torch.tensor([False, False, True, False, True])
    sets = replace(PatchSets.pack([index]), hidden=hidden)
    shown = torch.zeros(35, dtype=torch.float64).index_fill(0, index[~hidden], 1.0).view(1, 1, 5, 7)
    noise = torch.randn_like(images) * (1 - F.interpolate(shown, scale_factor=4))
    assert torch.equal(encoder(images + noise, sets), encoder(images, sets))


def test_images_of_another_size() -> None:
    encoder = make_encoder()
    assert encoder(torch.randn(2, 3, 12, 16, dtype=torch.float64)).shape == (2 * 12, 12)


def test_in_half_precision_sums_of_branches_are_float32() -> None:
    encoder, images, sets = make_encoder(), make_images(), some_sets()
    exact = encoder(images, sets)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = encoder.float().forward_layers(images.float(), sets, layers=(0, 3), norm=False)
        rounded = encoder(images.float(), sets)
    assert [x.dtype for x in outputs] == [torch.float32, torch.float32]
    assert float((rounded - exact).detach().norm() / exact.detach().norm()) < 0.05


def test_init_leaves_nothing_as_it_was() -> None:
    encoder = ConvEncoder(**SMALL, mask_token=True)
    for x in encoder.parameters():
        nn.init.constant_(x, math.nan)
    encoder.init_weights()
    for name, x in encoder.named_parameters():
        assert torch.isfinite(x).all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim (=0) must be at least 1"),
        ({"depth": 0}, "depth (=0) must be at least 1"),
        ({"in_chans": 0}, "in_chans (=0) must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio (=0.0) must be above 0: the MLP needs a unit"),
        ({"kernel": 4}, "kernel (=4) must be odd and at least 1"),
        ({"kernel": -1}, "kernel (=-1) must be odd and at least 1"),
        ({"patch_size": 8}, "patch_size (=8) must divide the height (=20) and the width (=28) of an image"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ConvEncoder(**{**SMALL, **options})
    assert str(error.value) == message


def test_refuses_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, h, w\], not \(2, 1, 20, 28\)"):
        make_encoder()(torch.zeros(2, 1, 20, 28))
    with pytest.raises(
        ValueError, match=r"layers \(=\(4,\)\) must be numbers of blocks, from 1 to the encoder's depth"
    ):
        make_encoder().forward_layers(make_images(), layers=(4,))
    with pytest.raises(ValueError, match=r"patches.hidden is given, but this encoder has no mask token"):
        make_encoder(mask_token=False)(make_images(), some_sets())
