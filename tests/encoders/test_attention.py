"""``attend`` against attention that we did not write, for every backend that can run here.

Tolerances are on the largest absolute difference; outputs are averages of standard normal numbers, so of size 1.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders import attention_dense
from jepa_kit.encoders.attention import BACKENDS, attend, why_not
from jepa_kit.set_lengths import SetLengths

CASES = {
    "uniform": (6, 6, 6),
    "one set": (9,),
    "ragged": (3, 17, 1, 5, 17, 40, 1, 2),
    "one token each": (1, 1, 1),
    "nearly uniform": (33, 35, 32, 34),
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-1}

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def draw(lengths: tuple[int, ...], heads: int = 3, width: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), heads, width, dtype=torch.float64, generator=generator) for _ in range(4)]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Written out token by token and head by head: exp(q_i . k_j / sqrt(d)) over its sum, times v_j."""
    out = torch.zeros_like(q)
    start = 0
    for n in lengths:
        here = range(start, start + n)
        for head in range(q.shape[1]):
            for i in here:
                weights = [math.exp(float(q[i, head] @ k[j, head]) / math.sqrt(q.shape[2])) for j in here]
                out[i, head] = sum(w * v[j, head] for w, j in zip(weights, here, strict=True)) / sum(weights)
        start += n
    return out


def torch_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """torch's attention, one set at a time."""
    sets = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    out = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in s)) for s in sets]  # [1, h, L, d] each
    return torch.cat([x[0].transpose(0, 1) for x in out])


def skip_where_it_cannot_run(backend: str, device: str, dtype: torch.dtype) -> None:
    reason = why_not(backend, torch.empty(0, device=device, dtype=dtype))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_equals_plain_maths(backend: str, case: str, dtype: torch.dtype, device: str) -> None:
    if backend != "auto":
        skip_where_it_cannot_run(backend, device, dtype)
    lengths = CASES[case]
    q, k, v, _ = (x.to(device, dtype) for x in draw(lengths))
    expected = plain_attention(*(x.double().cpu() for x in (q, k, v)), lengths)
    out = attend(q, k, v, SetLengths(lengths, device), backend)  # type: ignore[arg-type]
    assert out.dtype == dtype
    assert float((out.double().cpu() - expected).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_torchs_own_in_float64(backend: str, case: str, dtype: torch.dtype, device: str) -> None:
    skip_where_it_cannot_run(backend, device, dtype)
    lengths = CASES[case]
    *qkv, upstream = (x.to(dtype) for x in draw(lengths))
    leaves = [x.to(device, copy=True).requires_grad_() for x in qkv]
    exact = [x.to(torch.float64, copy=True).requires_grad_() for x in qkv]
    attend(*leaves, SetLengths(lengths, device), backend).backward(upstream.to(device))  # type: ignore[arg-type]
    torch_attention(*exact, lengths).backward(upstream.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        assert float((ours.grad.double().cpu() - theirs.grad).abs().max()) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("case", ["uniform", "ragged"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_by_finite_differences(backend: str, case: str) -> None:
    lengths = {"uniform": (3, 3), "ragged": (2, 5, 1, 4)}[case]
    qkv = [x.requires_grad_() for x in draw(lengths, heads=2, width=3)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, lengths, backend), qkv)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(1, 2, 4, 5), (2, 5, 1, 4), (3, 1, 3, 1)], ids=["in order", "not", "two lengths"])
def test_sets_may_come_in_any_order_of_length(lengths: tuple[int, ...]) -> None:
    """Sets of one length are attended to together, which must not show."""
    q, k, v, _ = (x.requires_grad_() for x in draw(lengths, heads=2, width=3))
    torch.testing.assert_close(attend(q, k, v, lengths, "sdpa"), torch_attention(q, k, v, lengths), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_equals_multihead_attention_set_by_set(backend: str) -> None:
    lengths, heads, dim = (4, 11, 1), 2, 12
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    x = torch.randn(sum(lengths), dim, dtype=torch.float64)
    q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).unflatten(-1, (3, heads, -1)).unbind(1)
    ours = mha.out_proj(attend(q, k, v, lengths, backend).flatten(1))  # type: ignore[arg-type]
    theirs = torch.cat([mha(s, s, s, need_weights=False)[0] for s in x.split(lengths)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_gets_what_it_gets_alone(backend: str, dtype: torch.dtype, device: str) -> None:
    skip_where_it_cannot_run(backend, device, dtype)
    lengths = CASES["ragged"]
    q, k, v, _ = (x.to(device, dtype) for x in draw(lengths))
    together = attend(q, k, v, SetLengths(lengths, device), backend)  # type: ignore[arg-type]
    alone = [
        attend(*s, SetLengths([len(s[0])], device), backend)  # type: ignore[arg-type]
        for s in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    assert float((together - torch.cat(alone)).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_tokens_of_other_sets_change_nothing(backend: str) -> None:
    """Not even NaN and infinity pass a boundary."""
    lengths = (16, 17, 3, 17)
    q, k, v, _ = draw(lengths)
    before = attend(q, k, v, lengths, backend).split(lengths)  # type: ignore[arg-type]
    for x in (q, k, v):
        x[16:33] = math.nan
    after = attend(q, k, v, lengths, backend).split(lengths)  # type: ignore[arg-type]
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])


def test_what_is_derived_from_lengths_is_made_once() -> None:
    lengths = SetLengths(CASES["ragged"])
    q, k, v, _ = draw(CASES["ragged"])
    first = attend(q, k, v, lengths, "sdpa")
    layouts = dict(lengths.layouts)
    assert torch.equal(attend(q, k, v, lengths, "sdpa"), first)
    assert all(lengths.layouts[name] is layout for name, layout in layouts.items())


@pytest.mark.parametrize(
    ("lengths", "dtype", "way", "kernel"),
    [
        ((128, 1), torch.float32, "_attend_in_turn", "_products"),
        ((129, 127), torch.float64, "_attend_in_turn", "F.scaled_dot_product_attention"),
        ((9, 16), torch.bfloat16, "_attend_padded", "_products"),  # 32 places for 25 tokens
        ((17, 2), torch.bfloat16, "_attend_by_length", "_products"),  # 48 places for 19
        ((8, 8), torch.float16, "", "_products"),
        ((8, 8), torch.float32, "", "F.scaled_dot_product_attention"),
    ],
)
def test_the_way_on_a_cpu(
    lengths: tuple[int, ...], dtype: torch.dtype, way: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which way is fastest was measured (benchmarks/bench_attention.py); the numbers are the same."""
    taken = []

    def spy(owner: object, name: str, label: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: taken.append(label) or original(*args))

    for name in ("_attend_in_turn", "_attend_padded", "_attend_by_length", "_products"):
        spy(attention_dense, name, name)
    spy(attention_dense.F, "scaled_dot_product_attention", "F.scaled_dot_product_attention")
    q, k, v = (x.to(dtype) for x in draw(lengths)[:3])
    attend(q, k, v, lengths, "sdpa")
    assert [t for t in taken if t.startswith("_attend")] == ([way] if way else [])
    assert kernel in taken
    assert len({t for t in taken if not t.startswith("_attend")}) == (2 if lengths == (129, 127) else 1)


def test_sets_in_the_order_of_their_length_are_not_moved() -> None:
    assert attention_dense._by_length(SetLengths([1, 2, 2, 5])).order is None
    assert attention_dense._by_length(SetLengths([2, 1])).order is not None


def test_plain_lengths_are_taken_too() -> None:
    q, k, v, _ = draw((2, 3))
    assert torch.equal(attend(q, k, v, [2, 3]), attend(q, k, v, SetLengths([2, 3])))


# --- refusals ---


def test_refuses_unlike_shapes() -> None:
    q, k, v, _ = draw((4,))
    with pytest.raises(
        ValueError, match=r"q, k and v must have one shape \[P, heads, head_dim\], not \(4, 3, 8\), \(3, 3, 8\)"
    ):
        attend(q, k[:3], v, [4])
    with pytest.raises(ValueError, match=r"head_dim\], not \(4, 24\), \(4, 24\), \(4, 24\)"):
        attend(*(x.flatten(1) for x in (q, k, v)), [4])


def test_refuses_lengths_that_do_not_add_up() -> None:
    q, k, v, _ = draw((4,))
    with pytest.raises(ValueError, match=r"lengths add up to 5, but q has 4 tokens"):
        attend(q, k, v, [2, 3])


def test_refuses_an_unknown_backend() -> None:
    q, k, v, _ = draw((4,))
    with pytest.raises(
        ValueError,
        match=r"attention \(='flash'\) cannot run: there is no such backend; there are auto, xformers, sdpa, reference",
    ):
        attend(q, k, v, [4], "flash")  # type: ignore[arg-type]


def test_xformers_says_why_it_cannot_run_on_a_cpu() -> None:
    q, k, v, _ = draw((4,))
    with pytest.raises(
        ValueError,
        match=r"attention \(='xformers'\) cannot run: it has kernels for CUDA only, and the tokens are on cpu; use",
    ):
        attend(q, k, v, [4], "xformers")


def test_xformers_says_why_it_cannot_run_in_float64() -> None:
    class OnCuda:
        device = torch.device("cuda")
        dtype = torch.float64

    assert why_not("xformers", OnCuda()) == "it has no float64 kernels; use 'sdpa' or 'reference'"  # type: ignore[arg-type]
