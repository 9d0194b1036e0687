"""The packed predictor against a plain one that runs torch's own layers, one target block after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa_kit.encoders.blocks import Block
from jepa_kit.encoders.positions import rotary_angles, sincos_2d
from jepa_kit.predictors import ViTPredictor
from jepa_kit.predictors.vit import sequence_order
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, PatchSets

GRID = (4, 6)
DIM, WIDTH, HEADS, OUT = 20, 24, 3, 16
SMALL: dict[str, Any] = {
    "embed_dim": DIM,
    "out_dim": OUT,
    "grid": GRID,
    "width": WIDTH,
    "depth": 2,
    "num_heads": HEADS,
}


def make_predictor(**options: Any) -> ViTPredictor:
    torch.manual_seed(0)
    predictor = ViTPredictor(**{**SMALL, **options}).double()
    for p in predictor.parameters():
        nn.init.normal_(p, std=0.3)
    return predictor.eval()


def draw_sets(lengths: tuple[int, ...], image: tuple[int, ...]) -> PatchSets:
    index = torch.cat([torch.randperm(GRID[0] * GRID[1])[:n].sort().values for n in lengths])
    return PatchSets(index, torch.tensor(image), SetLengths(lengths))


def ragged_masks() -> MaskBatch:
    """Two images: two contexts of the first, one of the second; blocks in an order of their own."""
    context = draw_sets((7, 1, 12), (0, 0, 1))
    targets = draw_sets((3, 5, 1, 4, 2), (1, 0, 0, 1, 0))
    return MaskBatch(context, targets, GRID, torch.tensor([2, 0, 1, 2, 1]))


def uniform_masks() -> MaskBatch:
    context = draw_sets((6, 6), (0, 1))
    return MaskBatch(context, draw_sets((4, 4, 4, 4), (0, 1, 0, 1)), GRID, torch.tensor([0, 1, 0, 1]))


def torch_layer(block: Block) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    ours = block.state_dict()
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    layer.load_state_dict({t + p: ours[o + p] for t, o in names.items() for p in ("weight", "bias")})
    return layer


def plain_predictor(predictor: ViTPredictor, context: Tensor, masks: MaskBatch, prefix: Tensor | None = None) -> Tensor:
    """For each target block: its context's tokens and its mask tokens, each at its position, through the layers."""
    layers = [torch_layer(block) for block in predictor.blocks]  # type: ignore[arg-type]
    positions = sincos_2d(WIDTH, GRID).double()
    tokens, seen = context.split(masks.context.lengths.on_host), masks.context.split()
    out = []
    for own, c in zip(masks.targets.split(), masks.context_of.tolist(), strict=True):
        known = tokens[c] @ predictor.embed.weight.T + predictor.embed.bias + positions[seen[c]]
        hidden = predictor.mask_token + positions[own]
        if prefix is not None:
            known = torch.cat([prefix[c] @ predictor.embed.weight.T + predictor.embed.bias, known])
        x = torch.cat([known, hidden])[None]
        for layer in layers:
            x = layer(x)
        x = nn.functional.layer_norm(x[0, len(known) :], (WIDTH,), predictor.norm.weight, predictor.norm.bias, 1e-6)
        out.append(x @ predictor.proj.weight.T + predictor.proj.bias)
    return torch.cat(out)


@pytest.mark.parametrize("make_masks", [ragged_masks, uniform_masks])
def test_equals_one_block_after_another(make_masks: Any) -> None:
    predictor, masks = make_predictor(), make_masks()
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64)
    out = predictor(context, masks)
    assert out.shape == (masks.targets.num_patches, OUT)
    torch.testing.assert_close(out, plain_predictor(predictor, context, masks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("make_masks", [ragged_masks, uniform_masks])
def test_with_a_prefix_equals_one_block_after_another(make_masks: Any, depth: int) -> None:
    predictor, masks = make_predictor(prefix=True, depth=depth), make_masks()
    assert predictor.uses_prefix
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64, requires_grad=True)
    prefix = torch.randn(len(masks.context), 2, DIM, dtype=torch.float64, requires_grad=True)
    ours, theirs = predictor(context, masks, prefix=prefix), plain_predictor(predictor, context, masks, prefix)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), (context, prefix)) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels 2i and 2i + 1 of x [h, L, d] by angles [L, d], which may differ within a pair."""
    out = torch.empty_like(x)
    for i in range(0, x.shape[-1], 2):
        a, b = x[..., i], x[..., i + 1]
        out[..., i] = a * angles[:, i].cos() - b * angles[:, i].sin()
        out[..., i + 1] = b * angles[:, i + 1].cos() + a * angles[:, i + 1].sin()
    return out


@pytest.mark.parametrize("kind", ["rotary", "rotary_video"])
@pytest.mark.parametrize("make_masks", [ragged_masks, uniform_masks])
def test_rotary_positions_and_mask_tokens_of_each_context(make_masks: Any, kind: Any) -> None:
    """One block after another by plain maths, with two tokens before each context that have no position."""
    predictor = make_predictor(positions=kind, rotary_base=50.0, mask_tokens=2, prefix=True)
    masks, linear, norm = make_masks(), nn.functional.linear, nn.functional.layer_norm
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64)
    prefix = torch.randn(len(masks.context), 2, DIM, dtype=torch.float64)
    table = rotary_angles(WIDTH // HEADS, GRID, 50.0, context, kind)
    tokens, seen = context.split(masks.context.lengths.on_host), masks.context.split()
    expected = []
    for own, c in zip(masks.targets.split(), masks.context_of.tolist(), strict=True):
        number = sum(int(masks.context.image[i] == masks.context.image[c]) for i in range(c))  # 0 or 1
        known = linear(torch.cat([prefix[c], tokens[c]]), predictor.embed.weight, predictor.embed.bias)
        x = torch.cat([known, predictor.mask_token[number].expand(len(own), -1)])
        angles = torch.cat([torch.zeros(2, table.shape[1]), table[seen[c]], table[own]])
        for block in predictor.blocks:
            y = norm(x, (WIDTH,), block.norm1.weight, block.norm1.bias, 1e-6)
            qkv = linear(y, block.attn.qkv.weight, block.attn.qkv.bias).view(len(x), 3, HEADS, -1)
            q, k, v = qkv.permute(1, 2, 0, 3)  # [h, L, d]
            scores = turned(q, angles) @ turned(k, angles).mT / (WIDTH // HEADS) ** 0.5
            x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(norm(x, (WIDTH,), block.norm2.weight, block.norm2.bias, 1e-6))
        x = norm(x[len(known) :], (WIDTH,), predictor.norm.weight, predictor.norm.bias, 1e-6)
        expected.append(linear(x, predictor.proj.weight, predictor.proj.bias))
    torch.testing.assert_close(predictor(context, masks, prefix=prefix), torch.cat(expected), rtol=0, atol=1e-12)


def test_first_mask_tokens_may_be_zero() -> None:
    assert not ViTPredictor(**SMALL, mask_std=0.0, mask_tokens=3).mask_token.any()
    assert ViTPredictor(**SMALL, mask_std=0.5).mask_token.std() > 0.1


def test_equals_the_decoder_of_mae() -> None:
    """Hidden patches are predicted in one pass over all patches and the class token."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.ViTMAEConfig(
        hidden_size=DIM,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=WIDTH,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=HEADS,
        decoder_intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
    )
    decoder = transformers.ViTMAEForPreTraining(config).decoder.double().eval()
    predictor = make_predictor(prefix=True, grid=(4, 4), out_dim=48)
    ours = predictor.state_dict()
    names = {"decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "proj"}
    for i in range(2):
        theirs, mine = f"decoder_layers.{i}", f"blocks.{i}"
        names |= {f"{theirs}.attention.o_proj": f"{mine}.attn.proj", f"{theirs}.layernorm_before": f"{mine}.norm1"}
        names |= {f"{theirs}.layernorm_after": f"{mine}.norm2"}
        names |= {f"{theirs}.mlp.{fc}": f"{mine}.mlp.{fc}" for fc in ("fc1", "fc2")}
    state = {f"{theirs}.{p}": ours[f"{mine}.{p}"] for theirs, mine in names.items() for p in ("weight", "bias")}
    for i in range(2):
        for p in ("weight", "bias"):
            for letter, part in zip("qkv", ours[f"blocks.{i}.attn.qkv.{p}"].chunk(3), strict=True):
                state[f"decoder_layers.{i}.attention.{letter}_proj.{p}"] = part
    state["mask_token"] = ours["mask_token"][None]
    state["decoder_pos_embed"] = nn.functional.pad(predictor.pos_embed, (0, 0, 1, 0))[None]
    decoder.load_state_dict(state)
    order = torch.rand(3, 16).argsort(dim=1)
    kept, hidden = PatchSets.from_padded(order[:, :4]), PatchSets.from_padded(order[:, 4:])
    masks = MaskBatch(kept, hidden, (4, 4), torch.arange(3))
    latent = torch.randn(3, 5, DIM, dtype=torch.float64)
    expected = decoder(latent, ids_restore=order.argsort(dim=1)).logits  # [B, N, out]
    found = predictor(latent[:, 1:].flatten(0, 1), masks, prefix=latent[:, :1])
    torch.testing.assert_close(found, hidden.gather(expected), rtol=0, atol=1e-12)


def test_the_gradient_of_context_and_mask_token_too() -> None:
    predictor, masks = make_predictor(), ragged_masks()
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64, requires_grad=True)
    inputs = (context, predictor.mask_token, predictor.embed.weight)
    ours = torch.autograd.grad(predictor(context, masks).square().sum(), inputs)
    theirs = torch.autograd.grad(plain_predictor(predictor, context, masks).square().sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_blocks_do_not_see_each_other() -> None:
    predictor, masks = make_predictor(), ragged_masks()
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64)
    lengths = masks.targets.lengths.on_host
    before = predictor(context, masks).split(lengths)
    moved = masks.targets.index.clone()
    moved[3:8] = (moved[3:8] + 1) % (GRID[0] * GRID[1])  # the second block
    targets = PatchSets(moved, masks.targets.image, masks.targets.lengths)
    after = predictor(context, MaskBatch(masks.context, targets, GRID, masks.context_of)).split(lengths)
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(after[i], before[i], rtol=0, atol=1e-14)
    assert float((after[1] - before[1]).detach().abs().amin(-1).max()) > 1e-3


def test_a_block_sees_its_own_context_alone() -> None:
    predictor, masks = make_predictor(), ragged_masks()
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64)
    lengths = masks.targets.lengths.on_host
    before = predictor(context, masks).split(lengths)
    context[7] += 1.0  # the only token of context 1, which blocks 2 and 4 are predicted from
    after = predictor(context, masks).split(lengths)
    changed = [not torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(after, before, strict=True)]
    assert changed == [False, False, True, False, True]


def test_positions_of_context_and_target_matter() -> None:
    predictor, masks = make_predictor(), uniform_masks()
    context = torch.randn(masks.context.num_patches, DIM, dtype=torch.float64)
    before = predictor(context, masks)
    for part in ("context", "targets"):
        sets = getattr(masks, part)
        moved = PatchSets((sets.index + 5) % 24, sets.image, sets.lengths)
        other = {"context": masks.context, "targets": masks.targets, part: moved}
        after = predictor(context, MaskBatch(other["context"], other["targets"], GRID, masks.context_of))
        assert float((after - before).detach().abs().mean()) > 1e-3


def test_sequences_are_context_then_targets() -> None:
    masks = ragged_masks()
    order, is_target = sequence_order(masks)
    lengths = masks.sequences
    assert list(lengths) == [12 + 3, 7 + 5, 1 + 1, 12 + 4, 1 + 2]
    parts = order.split(lengths.on_host)
    # Rows 0 to 19 are the context tokens, 20 to 34 the target tokens.
    assert parts[0].tolist() == [*range(8, 20), 20, 21, 22]
    assert parts[2].tolist() == [7, 28]
    assert parts[4].tolist() == [7, 33, 34]
    assert order[is_target].tolist() == list(range(20, 35))


@pytest.mark.parametrize("make_masks", [ragged_masks, uniform_masks])
def test_in_half_precision_it_is_the_same_within_its_rounding(make_masks: Any) -> None:
    predictor, masks = make_predictor().float(), make_masks()
    context = torch.randn(masks.context.num_patches, DIM)
    exact = plain_predictor(predictor.double(), context.double(), masks)
    with torch.autocast("cpu", torch.bfloat16):
        out = predictor.float()(context, masks)
    assert out.shape == exact.shape
    # bf16 has 8 bits: errors of about 1 % after a dozen products in a row.
    assert float((out - exact).detach().norm() / exact.detach().norm()) < 0.03


def test_norm_eps_is_that_of_every_norm() -> None:
    predictor = ViTPredictor(**SMALL, norm_eps=1e-4)
    assert {m.eps for m in predictor.modules() if isinstance(m, nn.LayerNorm)} == {1e-4}


# --- initialisation ---


@pytest.mark.parametrize("init", ["released", "depth_scaled"])
def test_init_leaves_nothing_as_it_was(init: str) -> None:
    predictor = ViTPredictor(**SMALL, init=init)  # type: ignore[arg-type]
    for x in (*predictor.parameters(), *predictor.buffers()):
        nn.init.constant_(x, math.nan)
    predictor.init_weights()
    for name, x in (*predictor.named_parameters(), *predictor.named_buffers()):
        assert torch.isfinite(x).all(), name
    assert float(predictor.mask_token.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert torch.equal(predictor.pos_embed, sincos_2d(WIDTH, GRID))


# --- refusals ---


def test_refuses_masks_of_another_grid() -> None:
    masks = ragged_masks()
    other = MaskBatch(masks.context, masks.targets, (6, 4), masks.context_of)
    with pytest.raises(ValueError, match=r"masks.grid \(=\(6, 4\)\) must be the predictor's \(=\(4, 6\)\)"):
        make_predictor()(torch.zeros(20, DIM, dtype=torch.float64), other)


@pytest.mark.parametrize("prefix", [None, torch.zeros(2, 0, DIM)])
def test_refuses_an_encoder_without_a_prefix(prefix: Tensor | None) -> None:
    masks = uniform_masks()
    with pytest.raises(ValueError, match=r"^prefix \(=True\) needs an encoder that has a class token or registers$"):
        make_predictor(prefix=True).float()(torch.zeros(12, DIM), masks, prefix=prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 26, "num_heads": 2}, r"width \(=26\) must be a multiple of 4: sine and cosine of rows and columns"),
        ({"width": 0}, r"width \(=0\) must be a multiple of 4"),
        ({"positions": "learned"}, r"positions \(='learned'\) must be one of 'sincos', 'rotary', 'rotary_video'"),
        ({"positions": "rotary", "width": 18}, r"positions \(='rotary'\) need heads whose width \(=6\)"),
        ({"rotary_base": math.inf}, r"rotary_base \(=inf\) must be above 0 and finite"),
        ({"mask_tokens": 0}, r"mask_tokens \(=0\) must be at least 1"),
        ({"mask_std": -0.1}, r"mask_std \(=-0.1\) must be at least 0 and finite"),
        ({"num_heads": 5}, r"num_heads \(=5\) must divide the width \(=24\)"),
        ({"depth": 0}, r"depth \(=0\) must be at least 1"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio \(=0.0\) must be above 0"),
        ({"norm_eps": -1.0}, r"norm_eps \(=-1.0\) must be above 0 and finite"),
        ({"drop_path": -0.5}, r"drop_path \(=-0.5\) must be in \[0, 1\)"),
        ({"init": "mae"}, r"init \(='mae'\) must be one of 'released', 'depth_scaled', 'xavier'"),
        ({"attention": "flash"}, r"attention \(='flash'\) must be one of"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTPredictor(**{**SMALL, **options})
