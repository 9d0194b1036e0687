"""The cross-attention predictor against torch's MultiheadAttention, one target set after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa_kit.config import config_from_dict
from jepa_kit.encoders.positions import sincos_2d
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.predictors import CrossPredictor
from jepa_kit.predictors.cross import context_rows
from jepa_kit.structures import MaskBatch, PatchSets, Tokens, View

GRID = (4, 6)
DIM, WIDTH, HEADS, OUT, DEPTH = 20, 24, 3, 16, 2
SMALL: dict[str, Any] = {
    "embed_dim": DIM,
    "out_dim": OUT,
    "grid": GRID,
    "width": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
}


def make_predictor(**options: Any) -> CrossPredictor:
    torch.manual_seed(0)
    predictor = CrossPredictor(**{**SMALL, **options}).double()
    for p in predictor.parameters():
        nn.init.normal_(p, std=0.3)
    return predictor


def draw_sets(lengths: tuple[int, ...], image: tuple[int, ...]) -> PatchSets:
    sets = [torch.randperm(GRID[0] * GRID[1])[:n].sort().values for n in lengths]
    return PatchSets.pack(sets, torch.tensor(image))


def ragged_masks() -> MaskBatch:
    """Two images: two contexts of the first, one of the second; target sets in an order of their own."""
    context = draw_sets((7, 1, 12), (0, 0, 1))
    targets = draw_sets((3, 5, 1, 4, 2), (1, 0, 0, 1, 0))
    return MaskBatch(context, targets, GRID, torch.tensor([2, 0, 1, 2, 1]))


def paired_masks() -> MaskBatch:
    """One target set of each context, of other lengths."""
    return MaskBatch(draw_sets((7, 1), (0, 1)), draw_sets((3, 5), (0, 1)), GRID, torch.tensor([0, 1]))


def uniform_masks() -> MaskBatch:
    return MaskBatch(draw_sets((6, 6), (0, 1)), draw_sets((4,) * 4, (0, 1, 0, 1)), GRID, torch.tensor([0, 1, 0, 1]))


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def attended(attention: Any, x: Tensor, keys: Tensor) -> Tensor:
    """Attention of one set by torch: [L, E] to [Lk, D] -> [L, E]."""
    if hasattr(attention, "qkv"):
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias
    else:
        weights = [getattr(attention, name).weight for name in "qkv"]
        biases = torch.cat([getattr(attention, name).bias for name in "qkv"])
    return nn.functional.multi_head_attention_forward(
        x[:, None],
        keys[:, None],
        keys[:, None],
        embed_dim_to_check=WIDTH,
        num_heads=HEADS,
        in_proj_weight=None,
        in_proj_bias=biases,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=attention.proj.weight,
        out_proj_bias=attention.proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=weights[0],
        k_proj_weight=weights[1],
        v_proj_weight=weights[2],
        need_weights=False,
    )[0][:, 0]


def plain_predictor(predictor: CrossPredictor, layers: list[Tokens], masks: MaskBatch) -> Tensor:
    """For each target set: its queries through the blocks, each of which attends to a mix of the layers."""
    out = []
    for own, c in zip(masks.targets.split(), masks.context_of.tolist(), strict=True):
        seen = [torch.cat([x.prefix[c], x.patches.split(masks.context.lengths.on_host)[c]]) for x in layers]
        x = predictor.mask_token + sincos_2d(WIDTH, GRID).double()[own]
        for i, block in enumerate(predictor.blocks):
            b: Any = block
            mix = [1.0] if predictor.mix is None else predictor.mix[i]
            keys = normed(sum(w * y for w, y in zip(mix, seen, strict=True)), b.norm_context)  # type: ignore[arg-type]
            if b.self_attn is not None:
                y = normed(x, b.norm_self)
                x = x + attended(b.self_attn, y, y)
            x = x + attended(b.cross_attn, normed(x, b.norm1), keys)
            hidden = nn.functional.gelu(nn.functional.linear(normed(x, b.norm2), b.mlp.fc1.weight, b.mlp.fc1.bias))
            x = x + nn.functional.linear(hidden, b.mlp.fc2.weight, b.mlp.fc2.bias)
        out.append(nn.functional.linear(normed(x, predictor.norm), predictor.proj.weight, predictor.proj.bias))
    return torch.cat(out)


def draw_tokens(masks: MaskBatch, k: int = 0) -> Tokens:
    """Random tokens of the contexts with a gradient, after k prefix tokens of each."""
    patches = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64, requires_grad=True)
    prefix = torch.randn(len(masks.context), k, DIM, dtype=torch.float64, requires_grad=True)
    return Tokens(patches, prefix)


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("make_masks", [ragged_masks, paired_masks, uniform_masks])
def test_equals_one_set_after_another(make_masks: Any, self_attention: bool) -> None:
    predictor, masks = make_predictor(self_attention=self_attention), make_masks()
    tokens = draw_tokens(masks)
    ours, theirs = predictor(tokens.patches, masks), plain_predictor(predictor, [tokens], masks)
    assert ours.shape == (masks.targets.num_patches, OUT)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    inputs = (tokens.patches, *predictor.parameters())
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make_masks", [ragged_masks, paired_masks, uniform_masks])
@pytest.mark.parametrize("k", [0, 2])
def test_a_mix_of_layers_with_and_without_a_prefix(make_masks: Any, k: int) -> None:
    predictor, masks = make_predictor(layers=(0, 2, 1), prefix=bool(k)), make_masks()
    assert predictor.uses_layers == (0, 2, 1)
    layers = [draw_tokens(masks, k) for _ in range(3)]
    other = draw_tokens(masks, k)  # the output of the last layer, which is not one of those that are mixed
    ours = predictor(other.patches, masks, layers=layers, **({"prefix": other.prefix} if k else {}))
    theirs = plain_predictor(predictor, layers, masks)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    inputs = (predictor.mix, *(x.patches for x in layers))
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_the_prefix_alone_is_attended_to() -> None:
    predictor, masks = make_predictor(prefix=True), ragged_masks()
    assert predictor.uses_prefix
    assert predictor.uses_layers == ()
    tokens = draw_tokens(masks, 1)
    found = predictor(tokens.patches, masks, prefix=tokens.prefix)
    torch.testing.assert_close(found, plain_predictor(predictor, [tokens], masks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("self_attention", [False, True])
def test_only_with_self_attention_does_a_prediction_depend_on_other_targets(self_attention: bool) -> None:
    predictor, masks = make_predictor(self_attention=self_attention), paired_masks()
    tokens = draw_tokens(masks)
    kept = torch.tensor([True, False, True, True, False, True, True, False])
    some = MaskBatch(masks.context, masks.targets.select(kept), GRID, masks.context_of)
    whole, part = predictor(tokens.patches, masks)[kept], predictor(tokens.patches, some)
    assert torch.allclose(whole, part, rtol=0, atol=1e-12) != self_attention


def test_rows_of_contexts() -> None:
    lengths, source = context_rows(ragged_masks(), 1)
    assert list(lengths) == [13, 8, 2, 13, 2]
    assert source is not None
    parts = source.split(lengths.on_host)
    assert parts[0].tolist() == parts[3].tolist() == [*range(10, 23)]
    assert parts[1].tolist() == [*range(8)]
    assert parts[2].tolist() == parts[4].tolist() == [8, 9]
    assert context_rows(paired_masks()) == (paired_masks().context.lengths, None)
    assert context_rows(uniform_masks())[1] is not None


def test_in_half_precision_it_is_the_same_within_its_rounding() -> None:
    predictor, masks = make_predictor(layers=(0, 1), self_attention=True), ragged_masks()
    layers = [draw_tokens(masks) for _ in range(2)]
    exact = plain_predictor(predictor, layers, masks)
    narrow = [Tokens(*(x.float() for x in tokens)) for tokens in layers]
    with torch.autocast("cpu", torch.bfloat16):
        out = predictor.float()(narrow[0].patches, masks, layers=narrow)
    # bf16 has 8 bits: errors of about 1 % after a dozen products in a row.
    assert float((out - exact).detach().norm() / exact.detach().norm()) < 0.03


# --- initialisation ---


@pytest.mark.parametrize("init", ["released", "depth_scaled", "xavier"])
def test_init_leaves_nothing_as_it_was(init: Any) -> None:
    predictor = CrossPredictor(**SMALL, init=init, layers=(0, 1), self_attention=True)
    for x in (*predictor.parameters(), *predictor.buffers()):
        nn.init.constant_(x, math.nan)
    predictor.init_weights()
    for name, x in (*predictor.named_parameters(), *predictor.named_buffers()):
        assert torch.isfinite(x).all(), name
    assert torch.equal(predictor.pos_embed, sincos_2d(WIDTH, GRID))


def test_init_depth_scaled_divides_what_ends_each_branch() -> None:
    predictors = []
    for init in ("released", "depth_scaled"):
        torch.manual_seed(0)
        predictors.append(CrossPredictor(**SMALL, init=init, self_attention=True))  # type: ignore[arg-type]
    names = ("cross_attn.proj", "self_attn.proj", "mlp.fc2", "mlp.fc1", "cross_attn.q")
    for i in range(DEPTH):
        for name in names:
            plain, scaled = (p.state_dict()[f"blocks.{i}.{name}.weight"] for p in predictors)
            torch.testing.assert_close(scaled, plain / (1 if name in names[3:] else (2 * i + 2) ** 0.5))


def test_the_first_mix_has_a_variance_of_one_over_the_layers() -> None:
    torch.manual_seed(0)
    predictor = CrossPredictor(**{**SMALL, "width": 4, "num_heads": 1, "depth": 100}, layers=tuple(range(16)))
    assert predictor.mix is not None
    assert float(predictor.mix.detach().var()) * 16 == pytest.approx(1, abs=0.15)  # 4 standard errors


# --- in a recipe ---


RAW: dict[str, Any] = {
    "masker": {"name": "random"},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "class_token": True},
    "predictor": {"name": "cross", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "pixel"},
    "loss": {"name": "l2"},
    "target_update": {"name": "none"},
    "data": {"image_size": 16},
}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("layers", [None, [0, 1], [2, 0]])
def test_a_recipe_gives_what_the_predictor_declares(prefix: bool, layers: Any) -> None:
    options = {"prefix": prefix, "layers": layers}
    recipe: Any = build_recipe(config_from_dict({**RAW, "predictor": {**RAW["predictor"], **options}})).double()
    context = PatchSets.pack([torch.tensor([0, 3, 9]), torch.tensor([15])])
    masks = MaskBatch(context, PatchSets.pack([torch.tensor([1]), torch.tensor([4, 5])]), (4, 4), torch.arange(2))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    out = recipe.predict(View(images, masks))
    encoder = recipe.encoder
    numbers = [2] if layers is None else layers
    seen = encoder.forward_tokens(images, context, layers=numbers)
    if not prefix:
        seen = [Tokens(x.patches, x.prefix[:, :0]) for x in seen]
    arguments = {"layers": seen} if layers else {}
    if prefix:
        arguments["prefix"] = seen[0].prefix
    torch.testing.assert_close(out.prediction, recipe.predictor(seen[0].patches, masks, **arguments))
    torch.testing.assert_close(out.context, encoder(images, context))


def test_layers_that_the_encoder_lacks_are_refused() -> None:
    config = config_from_dict({**RAW, "predictor": {**RAW["predictor"], "layers": [1, 3]}})
    with pytest.raises(ConfigError, match=r"recipe: layers \(=\(1, 3\)\) must be .* the encoder's depth \(=2\)"):
        build_recipe(config)


# --- refusals ---


def test_refuses_masks_of_another_grid() -> None:
    masks = uniform_masks()
    other = MaskBatch(masks.context, masks.targets, (6, 4), masks.context_of)
    with pytest.raises(ValueError, match=r"masks.grid \(=\(6, 4\)\) must be the predictor's \(=\(4, 6\)\)"):
        make_predictor()(torch.zeros(12, DIM, dtype=torch.float64), other)


@pytest.mark.parametrize("prefix", [None, torch.zeros(2, 0, DIM)])
def test_refuses_an_encoder_without_a_prefix(prefix: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"^prefix \(=True\) needs an encoder that has a class token or registers$"):
        make_predictor(prefix=True)(torch.zeros(12, DIM), uniform_masks(), prefix=prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 26, "num_heads": 2}, r"width \(=26\) must be a multiple of 4: sine and cosine of rows and columns"),
        ({"width": 0}, r"width \(=0\) must be a multiple of 4"),
        ({"num_heads": 5}, r"num_heads \(=5\) must divide the width \(=24\)"),
        ({"num_heads": 5, "self_attention": True}, r"num_heads \(=5\) must divide the width \(=24\)"),
        ({"depth": 0}, r"depth \(=0\) must be at least 1"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio \(=0.0\) must be above 0 and finite: the MLP needs a unit"),
        ({"mlp_ratio": math.inf}, r"mlp_ratio \(=inf\) must be above 0 and finite"),
        ({"norm_eps": -1.0}, r"norm_eps \(=-1.0\) must be above 0 and finite"),
        ({"layers": ()}, r"layers \(=\(\)\) must be different numbers of blocks, or null for the output alone"),
        ({"layers": (1, 1)}, r"layers \(=\(1, 1\)\) must be different numbers of blocks"),
        ({"init": "mae"}, r"init \(='mae'\) must be one of 'released', 'depth_scaled', 'xavier'"),
        ({"attention": "flash"}, r"attention \(='flash'\) must be one of"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossPredictor(**{**SMALL, **options})
