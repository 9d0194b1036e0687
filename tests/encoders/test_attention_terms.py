"""``attend`` with keys of other lengths, a bias and a causal mask, and ``CrossAttention``, against float64 maths."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa_kit.encoders import attend, attention_dense, token_pairs
from jepa_kit.encoders.attention import why_not
from jepa_kit.encoders.blocks import CrossAttention
from jepa_kit.set_lengths import SetLengths

HEADS = 2
RAGGED, OTHER = (3, 17, 1, 5), (2, 1, 9, 20)
UNIFORM, WIDER = (6, 6, 6), (4, 4, 4)
CASES = {
    "keys": (RAGGED, OTHER, None, False),
    "uniform queries, ragged keys": (UNIFORM, (2, 9, 4), "flat", False),
    "ragged queries, uniform keys": ((2, 9, 4), UNIFORM, "flat", False),
    "uniform keys": (UNIFORM, WIDER, None, False),
    "uniform keys, flat": (UNIFORM, WIDER, "flat", False),
    "uniform keys, bias of all": (UNIFORM, WIDER, "all", False),
    "uniform keys, bias of each": (UNIFORM, WIDER, "each", False),
    "bias": (RAGGED, RAGGED, "flat", False),
    "keys and bias": (RAGGED, OTHER, "flat", False),
    "causal": (RAGGED, RAGGED, None, True),
    "causal bias": (RAGGED, RAGGED, "flat", True),
    "uniform causal": (UNIFORM, UNIFORM, None, True),
    "uniform causal bias": (UNIFORM, UNIFORM, "all", True),
    "one set": ((9,), (9,), "each", True),
}
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TOLERANCE = {torch.float64: (1e-13, 1e-12), torch.float32: (2e-6, 1e-5), torch.bfloat16: (2e-2, 5e-2)}
"""Largest difference of outputs, and of gradients."""


def draw(case: str) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and the bias of a case, in float64, and its other arguments."""
    lengths, keys, kind, causal = CASES[case]
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(sum(n), HEADS, 8) for n in (lengths, keys, keys)]
    if kind is not None:
        image = (HEADS, lengths[0], keys[0])
        pairs = sum(i * j for i, j in zip(lengths, keys, strict=True))
        shapes.append({"all": image, "each": (len(lengths), *image), "flat": (HEADS, pairs)}[kind])
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return leaves, {"lengths": lengths, "key_lengths": keys, "causal": causal}


def split_bias(bias: Tensor | None, lengths: Sequence[int], keys: Sequence[int]) -> list[Any]:
    """The bias of each set, by loops over flat positions."""
    if bias is None:
        return [0] * len(lengths)
    if bias.ndim > 2:
        return [bias if bias.ndim == 3 else bias[s] for s in range(len(lengths))]
    out, start = [], 0
    for i, j in zip(lengths, keys, strict=True):
        rows = [bias[:, start + row * j : start + (row + 1) * j] for row in range(i)]
        out.append(torch.stack(rows, dim=1))
        start += i * j
    return out


def plain_code(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lengths: Any, key_lengths: Any, causal: Any
) -> Any:
    """Run the plain code of the docstring of ``attend``."""
    text = inspect.getdoc(attend).split("::\n\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    *lines, result = textwrap.dedent(text).split("\ntorch.cat")
    names = dict(locals(), torch=torch, d=q.shape[-1], biases=split_bias(bias, lengths, key_lengths))
    exec("\n".join(lines), names)
    return eval("torch.cat" + result, names)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["auto", "xformers", "sdpa", "reference", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_plain_code_in_float64(
    case: str, backend: Any, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, terms = draw(case)
    if backend == "padded":  # as on a GPU
        monkeypatch.setattr(attention_dense, "_attend_in_turn_with_terms", attention_dense._attend_padded_with_terms)
        backend = "sdpa"
    elif backend != "auto":
        like = torch.empty(1, HEADS, 8, device=device, dtype=dtype)
        if reason := why_not(backend, like, bias=len(leaves) == 4, causal=terms["causal"]):
            pytest.skip(reason)
    ours = [x.to(device, dtype, copy=True).requires_grad_() for x in leaves]
    exact = [x.to(dtype).to(torch.float64, copy=True).requires_grad_() for x in leaves]
    q, k, v, bias = (*ours, None)[:4]
    each, keys = (SetLengths(terms[name], device) for name in ("lengths", "key_lengths"))
    out = attend(q, k, v, each, backend, key_lengths=keys, bias=bias, causal=terms["causal"])
    expected = plain_code(*(*exact, None)[:4], **terms)
    assert out.dtype == dtype
    tolerance, gradient_tolerance = TOLERANCE[dtype]
    assert float((out.detach().double().cpu() - expected.detach()).abs().max()) < tolerance
    upstream = torch.randn_like(expected).to(dtype)
    mine = torch.autograd.grad(out, ours, upstream.to(device))
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double().cpu() - b).abs().max()) < gradient_tolerance


def test_the_plain_code_without_terms_is_torchs_attention() -> None:
    """The plain code itself, against nn.MultiheadAttention with a mask of its own."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, HEADS, batch_first=True, dtype=torch.float64)
    x, bias = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, HEADS, 5, 5, dtype=torch.float64)
    mask = bias + torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    theirs = mha(x, x, x, attn_mask=mask.flatten(0, 1), need_weights=False)[0]
    qkv = nn.functional.linear(x.flatten(0, 1), mha.in_proj_weight, mha.in_proj_bias).unflatten(-1, (3, HEADS, -1))
    ours = mha.out_proj(plain_code(*qkv.unbind(1), bias, (5, 5), (5, 5), True).flatten(1))
    torch.testing.assert_close(ours.view(2, 5, 8), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_bias_in_another_dtype_is_cast(backend: Any) -> None:
    q, bias = torch.randn(5, HEADS, 8, dtype=torch.bfloat16), torch.randn(HEADS, 13, requires_grad=True)
    out = attend(q, q, q, [3, 2], backend, bias=bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad is not None
    assert torch.equal(out, attend(q, q, q, [3, 2], backend, bias=bias.to(q.dtype)))


@pytest.mark.parametrize("padded", [False, True])
def test_other_sets_change_nothing(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even NaN passes a boundary, forward or backward."""
    if padded:
        monkeypatch.setattr(attention_dense, "_attend_in_turn_with_terms", attention_dense._attend_padded_with_terms)
    (q, k, v, bias), _ = draw("keys and bias")
    before = attend(q, k, v, RAGGED, "sdpa", key_lengths=OTHER, bias=bias)
    q[3:20] = k[2:3] = v[2:3] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    after = attend(q, k, v, RAGGED, "sdpa", key_lengths=OTHER, bias=bias)
    assert torch.equal(after[:3], before[:3])
    assert torch.equal(after[20:], before[20:])
    grads = torch.autograd.grad(after[20:].sum(), leaves)
    assert all(bool(g[20 if g is grads[0] else 3 :].isfinite().all()) for g in grads)


def test_pairs_by_set_then_query_then_key() -> None:
    lengths, keys = SetLengths([2, 1]), SetLengths([1, 3])
    i, j = token_pairs(lengths, keys)
    assert (i.tolist(), j.tolist()) == ([0, 1, 2, 2, 2], [0, 0, 1, 2, 3])
    assert token_pairs(lengths, keys)[0] is i
    assert [x.tolist() for x in token_pairs(lengths)] == [[0, 0, 1, 1, 2], [0, 1, 0, 1, 2]]


def test_relative_positions_of_visible_patches() -> None:
    """The use in the docstring of ``token_pairs``: visible patches get rows and columns of the image's bias."""
    torch.manual_seed(0)
    table = torch.randn(HEADS, 7)  # of 4 patches in a row, by distance from -3 to 3
    relative = torch.arange(4) - torch.arange(4)[:, None] + 3
    patch, lengths = torch.tensor([0, 2, 3, 1, 3]), SetLengths([3, 2])
    i, j = token_pairs(lengths)
    flat = table[:, relative[patch[i], patch[j]]]
    image = table[:, relative]  # [h, 4, 4]
    for ours, visible in zip(split_bias(flat, (3, 2), (3, 2)), ([0, 2, 3], [1, 3]), strict=True):
        assert torch.equal(ours, image[:, visible][:, :, visible])


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_lengths": (2, 3)}, r"key_lengths add up to 5, but k has 6 tokens"),
        ({"lengths": (2, 3)}, r"^lengths add up to 5, but q has 4 tokens"),
        ({"key_lengths": (1, 2, 3)}, r"key_lengths has 3 sets, but lengths has 2: give as many"),
        ({"causal": True}, r"causal attention needs key_lengths equal to lengths: .*; use a bias of 0 and -inf"),
        ({"bias": torch.zeros(2, 4, 6).bool()}, r"bias is added to the scores, so it must be floating .* torch.bool"),
        (
            {"bias": torch.zeros(2, 4, 6)},
            r"equal lengths must be \(2, 12\) or \(2, 2, 3\) or \(2, 2, 2, 3\), not \(2, 4",
        ),
        (
            {"bias": torch.zeros(2, 2, 3), "lengths": (1, 3)},
            r"bias for sets of different lengths must be \(2, 12\), not \(2, 2, 3\)",
        ),
        (
            {"v": torch.zeros(4, 2, 8)},
            r"q must be \[P, heads, .*\], and k and v \[Pk, .*, not .*\(6, 2, 8\), \(4, 2, 8\)",
        ),
        ({"q": torch.zeros(4, 3, 8)}, r"q must be \[P, heads, head_dim\], .*, not \(4, 3, 8\), \(6, 2, 8\)"),
        ({"q": torch.zeros(4, 16)}, r"q must be \[P, heads, head_dim\], .*, not \(4, 16\)"),
        ({"key_lengths": (6, 0)}, r"lengths\[1\] \(=0\) must be at least 1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    k = torch.zeros(6, 2, 8)
    arguments = {"q": torch.zeros(4, 2, 8), "k": k, "v": k, "lengths": (2, 2), "key_lengths": (3, 3)}
    with pytest.raises(ValueError, match=message):
        attend(**(arguments | change))


# --- CrossAttention ---


@pytest.mark.parametrize("key_dim", [None, 12])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_cross_attention_equals_multihead_attention_set_by_set(backend: Any, key_dim: int | None) -> None:
    torch.manual_seed(0)
    ours = CrossAttention(8, HEADS, key_dim=key_dim, backend=backend).double()
    theirs = nn.MultiheadAttention(8, HEADS, kdim=key_dim, vdim=key_dim, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        weights = [getattr(ours, name).weight for name in "qkv"]
        if key_dim is None:
            theirs.in_proj_weight.copy_(torch.cat(weights))
        else:
            for name, weight in zip(("q", "k", "v"), weights, strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(weight)
        theirs.in_proj_bias.copy_(torch.cat([getattr(ours, name).bias for name in "qkv"]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = torch.randn(26, 8).double(), torch.randn(32, key_dim or 8).double()
    out = ours(x, context, SetLengths(RAGGED), SetLengths(OTHER))
    expected = [
        theirs(q, k, k, need_weights=False)[0] for q, k in zip(x.split(RAGGED), context.split(OTHER), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=1e-12)
    # Rows beyond the sets (``fill_rows``) change nothing, and the output has as many rows as the queries.
    more = ours(
        nn.functional.pad(x, (0, 0, 0, 3)),
        nn.functional.pad(context, (0, 0, 0, 1)),
        SetLengths(RAGGED),
        SetLengths(OTHER),
    )
    assert more.shape == (29, 8)
    torch.testing.assert_close(more[:26], out, rtol=0, atol=1e-14)


def test_cross_attention_with_rows_in_several_sets_and_values_of_their_own() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(8, HEADS, key_bias=False).double()
    assert ours.k.bias is None
    x, keys, values = (torch.randn(rows, 8, dtype=torch.float64) for rows in (26, 9, 9))
    source = torch.randint(9, (32,))
    lengths = SetLengths(RAGGED), SetLengths(OTHER)
    found = ours(x, keys, *lengths, values=values, source=source)
    torch.testing.assert_close(found, ours(x, keys[source], *lengths, values=values[source]), rtol=0, atol=1e-14)
    q, k, v = ours.q(x), ours.k(keys[source]), ours.v(values[source])
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
    out = attend(q, k, v, *lengths[:1], "reference", key_lengths=lengths[1])
    torch.testing.assert_close(found, ours.proj(out.flatten(1)), rtol=0, atol=1e-12)


def test_cross_attention_needs_heads_that_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"num_heads \(=3\) must divide the width \(=8\)"):
        CrossAttention(8, 3)
