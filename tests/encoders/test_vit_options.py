"""The options of the ViT that I-JEPA's does not use, against `transformers`, plain maths, and one set at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders import ViT
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import PatchSets

SMALL: dict[str, Any] = {"image_size": (16, 16), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
BEIT: dict[str, Any] = {"mask_token": True, "class_token": True, "positions": "none", "layer_scale": 0.1}
EVERY: dict[str, dict[str, Any]] = {
    "learned": {"class_token": True, "registers": 2, "positions": "learned", "mask_token": True},
    "shared": {**BEIT, "relative_bias": "shared"},
    "per block": {"positions": "none", "relative_bias": "per_block", "layer_scale": 0.1},
    "rotary": {"registers": 1, "positions": "rotary", "final_norm": False},
    "rotary_video": {"registers": 1, "positions": "rotary_video"},
    "causal": {"causal": True, "class_token": True, "positions": "rotary"},
    "all": {"class_token": True, "registers": 1, "positions": "rotary", "relative_bias": "shared", "mask_token": True},
}
every = pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)


def make_vit(**options: Any) -> ViT:
    """A ViT in float64 whose every parameter is random, so that none can be swapped or left out unseen."""
    torch.manual_seed(0)
    vit = ViT(**{**SMALL, **options}).double()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return vit.eval()


def make_images(count: int = 3, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def some_hidden(count: int = 3) -> PatchSets:
    hidden = torch.rand(count * 16, generator=torch.Generator().manual_seed(2)) < 0.6
    return replace(PatchSets.full(count, 16), hidden=hidden)


def ragged(sets: PatchSets) -> PatchSets:
    """The same sets, whose lengths are not marked as whole images."""
    return replace(sets, lengths=SetLengths(sets.lengths.on_host))


# --- against transformers ---


def their_names(vit: ViT, blocks: str, scales: tuple[str, str], norms: tuple[str, str]) -> dict[str, Tensor]:
    """The weights that models of transformers share, under their names."""
    ours = vit.state_dict()
    names = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
    for i in range(vit.depth):
        theirs, mine = f"{blocks}.{i}", f"blocks.{i}"
        names |= {f"{theirs}.attention.o_proj": f"{mine}.attn.proj", f"{theirs}.mlp.fc1": f"{mine}.mlp.fc1"}
        names |= {f"{theirs}.mlp.fc2": f"{mine}.mlp.fc2"}
        names |= {f"{theirs}.{norm}": f"{mine}.norm{k}" for k, norm in enumerate(norms, start=1)}
    state = {f"{theirs}.{p}": ours[f"{mine}.{p}"] for theirs, mine in names.items() for p in ("weight", "bias")}
    for i in range(vit.depth):
        for j, letter in enumerate("qkv"):
            for p in ("weight", "bias"):
                state[f"{blocks}.{i}.attention.{letter}_proj.{p}"] = ours[f"blocks.{i}.attn.qkv.{p}"].chunk(3)[j]
        state |= {f"{blocks}.{i}.{name}": ours[f"blocks.{i}.scale{k}"] for k, name in enumerate(scales, start=1)}
    for theirs, mine in (("cls_token", "cls_token"), ("register_tokens", "register_tokens")):
        if mine in ours:
            state[f"embeddings.{theirs}"] = ours[mine][None]
    return state


def their_model(kind: str, vit: ViT, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=vit.embed_dim,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads,
        intermediate_size=4 * vit.embed_dim,
        image_size=16,
        patch_size=vit.patch_size,
        layer_norm_eps=1e-6,
        **options,
    )
    return getattr(transformers, f"{kind}Model")(config).double().eval()


@pytest.mark.parametrize("shared", [True, False])
def test_equals_beit(shared: bool) -> None:
    vit = make_vit(**BEIT, relative_bias="shared" if shared else "per_block")
    own = {"use_shared_relative_position_bias": shared, "use_relative_position_bias": not shared}
    model = their_model("Beit", vit, use_mask_token=True, use_mean_pooling=False, layer_scale_init_value=0.1, **own)
    state = their_names(vit, "layers", ("lambda_1", "lambda_2"), ("layernorm_before", "layernorm_after"))
    state = {name: x for name, x in state.items() if "k_proj.bias" not in name}  # its keys have none
    state["embeddings.mask_token"] = vit.mask_token.detach()[None]  # type: ignore[union-attr]
    for i, table in enumerate(vit.relative.tables):  # type: ignore[union-attr]
        name = "shared_position_bias" if shared else f"layers.{i}.relative_position_bias"
        state[f"{name}.relative_position_bias_table"] = table.detach()
    assert {name for name in model.state_dict() if not name.startswith("pooler")} == set(state)
    model.load_state_dict(state, strict=False)
    images, sets = make_images(), some_hidden()
    hidden = sets.hidden.view(3, 16)  # type: ignore[union-attr]
    expected = model(images, bool_masked_pos=hidden).last_hidden_state
    for form in (sets, ragged(sets)):
        (tokens,) = vit.forward_tokens(images, form)
        torch.testing.assert_close(tokens.prefix, expected[:, :1], rtol=0, atol=1e-12)
        torch.testing.assert_close(tokens.patches, expected[:, 1:].flatten(0, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(vit(images), model(images).last_hidden_state[:, 1:].flatten(0, 1), rtol=0, atol=1e-12)


def test_equals_dinov2_with_registers() -> None:
    vit = make_vit(class_token=True, registers=3, positions="learned", layer_scale=1.0, mask_token=True)
    model = their_model("Dinov2WithRegisters", vit, num_register_tokens=3)
    state = their_names(vit, "encoder.layer", ("layer_scale1.lambda1", "layer_scale2.lambda1"), ("norm1", "norm2"))
    state["embeddings.mask_token"] = vit.mask_token.detach()  # type: ignore[union-attr]
    state["embeddings.position_embeddings"] = vit.pos_embed.detach()[None]
    model.load_state_dict(state)
    images, sets = make_images(), some_hidden()
    hidden = sets.hidden.view(3, 16)  # type: ignore[union-attr]
    expected = model(images, bool_masked_pos=hidden).last_hidden_state
    (tokens,) = vit.forward_tokens(images, sets)
    torch.testing.assert_close(tokens.prefix, expected[:, :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens.patches, expected[:, 4:].flatten(0, 1), rtol=0, atol=1e-12)


def test_equals_the_encoder_of_mae() -> None:
    vit = make_vit(class_token=True)
    model = their_model("ViTMAE", vit, mask_ratio=0.75)
    state = their_names(vit, "layers", (), ("layernorm_before", "layernorm_after"))  # type: ignore[arg-type]
    state["embeddings.position_embeddings"] = F.pad(vit.pos_embed, (0, 0, 1, 0))[None]  # none for the class token
    model.load_state_dict(state)
    images, noise = make_images(), torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    kept = PatchSets.from_padded(noise.argsort(dim=1)[:, :4])
    expected = model(images, noise=noise).last_hidden_state
    (tokens,) = vit.forward_tokens(images, kept)
    torch.testing.assert_close(tokens.prefix, expected[:, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens.patches, expected[:, 1:].flatten(0, 1), rtol=0, atol=1e-12)


def test_a_bias_of_keys_changes_nothing() -> None:
    vit = make_vit(**BEIT, relative_bias="shared")
    images, sets = make_images(), some_hidden()
    before = vit(images, sets)
    before.square().sum().backward()
    for block in vit.blocks:
        of_keys = block.attn.qkv.bias.grad[32:64]  # type: ignore[union-attr]
        torch.testing.assert_close(of_keys, torch.zeros_like(of_keys), rtol=0, atol=1e-10)
        with torch.no_grad():
            block.attn.qkv.bias[32:64] += 1.0  # type: ignore[union-attr, index]
    torch.testing.assert_close(vit(images, sets), before, rtol=0, atol=1e-12)


# --- rotary positions, against plain maths ---


def test_rotary_attention_depends_on_differences_alone() -> None:
    """Queries and keys as complex numbers times e^(i angle), patch by patch."""
    vit = make_vit(positions="rotary", depth=1, rotary_base=50.0, image_size=(16, 24))
    images = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    x, _ = vit.embed(images, None)
    block: Any = vit.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(x)).view(24, 3, 4, 8).unbind(1)  # [N, h, d]
    frequency = [50.0 ** (-i / 2) for i in range(2)]
    scores = torch.empty(4, 24, 24, dtype=torch.float64)
    for a in range(24):
        for b in range(24):
            down, right = a // 6 - b // 6, a % 6 - b % 6
            turns = torch.tensor([right * f for f in frequency] + [down * f for f in frequency])
            turn = torch.polar(torch.ones(4), turns).to(torch.complex128)
            qa, kb = (torch.view_as_complex(y.reshape(4, 4, 2).contiguous()) for y in (q[a], k[b]))
            scores[:, a, b] = (qa * turn * kb.conj()).real.sum(-1) / 8**0.5
    y = torch.einsum("hab,bhd->ahd", scores.softmax(-1), v).reshape(24, 32)
    x = x + block.attn.proj(y)
    x = x + block.mlp(block.norm2(x))
    # The test's angles are float32.
    torch.testing.assert_close(vit.forward_layers(images, layers=(1,), norm=False)[0], x, rtol=0, atol=1e-5)


# --- causal attention ---


@pytest.mark.parametrize("options", [{}, {"class_token": True, "registers": 1}, {"relative_bias": "shared"}])
def test_a_causal_token_depends_on_no_later_patch(options: dict[str, Any]) -> None:
    vit, images = make_vit(causal=True, **options), make_images(1)
    before = vit(images)
    for k in (0, 5, 15):  # in raster order
        changed = images.clone()
        row, column = divmod(k, 4)
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
        different = (vit(changed) - before).abs().amax(1) > 1e-9
        assert different.tolist() == [False] * k + [True] * (16 - k)


def test_the_last_token_of_a_causal_set_attends_to_all() -> None:
    """So it is that of an encoder with one block that is not causal, and is shown no more."""
    causal, plain, images = make_vit(causal=True, depth=1), make_vit(depth=1), make_images(1)
    tokens = causal(images)
    for length in (1, 7, 16):
        shown = PatchSets.from_padded(torch.arange(length)[None])
        torch.testing.assert_close(tokens[length - 1], plain(images, shown)[-1], rtol=0, atol=1e-12)
    assert (tokens[7] - plain(images)[7]).abs().max() > 1e-3


# --- packed sets ---


@every
def test_a_set_gets_what_it_gets_alone(options: dict[str, Any]) -> None:
    vit, images = make_vit(**options), make_images()
    sets = PatchSets.pack([torch.tensor(x) for x in ([3, 9, 1], [5], [0, 1, 15, 8, 7])], torch.tensor([0, 2, 1]))
    if vit.mask_token is not None:
        sets = replace(sets, hidden=torch.arange(9) % 2 == 0)
    (together,) = vit.forward_tokens(images, sets)
    alone = []
    for s, image in enumerate(sets.image.tolist()):
        one = sets.take(torch.tensor([s]).numpy())
        alone += vit.forward_tokens(images[image][None], replace(one, image=torch.tensor([0])))
    torch.testing.assert_close(together.patches, torch.cat([x.patches for x in alone]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.prefix, torch.cat([x.prefix for x in alone]), rtol=0, atol=1e-12)
    assert together.prefix.shape == (3, vit.num_prefix, 32)


@every
def test_all_patches_are_the_full_sets(options: dict[str, Any]) -> None:
    vit, images = make_vit(**options), make_images()
    expected = vit(images)
    for sets in (PatchSets.full(3, 16), ragged(PatchSets.full(3, 16))):
        torch.testing.assert_close(vit(images, sets), expected, rtol=0, atol=1e-12)


@every
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    vit, images = make_vit(**options).train(), make_images()
    sets = some_hidden() if vit.mask_token is not None else PatchSets.full(3, 16)
    (tokens,) = vit.forward_tokens(images, sets)
    (tokens.patches.pow(3).sum() + tokens.prefix.pow(3).sum()).backward()
    for name, p in vit.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@every
def test_nothing_waits_for_the_device(options: dict[str, Any]) -> None:
    """A meta tensor has no values: to read one is an error."""
    with torch.device("meta"):
        vit, images = ViT(**SMALL, **options), torch.zeros(3, 3, 16, 16)
    forms = [PatchSets.full(3, 16), ragged(PatchSets.full(3, 16)), PatchSets.pack([torch.arange(n) for n in (3, 1, 5)])]
    if vit.mask_token is not None:
        forms.append(some_hidden())
    for sets in forms:
        vit(images, sets.to("meta")).sum().backward()


def test_pixels_of_hidden_patches_change_nothing() -> None:
    vit, images, sets = make_vit(**EVERY["learned"]), make_images(), some_hidden()
    before = vit(images, sets)
    hidden = sets.hidden.view(3, 1, 4, 4).double()  # type: ignore[union-attr]
    noise = torch.randn_like(images) * F.interpolate(hidden, scale_factor=4)
    assert torch.equal(vit(images + noise, sets), before)


def test_a_mask_token_without_hidden_patches_changes_nothing() -> None:
    vit, images = make_vit(mask_token=True), make_images()
    plain = make_vit()
    plain.load_state_dict({name: x for name, x in vit.state_dict().items() if name != "mask_token"})
    assert torch.equal(vit(images), plain(images))


# --- other sizes of images ---


@pytest.mark.parametrize("side", [8, 12, 24, 56])
def test_learned_positions_are_interpolated(side: int) -> None:
    vit, images = make_vit(class_token=True, positions="learned", interpolation_offset=0.1), make_images(2, side)
    n = side // 4
    table = vit.pos_embed[1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    scaled = F.interpolate(table, scale_factor=(n + 0.1) / 4, mode="bicubic")
    assert scaled.shape[2:] == (n, n)
    content = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=4)
    x, lengths = vit.embed(images, None)
    x = x.view(2, 1 + n * n, 32)
    assert list(lengths) == [1 + n * n] * 2
    torch.testing.assert_close(x[:, 1:], (content + scaled).flatten(2).mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(x[:, 0], (vit.cls_token + vit.pos_embed[:1]).expand(2, -1), rtol=0, atol=0)


def test_relative_biases_of_smaller_images_are_those_of_the_same_differences() -> None:
    vit = make_vit(**BEIT, relative_bias="shared")
    small, whole = (next(vit.relative(None, SetLengths([1]), grid)) for grid in ((2, 3), (4, 4)))  # type: ignore[misc]
    places = torch.tensor([0, 1, 2, 3, 5, 6, 7])  # class token and the upper left corner
    assert torch.equal(small, whole[:, places][:, :, places])
    with pytest.raises(ValueError) as error:
        vit(make_images(1, 20))
    assert str(error.value) == (
        "images with a grid of 5 x 5 patches are larger than those of training (4 x 4), for which relative_bias has "
        "its tables"
    )


# --- weights ---


@every
def test_init_leaves_nothing_as_it_was(options: dict[str, Any]) -> None:
    vit = ViT(**SMALL, **options)
    for x in (*vit.parameters(), *vit.buffers()):
        nn.init.constant_(x, math.nan)
    vit.init_weights()
    for name, x in (*vit.named_parameters(), *vit.named_buffers()):
        assert torch.isfinite(x).all(), name
        if "token" in name or name == "pos_embed":
            assert float(x.detach().std()) == pytest.approx(0.02, rel=0.5)
        elif "scale" in name:
            assert (x == 0.1).all()
        elif "tables" in name:
            assert not x.any()


@every
def test_the_weights_that_it_shares_with_others_are_drawn_alike(options: dict[str, Any]) -> None:
    """So a config without these options has the weights that it had before they existed."""
    torch.manual_seed(0)
    plain = ViT(**SMALL).state_dict()
    torch.manual_seed(0)
    vit = ViT(**SMALL, **options).state_dict()
    assert {name.partition(".")[0] for name in plain} == {"patch_embed", "blocks", "norm"}
    for name in plain.keys() & vit.keys():
        assert torch.equal(plain[name], vit[name]), name


@pytest.mark.parametrize("decay", [True, False])
def test_tokens_are_decayed_or_not(decay: bool) -> None:
    vit = ViT(**SMALL, class_token=True, registers=1, positions="learned", mask_token=True, decay_tokens=decay)
    without = {name for name, p in vit.named_parameters() if getattr(p, "no_decay", False)}
    assert without == (set() if decay else {"cls_token", "register_tokens", "pos_embed"})


def test_in_half_precision_the_residual_stream_is_float32() -> None:
    for options in EVERY.values():
        vit = ViT(**SMALL, **options)
        with torch.autocast("cpu", torch.bfloat16):
            x, _ = vit.embed(make_images().float(), None)
            assert x.dtype == torch.float32
            with torch.no_grad():
                exact = make_vit(**options)(make_images())
                rounded = make_vit(**options).float()(make_images().float())
        assert float((rounded - exact).norm() / exact.norm()) < 0.05


# --- refusals ---


def test_hidden_patches_need_a_mask_token() -> None:
    with pytest.raises(ValueError) as error:
        make_vit()(make_images(), some_hidden())
    assert str(error.value) == (
        "patches.hidden is given, but this encoder has no mask token: set encoder.mask_token to true, or take a masker "
        "other than 'in_place'"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registers": -1}, "registers (=-1) must be at least 0"),
        (
            {"positions": "fixed"},
            "positions (='fixed') must be one of 'sincos', 'learned', 'rotary', 'rotary_video', 'none'",
        ),
        ({"relative_bias": "yes"}, "relative_bias (='yes') must be one of 'none', 'shared', 'per_block'"),
        ({"layer_scale": math.inf}, "layer_scale (=inf) must be finite, or null for none"),
        ({"interpolation_offset": 1.0}, "interpolation_offset (=1.0) must be in [0, 1)"),
        ({"rotary_base": 0.0}, "rotary_base (=0.0) must be above 0 and finite"),
        (
            {"positions": "rotary", "num_heads": 16},
            "positions (='rotary') need heads whose width (=2) is a multiple of 4: pairs of channels for rows and "
            "columns",
        ),
        (
            {"positions": "rotary_video", "num_heads": 8},
            "positions (='rotary_video') need heads whose width (=4) is even and at least 6: pairs of channels for "
            "time, rows and columns",
        ),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ViT(**{**SMALL, **options})
    assert str(error.value) == message
