"""Targets against plain maths: one image, one set, one patch at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa_kit.encoders import ViT
from jepa_kit.registry import TARGETS
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import PatchSets
from jepa_kit.targets import PixelTarget, RepresentationTarget

PATCH, DIM = 4, 16


def make_encoder() -> ViT:
    torch.manual_seed(0)
    vit = ViT(image_size=(16, 24), patch_size=PATCH, embed_dim=DIM, depth=3, num_heads=2).double()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.3)
    return vit.eval()


def make_images() -> Tensor:
    return torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make_sets() -> PatchSets:
    """24 patches an image; ragged, with images out of order and a patch in two sets."""
    return PatchSets(
        torch.tensor([3, 4, 9, 23, 0, 4, 5]), torch.tensor([1, 0, 1]), SetLengths([3, 1, 3])
    )  # fmt: skip


def standardise(x: Tensor, eps: float) -> Tensor:
    """Mean 0 and (biased) variance 1 of each row."""
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps)


def taken(dense: Tensor, sets: PatchSets) -> Tensor:
    """[B, N, D] -> [P, D], set by set."""
    return torch.cat([dense[b][i] for b, i in zip(sets.image.tolist(), sets.split(), strict=True)])


# --- representation ---


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_representation_is_the_target_encoders_output_at_the_target_patches(norm: Any) -> None:
    encoder, images, sets = make_encoder(), make_images(), make_sets()
    dense = torch.stack([encoder(image[None]) for image in images])  # [B, N, D]
    if norm == "layer":
        dense = standardise(dense, 1e-5)
    out = RepresentationTarget(embed_dim=DIM, norm=norm)(images, sets, encoder)
    torch.testing.assert_close(out, taken(dense, sets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_representation_of_several_layers_is_their_mean_each_normalised(norm: Any) -> None:
    encoder, images, sets = make_encoder(), make_images(), make_sets()
    x, lengths = encoder.embed(images, None)
    layers = []
    for block in encoder.blocks:
        x = block(x, lengths)
        y = standardise(x, 1e-6) * encoder.norm.weight + encoder.norm.bias
        layers.append((standardise(y, 1e-5) if norm == "layer" else y).view(2, 24, DIM))
    target = RepresentationTarget(embed_dim=DIM, norm=norm, layers=2)
    expected = taken((layers[1] + layers[2]) / 2, sets)
    torch.testing.assert_close(target(images, sets, encoder), expected, rtol=0, atol=1e-12)


def test_representation_of_chosen_layers_without_the_final_norm_is_that_of_data2vec() -> None:
    """Each block's output is standardised, then their mean; at the target patches."""
    encoder, images, sets = make_encoder(), make_images(), make_sets()
    x, lengths = encoder.embed(images, None)
    layers = [x]
    for block in encoder.blocks:
        layers.append(block(layers[-1], lengths))
    each = [standardise(layers[number], 1e-5) for number in (1, 3, 0)]
    target = RepresentationTarget(embed_dim=DIM, layers=(1, 3, 0), final_norm=False, mean_norm="layer", depth=3)
    expected = taken(standardise(sum(each, torch.zeros(())) / 3, 1e-5).view(2, 24, DIM), sets)
    torch.testing.assert_close(target(images, sets, encoder), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize(("layers", "numbers"), [((3, 1), (3, 1)), ((0, 2, 3), (0, 2, 3)), (2, (2, 3)), (1, (3,))])
def test_layers_side_by_side_are_each_normalised(norm: Any, final_norm: bool, layers: Any, numbers: Any) -> None:
    encoder, images, sets = make_encoder(), make_images(), make_sets()
    x, lengths = encoder.embed(images, None)
    outputs = [x]
    for block in encoder.blocks:
        outputs.append(block(outputs[-1], lengths))
    if final_norm:
        outputs = [standardise(x, 1e-6) * encoder.norm.weight + encoder.norm.bias for x in outputs]
    each = [standardise(outputs[i], 1e-5) if norm == "layer" else outputs[i] for i in numbers]
    options = {"layers": layers, "combine": "concat", "norm": norm, "final_norm": final_norm}
    target = TARGETS.build("representation", options, embed_dim=DIM, depth=3, patch_size=PATCH)
    out = target(images, sets, encoder)
    assert out.shape == (sets.num_patches, target.out_dim) == (7, len(numbers) * DIM)
    for i, expected in enumerate(each):
        here = out[:, i * DIM : (i + 1) * DIM]
        torch.testing.assert_close(here, taken(expected.view(2, 24, DIM), sets), rtol=0, atol=1e-12)


def test_representation_masked_at_the_input_shows_each_block_alone() -> None:
    encoder, images, sets = make_encoder(), make_images(), make_sets()
    out = RepresentationTarget(embed_dim=DIM, masked_at="input")(images, sets, encoder)
    alone = [
        standardise(encoder(images[b][None], PatchSets.from_padded(i[None])), 1e-5)
        for b, i in zip(sets.image.tolist(), sets.split(), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-12)
    whole = RepresentationTarget(embed_dim=DIM)(images, sets, encoder)
    assert float((out - whole).detach().abs().mean()) > 0.01


def test_representation_refuses() -> None:
    with pytest.raises(ValueError, match=r"layers \(=0\) must be at least 1"):
        RepresentationTarget(embed_dim=DIM, layers=0)
    with pytest.raises(ValueError, match=r"layers \(=4\) must be at most the encoder's depth \(=3\)"):
        RepresentationTarget(embed_dim=DIM, layers=4, depth=3)
    with pytest.raises(
        ValueError, match=r"layers \(=\(2, 4\)\) must be numbers of blocks, from 1 to the encoder's depth"
    ):
        RepresentationTarget(embed_dim=DIM, layers=(2, 4), depth=3)
    with pytest.raises(ValueError, match=r"layers \(=\(2, 2\)\) must be different numbers of blocks"):
        RepresentationTarget(embed_dim=DIM, layers=(2, 2))
    with pytest.raises(ValueError, match=r"combine \(='sum'\) must be one of 'mean', 'concat'"):
        RepresentationTarget(embed_dim=DIM, combine="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mean_norm \(='layer'\) normalises an average, and combine \(='concat'\)"):
        RepresentationTarget(embed_dim=DIM, layers=2, combine="concat", mean_norm="layer")
    with pytest.raises(ValueError, match=r"mean_norm \(='batch'\) must be one of 'layer', 'none'"):
        RepresentationTarget(embed_dim=DIM, mean_norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^norm \(='batch'\) must be one of 'layer', 'none'"):
        RepresentationTarget(embed_dim=DIM, norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masked_at \(='middle'\) must be one of 'output', 'input'"):
        RepresentationTarget(embed_dim=DIM, masked_at="middle")  # type: ignore[arg-type]


def test_representation_of_more_layers_than_there_are() -> None:
    target = RepresentationTarget(embed_dim=DIM, layers=4)
    with pytest.raises(ValueError, match=r"layers \(=4\) must be at most the encoder's depth \(=3\)"):
        target(make_images(), make_sets(), make_encoder())


# --- pixel ---


def patches_by_hand(images: Tensor, sets: PatchSets) -> Tensor:
    """Row by row of the patch, the channels of a pixel together."""
    out = []
    for b, index in zip(sets.image.tolist(), sets.split(), strict=True):
        for i in index.tolist():
            top, left = i // 6 * PATCH, i % 6 * PATCH
            out.append([float(images[b, c, top + y, left + x]) for y in range(4) for x in range(4) for c in range(3)])
    return torch.tensor(out, dtype=torch.float64)


def test_raw_pixels_are_the_images() -> None:
    images, sets = make_images(), make_sets()
    target = PixelTarget(patch_size=PATCH, norm="none")
    assert target.out_dim == 48
    assert torch.equal(target(images, sets, None), patches_by_hand(images, sets))


def test_normalised_pixels_are_as_in_mae() -> None:
    """He et al. 2022: (x - mean) / (var + 1e-6)**0.5 of each patch, with the unbiased variance of torch.var."""
    images, sets = make_images() * 0.01, make_sets()
    pixels = patches_by_hand(images, sets)
    mean = pixels.sum(-1, keepdim=True) / 48
    var = (pixels - mean).square().sum(-1, keepdim=True) / 47
    out = PixelTarget(patch_size=PATCH)(images, sets, None)
    torch.testing.assert_close(out, (pixels - mean) / torch.sqrt(var + 1e-6), rtol=0, atol=1e-12)


def test_a_patch_of_one_colour_normalises_to_zero() -> None:
    out = PixelTarget(patch_size=PATCH)(torch.full((2, 3, 16, 24), 0.5), make_sets(), None)
    assert torch.isfinite(out).all()
    assert float(out.abs().max()) == 0


def test_pixels_of_other_channels() -> None:
    target = PixelTarget(patch_size=PATCH, in_chans=1, norm="none")
    assert target.out_dim == 16
    assert target(torch.randn(2, 1, 16, 24), make_sets(), None).shape == (7, 16)


def test_pixel_refuses() -> None:
    with pytest.raises(ValueError, match=r"norm \(='image'\) must be one of 'patch', 'none'"):
        PixelTarget(patch_size=PATCH, norm="image")  # type: ignore[arg-type]


# --- all ---


OURS = [name for name in TARGETS.names() if TARGETS.get(name).__module__.startswith("jepa_kit.")]


@pytest.mark.parametrize("name", OURS)
def test_every_target_has_the_width_it_says_and_no_weights(name: str) -> None:
    encoder, images, sets = make_encoder(), make_images(), make_sets()
    target = TARGETS.build(name, {}, embed_dim=DIM, depth=3, patch_size=PATCH)
    with torch.no_grad():
        out = target(images, sets, encoder if target.needs_encoder else None)
    assert out.shape == (sets.num_patches, target.out_dim)
    assert not out.requires_grad
    assert torch.isfinite(out).all()
    assert not list(target.parameters())
