"""The ViT against `transformers`, torch's convolution, published sizes, and itself one image at a time."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders import SIZES, ViT
from jepa_kit.encoders.patch_embed import PatchEmbed
from jepa_kit.encoders.positions import interpolate_pos_embed, patch_grid, sincos_2d
from jepa_kit.encoders.vit import PatchInit
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import PatchSets

SMALL: dict[str, Any] = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def make_vit(*, seed: int = 0, std: float = 0.2, **options: Any) -> ViT:
    """A ViT in float64 whose every parameter is random, so that none can be swapped or left out unseen."""
    torch.manual_seed(seed)
    vit = ViT(**{**SMALL, **options}).double()
    for p in vit.parameters():
        nn.init.normal_(p, std=std)
    return vit.eval()


def ragged_sets(
    num_patches: int, lengths: tuple[int, ...] = (5, 1, 9), image: tuple[int, ...] = (0, 2, 1)
) -> PatchSets:
    index = torch.cat([torch.randperm(num_patches)[:n] for n in lengths])
    return PatchSets(index, torch.tensor(image), SetLengths(lengths))


# --- against transformers ---


def as_transformers(vit: ViT, image_size: int) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.IJepaConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.blocks[0].attn.num_heads,  # type: ignore[union-attr]
        intermediate_size=vit.blocks[0].mlp.fc1.out_features,  # type: ignore[union-attr]
        image_size=image_size,
        patch_size=vit.patch_size,
        layer_norm_eps=1e-6,
        qkv_bias=True,
        attn_implementation="sdpa",
    )
    model = transformers.IJepaModel(config, add_pooling_layer=False).double().eval()
    ours, theirs = vit.state_dict(), dict.fromkeys(model.state_dict())

    def take(name: str, source: str, part: slice = slice(None)) -> None:
        for p in ("weight", "bias"):
            assert f"{name}.{p}" in theirs
            theirs[f"{name}.{p}"] = ours[f"{source}.{p}"][part]

    theirs["embeddings.position_embeddings"] = vit.pos_embed[None]
    take("embeddings.patch_embeddings.projection", "patch_embed.proj")
    take("layernorm", "norm")
    d = vit.embed_dim
    for i in range(vit.depth):
        for j, letter in enumerate("qkv"):
            take(f"layers.{i}.attention.{letter}_proj", f"blocks.{i}.attn.qkv", slice(j * d, (j + 1) * d))
        take(f"layers.{i}.attention.o_proj", f"blocks.{i}.attn.proj")
        take(f"layers.{i}.mlp.fc1", f"blocks.{i}.mlp.fc1")
        take(f"layers.{i}.mlp.fc2", f"blocks.{i}.mlp.fc2")
        take(f"layers.{i}.layernorm_before", f"blocks.{i}.norm1")
        take(f"layers.{i}.layernorm_after", f"blocks.{i}.norm2")
    assert all(v is not None for v in theirs.values())
    model.load_state_dict(theirs)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": (48, 48), "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0},
    ],
    ids=["32 px, patch 8", "48 px, patch 4"],
)
def test_equals_transformers(options: dict[str, Any]) -> None:
    vit = make_vit(**options)
    side = {**SMALL, **options}["image_size"][0]
    model = as_transformers(vit, side)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images).last_hidden_state.flatten(0, 1)  # [B * N, D]
        torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-12)
        larger = torch.randn(2, 3, 2 * side, 2 * side, dtype=torch.float64)
        expected = model(larger, interpolate_pos_encoding=True).last_hidden_state.flatten(0, 1)
        # Ours interpolates a float64 table in float64, as theirs.
        torch.testing.assert_close(vit(larger), expected, rtol=0, atol=1e-12)


# --- patch embedding ---


@pytest.mark.parametrize(("size", "patch"), [((32, 32), 8), ((24, 40), 4), ((70, 42), 14)])
def test_visible_patches_are_embedded_as_a_convolution_would(size: tuple[int, int], patch: int) -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(patch, 3, 16).double()
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    dense = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=patch).flatten(2).mT  # [B, N, D]
    sets = ragged_sets(dense.shape[1])
    expected = torch.cat([dense[b, i] for b, i in zip(sets.image.tolist(), sets.split(), strict=True)])
    torch.testing.assert_close(embed(images, sets), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(embed(images, None), dense.flatten(0, 1), rtol=0, atol=1e-13)


def test_pixels_of_hidden_patches_change_nothing() -> None:
    vit = make_vit()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    sets = PatchSets.from_padded(torch.tensor([[0, 5, 6]]))
    before = vit(images, sets)
    images[:, :, 16:] = math.nan
    assert torch.equal(vit(images, sets), before)


# --- packed sets ---


def test_a_set_gets_what_it_gets_alone() -> None:
    vit = make_vit()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    sets = ragged_sets(vit.num_patches)
    together = vit(images, sets).split(sets.lengths.on_host)
    for out, image, index in zip(together, sets.image, sets.split(), strict=True):
        alone = vit(images[image][None], PatchSets.from_padded(index[None]))
        torch.testing.assert_close(out, alone, rtol=0, atol=1e-13)


def test_all_patches_are_the_full_sets() -> None:
    vit = make_vit()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    full = vit(images, PatchSets.full(2, vit.num_patches))
    torch.testing.assert_close(vit(images), full, rtol=0, atol=1e-13)


def test_the_order_of_patches_is_the_order_of_tokens() -> None:
    vit = make_vit()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    one, other = torch.tensor([[3, 7, 12]]), torch.tensor([[12, 3, 7]])
    out = vit(images, PatchSets.from_padded(one))
    torch.testing.assert_close(vit(images, PatchSets.from_padded(other)), out[[2, 0, 1]], rtol=0, atol=1e-13)


# --- sizes of images ---


def test_rectangular_images_are_rows_by_columns() -> None:
    """What a rectangular ViT says of a patch is what its content and (row, column) say."""
    vit = make_vit(image_size=(16, 40), depth=1)
    assert vit.grid == (2, 5)
    images = torch.randn(1, 3, 16, 40, dtype=torch.float64)
    tokens, _ = vit.embed(images, None)
    content = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8)[0].flatten(1).T
    torch.testing.assert_close(tokens, content + sincos_2d(32, (2, 5)).double(), rtol=0, atol=1e-13)
    # Row 1, column 3 is patch 1 * 5 + 3.
    torch.testing.assert_close(tokens[8] - content[8], sincos_2d(32, (4, 4))[7].double(), rtol=0, atol=1e-13)


def test_another_resolution_interpolates_positions() -> None:
    vit = make_vit()
    images = torch.randn(2, 3, 48, 24, dtype=torch.float64)
    tokens, lengths = vit.embed(images, None)
    assert list(lengths) == [18, 18]
    table = interpolate_pos_embed(vit.pos_embed, (4, 4), (6, 3))
    torch.testing.assert_close(tokens.view(2, 18, 32) - table, vit.patch_embed(images, None).view(2, 18, 32))
    sets = PatchSets.from_padded(torch.tensor([[17, 3], [4, 0]]))
    some, _ = vit.embed(images, sets)
    torch.testing.assert_close(some, sets.gather(tokens.view(2, 18, 32)), rtol=0, atol=1e-13)


def test_the_training_resolution_has_the_table_itself() -> None:
    vit = make_vit()
    tokens, _ = vit.embed(torch.zeros(1, 3, 32, 32, dtype=torch.float64), None)
    torch.testing.assert_close(tokens - vit.patch_embed.proj.bias, sincos_2d(32, (4, 4)).double(), rtol=0, atol=1e-15)


# --- layers ---


def test_layers_are_the_blocks_outputs_through_the_final_norm() -> None:
    vit = make_vit()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x, lengths = vit.embed(images, None)
    expected = []
    for block in vit.blocks:
        x = block(x, lengths)
        expected.append(F.layer_norm(x, (32,), vit.norm.weight, vit.norm.bias, eps=1e-6))
    outputs = vit.forward_layers(images, layers=(1, 2, 3))
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(vit(images), outputs[-1])
    third, first = vit.forward_layers(images, layers=(3, 1))
    assert torch.equal(third, outputs[2])
    assert torch.equal(first, outputs[0])


def test_layers_before_the_first_block_and_without_the_norm() -> None:
    vit = make_vit()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x, lengths = vit.embed(images, None)
    embedded, second = vit.forward_layers(images, layers=(0, 2), norm=False)
    assert torch.equal(embedded, x)
    assert torch.equal(second, vit.blocks[1](vit.blocks[0](x, lengths), lengths))


def test_blocks_after_the_last_layer_are_not_run() -> None:
    vit = make_vit()
    vit.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("the last block was run"))
    assert len(vit.forward_layers(torch.zeros(1, 3, 32, 32, dtype=torch.float64), layers=(2, 1))) == 2


# --- sizes of models ---

# Classifiers as published (DeiT's and timm's model cards): with a class token, learned positions and 1,000 classes.
PUBLISHED = {
    "tiny": (16, 5_717_416),
    "small": (16, 22_050_664),
    "base": (16, 86_567_656),
    "large": (16, 304_326_632),
    "huge": (14, 632_045_800),
    "giant": (14, 1_012_610_000),
    "gigantic": (14, 1_844_440_000),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_number_of_parameters(size: str) -> None:
    patch, published = PUBLISHED[size]
    with torch.device("meta"):
        vit = ViT(image_size=(224, 224), patch_size=patch, size=size)  # type: ignore[arg-type]
    d, n = vit.embed_dim, vit.num_patches
    count = sum(p.numel() for p in vit.parameters())
    extra = d + (n + 1) * d + 1000 * (d + 1)  # class token, positions, head
    # The two largest are published to 0.01 million.
    assert abs(count + extra - published) <= (0 if size not in ("giant", "gigantic") else 5_000)


def test_a_value_replaces_that_of_the_size() -> None:
    with torch.device("meta"):
        vit = ViT(image_size=(32, 32), patch_size=4, size="tiny", depth=2, mlp_ratio=2.0)
    assert (vit.embed_dim, vit.depth, len(vit.blocks)) == (192, 2, 2)
    assert vit.blocks[0].mlp.fc1.out_features == 384  # type: ignore[union-attr]


# --- initialisation ---


@pytest.mark.parametrize("patch_init", get_args(PatchInit))
@pytest.mark.parametrize("init", ["released", "depth_scaled"])
def test_init_leaves_nothing_as_it_was(init: str, patch_init: str) -> None:
    vit = ViT(**SMALL, init=init, patch_init=patch_init)  # type: ignore[arg-type]
    for x in (*vit.parameters(), *vit.buffers()):
        nn.init.constant_(x, math.nan)
    vit.init_weights()
    for name, x in (*vit.named_parameters(), *vit.named_buffers()):
        assert torch.isfinite(x).all(), name
    assert torch.equal(vit.pos_embed, sincos_2d(32, (4, 4)))


def test_patch_init_has_the_scale_it_says() -> None:
    torch.manual_seed(0)
    wide = {**SMALL, "embed_dim": 256}
    released = ViT(**wide, patch_init="released").patch_embed.proj.weight.detach()
    assert float(released.std()) == pytest.approx(0.02, rel=0.02)
    xavier = ViT(**wide, patch_init="xavier").patch_embed.proj.weight.detach()
    bound = math.sqrt(6 / (3 * 8 * 8 + 256))
    assert float(xavier.abs().max()) <= bound
    assert float(xavier.abs().max()) > 0.99 * bound
    assert float(xavier.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_whitened_patch_init_is_xavier_times_the_root_of_an_inverse_covariance() -> None:
    weights = []
    for patch_init in ("xavier", "whitened"):
        torch.manual_seed(0)
        vit = ViT(**{**SMALL, "patch_size": 4}, patch_init=patch_init)  # type: ignore[arg-type]
        weights.append(vit.patch_embed.proj.weight.detach().double().flatten(1).numpy())
    y, x = np.divmod(np.arange(16), 4)
    distance = np.hypot(y[:, None] - y, x[:, None] - x)
    covariance = np.kron(0.9 + 0.1 * np.eye(3), 0.95**distance)
    largest = np.linalg.eigvalsh(covariance)[-1]
    root = scipy.linalg.fractional_matrix_power(covariance + 0.004 * largest * np.eye(48), -0.5)
    root *= math.sqrt(np.trace(covariance) / np.trace(root @ covariance @ root))
    assert weights[1] == pytest.approx(weights[0] @ root, abs=1e-6)


def content_over_position(patch_init: str) -> float:
    """Size of a token's content over the size of its position, for 4 px patches of white noise."""
    torch.manual_seed(0)
    vit = ViT(image_size=(32, 32), patch_size=4, size="tiny", depth=1, patch_init=patch_init)  # type: ignore[arg-type]
    images = torch.randn(8, 3, 32, 32)
    content: Tensor = vit.patch_embed(images, None)
    return float(content.detach().square().mean().sqrt() / vit.pos_embed.square().mean().sqrt())


def test_with_small_patches_the_released_init_drowns_content_in_position() -> None:
    assert content_over_position("released") == pytest.approx(0.02 * math.sqrt(48) / math.sqrt(0.5), rel=0.05)  # 0.196
    assert content_over_position("xavier") > 0.8


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "medium"}, r"size \(='medium'\) must be one of tiny, small, base, large, huge, giant, gigantic"),
        ({"embed_dim": None}, r"size \(=None\) needs embed_dim to be given; sizes: tiny, small"),
        ({"depth": None, "num_heads": None}, r"size \(=None\) needs depth, num_heads to be given"),
        ({"patch_size": 7}, r"patch_size \(=7\) must divide the height \(=32\) and the width \(=32\) of an image"),
        ({"patch_size": 0}, r"patch_size \(=0\) must divide"),
        ({"patch_size": 64}, r"patch_size \(=64\) must divide"),
        ({"image_size": (32, 36)}, r"patch_size \(=8\) must divide the height \(=32\) and the width \(=36\)"),
        ({"embed_dim": 30, "num_heads": 3}, r"embed_dim \(=30\) must be a multiple of 4"),
        ({"embed_dim": -4}, r"embed_dim \(=-4\) must be a multiple of 4"),
        ({"num_heads": 5}, r"num_heads \(=5\) must divide the width \(=32\)"),
        ({"num_heads": 0}, r"num_heads \(=0\) must divide the width \(=32\)"),
        ({"depth": 0}, r"depth \(=0\) must be at least 1"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio \(=0.0\) must be above 0"),
        ({"norm_eps": -1.0}, r"norm_eps \(=-1.0\) must be above 0 and finite"),
        ({"in_chans": 0}, r"in_chans \(=0\) must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path \(=1.0\) must be in \[0, 1\)"),
        ({"init": "he"}, r"init \(='he'\) must be one of 'released', 'depth_scaled', 'xavier'"),
        ({"input_norm": "layer"}, r"input_norm \(='layer'\) must be one of 'none', 'image'"),
        ({"patch_init": "mae"}, r"patch_init \(='mae'\) must be one of 'released', 'xavier', 'whitened'"),
        ({"attention": "flash"}, r"attention \(='flash'\) must be one of 'auto', 'xformers', 'sdpa', 'reference'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 32, 32), r"images must be \[B, 3, h, w\], not \(2, 1, 32, 32\)"),
        ((3, 32, 32), r"images must be \[B, 3, h, w\], not \(3, 32, 32\)"),
        ((2, 3, 32, 30), r"patch_size \(=8\) must divide the height \(=32\) and the width \(=30\)"),
    ],
)
def test_refuses_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(**SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("layers", [(), (4,), (1, -1)])
def test_refuses_layers_that_it_has_not(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        ViT(**SMALL).forward_layers(torch.zeros(1, 3, 32, 32), layers=layers)
    assert str(error.value) == (
        f"layers (={layers}) must be numbers of blocks, from 1 to the encoder's depth (=3), or 0 for the input of the "
        "first"
    )


def test_patch_grid_is_rows_by_columns() -> None:
    assert patch_grid((48, 32), 8) == (6, 4)


def test_input_norm_takes_away_the_colour_and_scale_of_an_image() -> None:
    vit = ViT(**SMALL, input_norm="image").double()  # type: ignore[arg-type]
    plain = ViT(**SMALL).double()  # type: ignore[arg-type]
    plain.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, *SMALL["image_size"], dtype=torch.float64) * 3  # type: ignore[call-overload]
    centred = images - images.mean((2, 3), keepdim=True)
    by_hand = torch.stack([x / (x.flatten().std() + 0.1) for x in centred])
    torch.testing.assert_close(vit(images), plain(by_hand))
    tinted = images + torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(vit(tinted), vit(images))
    assert torch.isfinite(vit(torch.zeros_like(images))).all()
