"""The transformer block against torch's own encoder layer, stochastic depth, initialisation, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from jepa_kit.encoders.blocks import (
    Attention,
    Block,
    DropPath,
    init_transformer,
    make_blocks,
)
from jepa_kit.encoders.packed import COUNTS, add_rows, fill_rows
from jepa_kit.encoders.products import by_onednn
from jepa_kit.set_lengths import SetLengths

DIM, HEADS = 24, 3


def as_torch_layer(block: Block) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the weights of ours."""
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
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


def random_block() -> Block:
    torch.manual_seed(0)
    block = Block(DIM, HEADS).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block


def test_equals_torchs_encoder_layer_set_by_set() -> None:
    block, lengths = random_block(), SetLengths([5, 1, 9])
    layer = as_torch_layer(block)
    x = torch.randn(lengths.total, DIM, dtype=torch.float64)
    expected = torch.cat([layer(s[None])[0] for s in x.split(lengths.on_host)])
    torch.testing.assert_close(block(x, lengths), expected, rtol=0, atol=1e-12)


def test_its_gradients_too() -> None:
    block, lengths = random_block(), SetLengths([4, 6])
    layer = as_torch_layer(block)
    x = torch.randn(lengths.total, DIM, dtype=torch.float64)
    block(x, lengths).square().sum().backward()
    torch.cat([layer(s[None])[0] for s in x.split(lengths.on_host)]).square().sum().backward()
    for ours, theirs in (
        (block.attn.qkv.weight, layer.self_attn.in_proj_weight),
        (block.attn.qkv.bias, layer.self_attn.in_proj_bias),
        (block.mlp.fc2.weight, layer.linear2.weight),
        (block.norm1.weight, layer.norm1.weight),
    ):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)


def test_norm_eps_is_that_of_every_norm() -> None:
    blocks = make_blocks(8, 2, 2, mlp_ratio=4.0, norm_eps=1e-4)
    assert {m.eps for m in blocks.modules() if isinstance(m, nn.LayerNorm)} == {1e-4}


# --- rows that are no tokens ---


@pytest.mark.parametrize("half", [True, False])
def test_rows_are_added_only_for_products_by_onednn(half: bool) -> None:
    x = torch.randn(259, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert fill_rows(x[:256]).shape == (256, 4)
        filled = fill_rows(x)
        assert by_onednn(x) == (filled is not x)
        double = x.double()
        assert fill_rows(double) is double
    if by_onednn(x):
        assert filled.shape == (264, 4)
    assert torch.equal(filled[: len(x)], x)
    assert not filled[len(x) :].any()


def test_no_tensor_is_filled_with_zeros_to_take_all_rows() -> None:
    lengths = SetLengths([5, 1, 9])
    x = torch.randn(lengths.total, DIM, requires_grad=True)
    with torch.profiler.profile() as profile:
        Block(DIM, HEADS)(x, lengths).sum().backward()
    assert not {event.key for event in profile.key_averages()} & {"aten::slice_backward", "aten::zeros"}


def test_rows_are_few_and_so_are_their_numbers() -> None:
    if not by_onednn(torch.empty(1, 1)):
        pytest.skip("oneDNN computes no products here")
    filled = {n: len(fill_rows(torch.empty(n, 1))) for n in range(1, 4097)}
    assert all(n <= rows < n * (1 + 1 / COUNTS) for n, rows in filled.items())
    assert len({rows for n, rows in filled.items() if n > 2048}) == COUNTS


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_rows_that_are_no_tokens_change_nothing(drop_path: float) -> None:
    block, lengths = random_block(), SetLengths([5, 1, 9])
    block.drop_path = DropPath(drop_path)
    x = torch.randn(lengths.total, DIM, dtype=torch.float64, requires_grad=True)
    runs = []
    for rows in (lengths.total, lengths.total + 7):
        torch.manual_seed(1)
        out = block(add_rows(x, rows), lengths)[: lengths.total]
        runs.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


# --- stochastic depth ---


def test_drop_path_drops_whole_sets_and_scales_the_rest() -> None:
    lengths = SetLengths([3, 1, 5] * 40)
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(lengths.total, 2), lengths)
    kept = [s.unique().tolist() for s in out.split(lengths.on_host)]
    assert all(len(k) == 1 for k in kept)
    assert sorted({k[0] for k in kept}) == pytest.approx([0, 4 / 3])


def test_drop_path_preserves_the_mean() -> None:
    """Sets are kept independently with probability 1 - rate: within 4 standard errors of that."""
    rate, sets = 0.3, 20000
    torch.manual_seed(0)
    mean = DropPath(rate)(torch.ones(sets, 1), SetLengths([1] * sets)).mean()
    error = math.sqrt(rate / (1 - rate) / sets)  # of a variable that is 1 / (1 - rate) or 0
    assert abs(float(mean) - 1) < 4 * error


@pytest.mark.parametrize("training", [True, False])
def test_drop_path_without_a_rate_or_outside_training_does_nothing(training: bool) -> None:
    x, lengths = torch.randn(4, 2), SetLengths([2, 2])
    assert DropPath(0.0 if training else 0.9).train(training)(x, lengths) is x


def test_the_rate_rises_linearly_to_the_last_block() -> None:
    rates = [b.drop_path.rate for b in make_blocks(8, 5, 2, mlp_ratio=4.0, drop_path=0.2)]  # type: ignore[union-attr]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_a_dropped_block_passes_its_input_on() -> None:
    block = Block(DIM, HEADS, drop_path=1 - 1e-9)
    x = torch.randn(6, DIM)
    assert torch.equal(block(x, SetLengths([2, 4])), x)


# --- initialisation ---


def initialised(init: str, depth: int = 3, dim: int = 128) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = make_blocks(dim, depth, 4, mlp_ratio=4.0)
    for p in blocks.parameters():
        nn.init.constant_(p, math.nan)
    init_transformer(blocks, blocks, init)  # type: ignore[arg-type]
    return blocks


@pytest.mark.parametrize("init", ["released", "depth_scaled", "xavier"])
def test_init_sets_every_parameter(init: str) -> None:
    for name, p in initialised(init).named_parameters():
        assert torch.isfinite(p).all(), name
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name


@pytest.mark.parametrize("init", ["released", "depth_scaled", "xavier"])
def test_init_has_the_deviation_it_says(init: str) -> None:
    """Within 3 %: four standard errors of the deviation of 16,384 numbers are 2.2 %."""
    for i, block in enumerate(initialised(init), start=1):
        scale = math.sqrt(2 * i) if init == "depth_scaled" else 1.0
        for linear, expected in (
            (block.attn.qkv, 0.02),
            (block.mlp.fc1, 0.02),
            (block.attn.proj, 0.02 / scale),
            (block.mlp.fc2, 0.02 / scale),
        ):
            if init == "xavier":  # uniform in +- sqrt(6 / (inputs + outputs)): Glorot and Bengio 2010, equation 16
                expected = math.sqrt(2 / sum(linear.weight.shape))
                assert float(linear.weight.detach().abs().max()) <= math.sqrt(3) * expected
            assert float(linear.weight.detach().std()) == pytest.approx(expected, rel=0.03)
            assert abs(float(linear.weight.detach().mean())) < 4 * expected / math.sqrt(linear.weight.numel())


# --- refusals ---


@pytest.mark.parametrize("heads", [5, 0, -3])
def test_refuses_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"num_heads \(={heads}\) must divide the width \(=24\)"):
        Attention(DIM, heads)


@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan])
def test_refuses_a_drop_rate_outside_its_range(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"drop_path \(={rate}\) must be in \[0, 1\)"):
        DropPath(rate)


@pytest.mark.parametrize("depth", [1, 12])
def test_names_the_drop_rate_that_was_given(depth: int) -> None:
    with pytest.raises(ValueError, match=r"drop_path \(=1.5\) must be in \[0, 1\)"):
        make_blocks(8, depth, 2, mlp_ratio=4.0, drop_path=1.5)


def test_refuses_a_depth_below_one() -> None:
    with pytest.raises(ValueError, match=r"depth \(=0\) must be at least 1"):
        make_blocks(8, 0, 2, mlp_ratio=4.0)


@pytest.mark.parametrize("ratio", [0.0, -2.0, 0.01, math.inf, math.nan])
def test_refuses_an_mlp_without_a_unit(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mlp_ratio \(={ratio}\) must be above 0 and finite: the MLP needs a unit"):
        make_blocks(8, 1, 2, mlp_ratio=ratio)


@pytest.mark.parametrize("eps", [0.0, -1e-6, math.inf, math.nan])
def test_refuses_an_eps_that_is_not_positive(eps: float) -> None:
    with pytest.raises(ValueError, match=rf"norm_eps \(={eps}\) must be above 0 and finite"):
        make_blocks(8, 1, 2, mlp_ratio=4.0, norm_eps=eps)


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match=r"attention \(='flash'\) must be one of 'auto', 'xformers', 'sdpa', 'reference'"
    ):
        make_blocks(8, 1, 2, mlp_ratio=4.0, backend="flash")  # type: ignore[arg-type]


def test_refuses_an_unknown_init() -> None:
    with pytest.raises(ValueError, match=r"init \(='he'\) must be one of 'released', 'depth_scaled', 'xavier'"):
        initialised("he")
