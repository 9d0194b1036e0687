"""Which kernel attention launches on CUDA, seen with fake tensors; what is passed to it.

The CPU build of torch has the schemas and the shapes of the CUDA operators, and no kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launched import Launched, on_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kit.encoders import ViT, attend, attention_cuda
from jepa_kit.encoders.attention import describe_backend
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import PatchSets

RAGGED = (3, 17, 1, 5)
KERNELS = {torch.bfloat16: "_flash_attention", torch.float16: "_flash_attention", torch.float32: "_efficient_attention"}


@pytest.fixture
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "_xformers", lambda: (None, "xformers is left out"))


@pytest.fixture
def fake_cuda(no_xformers: None) -> Iterator[None]:
    with FakeTensorMode(), torch.no_grad():
        yield


def launched(lengths: SetLengths, dtype: torch.dtype, width: int = 8) -> Launched:
    lengths = on_cuda(lengths)
    q, k, v = torch.empty(lengths.total, 3, 2, width, device="cuda", dtype=dtype).unbind(1)
    with Launched() as seen:
        out = attend(q, k, v, lengths)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
    return seen


# --- which kernel ---


@pytest.mark.parametrize("width", [8, 24, 80])
@pytest.mark.parametrize("sets", [RAGGED, (5, 5, 5)], ids=["ragged", "uniform"])
@pytest.mark.parametrize("dtype", KERNELS, ids=str)
@pytest.mark.usefixtures("fake_cuda")
def test_one_launch_for_all_sets_whose_lengths_change_from_step_to_step(
    dtype: torch.dtype, sets: tuple[int, ...], width: int
) -> None:
    seen = launched(SetLengths(sets), dtype, width)
    assert seen.attention == [KERNELS[dtype] + "_forward"]
    assert not set(seen.names) & {"cat", "index_select", "clone", "constant_pad_nd"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("fake_cuda")
def test_whole_images_take_torchs_choice_of_kernels(dtype: torch.dtype) -> None:
    for lengths in (SetLengths([9, 9], whole=True), PatchSets.full(2, 9).lengths):
        seen = launched(lengths, dtype).names
        assert not any(name.endswith("_attention_forward") for name in seen)


def test_an_encoder_knows_whole_images() -> None:
    encoder = ViT(image_size=(8, 8), patch_size=4, embed_dim=16, depth=1, num_heads=2)
    images = torch.empty(2, 3, 8, 8)
    assert encoder.embed(images, None)[1].whole
    assert not encoder.embed(images, PatchSets.from_padded(torch.zeros(2, 3, dtype=torch.long)))[1].whole


def test_whole_stays_with_the_lengths_that_move() -> None:
    assert SetLengths([4, 4], whole=True).map_tensors(lambda x: x).whole
    assert not SetLengths([4, 4]).whole


@pytest.mark.usefixtures("fake_cuda")
def test_a_width_that_the_kernels_do_not_take_is_padded() -> None:
    seen = launched(SetLengths(RAGGED), torch.bfloat16, width=6)
    assert seen.attention == ["_flash_attention_forward"]
    assert seen.names.count("constant_pad_nd") == 3


@pytest.mark.parametrize(
    ("sets", "key_lengths", "causal"),
    [(RAGGED, (2, 1, 9, 40), False), (RAGGED, RAGGED, True), ((9, 9, 9), (5, 5, 5), False)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("fake_cuda")
def test_one_launch_with_other_keys_causal_or_a_bias(
    sets: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool, with_bias: bool
) -> None:
    lengths, keys = (on_cuda(SetLengths(each)) for each in (sets, key_lengths))
    pairs = sum(i * j for i, j in zip(sets, key_lengths, strict=True))
    bias = torch.empty(2, pairs, device="cuda") if with_bias else None
    q, k = (torch.empty(each.total, 2, 8, device="cuda", dtype=torch.bfloat16) for each in (lengths, keys))
    with Launched() as seen:
        out = attend(q, k, k, lengths, key_lengths=keys, bias=bias, causal=causal)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    if with_bias:  # no kernel for packed sets; torch decomposes its attention into two products without a GPU
        assert (seen.attention, seen.names.count("bmm")) == ([], 2)
    else:
        assert seen.attention == ["_flash_attention_forward"]


@pytest.mark.parametrize("whole_keys", [False, True])
@pytest.mark.usefixtures("fake_cuda")
def test_whole_images_with_other_keys_take_torchs_choice_if_these_are_whole_too(whole_keys: bool) -> None:
    lengths, keys = on_cuda(SetLengths([9, 9], whole=True)), on_cuda(SetLengths([5, 5], whole=whole_keys))
    q, k = (torch.empty(each.total, 2, 8, device="cuda") for each in (lengths, keys))
    with Launched() as seen:
        attend(q, k, k, lengths, key_lengths=keys)
    assert seen.attention == ([] if whole_keys else ["_efficient_attention_forward"])


@pytest.mark.usefixtures("fake_cuda")
def test_float64_has_no_packed_kernel() -> None:
    assert attention_cuda.packed_kernel(torch.empty(4, 2, 8, device="cuda", dtype=torch.float64)) is None


@pytest.mark.usefixtures("no_xformers")
def test_older_gpus_get_the_kernels_that_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "_is_recent", lambda device: False)
    with FakeTensorMode():
        kernels = {t: attention_cuda.packed_kernel(torch.empty(4, 2, 8, device="cuda", dtype=t)) for t in KERNELS}
    assert kernels[torch.float16] is kernels[torch.float32] is attention_cuda._Efficient
    assert kernels[torch.bfloat16] is None


# --- what is passed to the kernels: with operators of plain maths in their place ---


Sets = tuple[Tensor, Tensor, bool]
"""Offsets of the queries and of the keys, and whether attention is causal."""


def masked(q: Tensor, k: Tensor, sets: Sets) -> Tensor:
    """[P, Pk] -inf between tokens of different sets, and for later keys."""
    places = []
    for x, offsets in zip((q, k), sets, strict=False):
        token = torch.arange(len(x), device=x.device)
        index = torch.bucketize(token, offsets[1:], right=True)
        places.append((index, token - offsets[:-1][index]))
    (of_q, i), (of_k, j) = places
    seen = of_q[:, None] == of_k
    if sets[2]:
        seen &= i[:, None] >= j
    return torch.where(seen, 0.0, -torch.inf).to(q.dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, sets: Sets, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale + masked(q, k, sets)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def plain_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, sets: Sets, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dao et al. 2022, appendix B.4: from the output and the logsumexp, without the scores of the forward pass."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale + masked(q, k, sets)
    weight = torch.exp(scores - logsumexp[..., None])
    of_weight = torch.einsum("ihd,jhd->hij", grad, v)
    of_scores = weight * (of_weight - (grad * out).sum(-1).T[..., None]) * scale
    return (
        torch.einsum("hij,jhd->ihd", of_scores, k),
        torch.einsum("hij,ihd->jhd", of_scores, q),
        torch.einsum("hij,ihd->jhd", weight, grad),
    )


def longest(of_q: Tensor, of_k: Tensor) -> tuple[int, int]:
    return int(of_q.diff().max()), int(of_k.diff().max())


def flash(q, k, v, of_q, of_k, n, m, dropout, causal, debug, *, scale=None, **others):  # type: ignore[no-untyped-def]
    assert (n, m, dropout, debug) == (*longest(of_q, of_k), 0.0, False)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, logsumexp = plain(q, k, v, (of_q, of_k, causal), scale)
    return out, logsumexp, torch.tensor([1, 2]), torch.tensor(3), q.new_empty(0)


def flash_backward(grad, q, k, v, out, lse, of_q, of_k, n, m, dropout, causal, rng, unused, *, scale=None, **others):  # type: ignore[no-untyped-def]
    assert (rng.tolist(), int(unused)) == ([1, 2], 3)
    assert (n, m, dropout) == (*longest(of_q, of_k), 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return plain_gradients(grad, q, k, v, out, lse, (of_q, of_k, causal), scale)


def efficient(q, k, v, bias, of_q, of_k, n, m, dropout, mask, needs_lse=False, *, scale=None, **others):  # type: ignore[no-untyped-def]
    assert (bias, n, m, dropout, len(q)) == (None, *longest(of_q, of_k), 0.0, 1)
    assert mask in (0, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, logsumexp = plain(q[0], k[0], v[0], (of_q, of_k, mask == 1), scale)
    lse = logsumexp if needs_lse else q.new_empty(0)
    return out[None], lse, torch.tensor(1), torch.tensor(2), n, m


def efficient_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, bias, out, of_q, of_k, n, m, lse, dropout, seed, offset, mask, of_bias, *, scale=None, **others
):
    assert (bias, dropout, int(seed), int(offset), of_bias) == (None, 0.0, 1, 2, False)
    assert (n, m) == longest(of_q, of_k)
    assert grad.is_contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grads = plain_gradients(grad[0], q[0], k[0], v[0], out[0], lse, (of_q, of_k, mask == 1), scale)
    return (*(x[None] for x in grads), None)


@pytest.fixture
def plain_operators() -> Iterator[None]:
    """torch's CUDA operators on the CPU; the dispatcher checks arguments and results against their schemas."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        library.impl("_efficient_attention_forward", efficient, "CPU")
        library.impl("_efficient_attention_backward", efficient_backward, "CPU")
        yield


@pytest.mark.parametrize("width", [8, 6, 24])
@pytest.mark.parametrize("kernel", [attention_cuda._Flash, attention_cuda._Efficient])
@pytest.mark.usefixtures("plain_operators")
def test_operators_of_plain_maths_give_attention_and_its_gradients(kernel: Any, width: int) -> None:
    lengths = SetLengths(RAGGED)
    torch.manual_seed(0)
    qkv = torch.randn(lengths.total, 3, 2, width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(lengths.total, 2, width, dtype=torch.float64)

    def gradient(out: Tensor) -> Tensor:
        return torch.autograd.grad(out, qkv, upstream)[0]

    ours = attention_cuda.attend_packed(kernel, *qkv.unbind(1), lengths)
    sets = zip(*(x.split(RAGGED) for x in qkv.unbind(1)), strict=True)
    theirs = torch.cat(
        [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one)).transpose(0, 1) for one in sets]
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("kernel", [attention_cuda._Flash, attention_cuda._Efficient])
@pytest.mark.usefixtures("plain_operators")
def test_operators_of_plain_maths_with_other_keys_and_causal(kernel: Any, width: int, causal: bool) -> None:
    lengths, keys = SetLengths(RAGGED), SetLengths(RAGGED if causal else (2, 1, 9, 40))
    torch.manual_seed(0)
    shapes = [(each.total, 2, width) for each in (lengths, keys, keys)]
    qkv = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    ours = attention_cuda.attend_packed(kernel, *qkv, lengths, keys, causal)
    sets = zip(*(x.split(n) for x, n in zip(qkv, (RAGGED, *[keys.on_host] * 2), strict=True)), strict=True)
    theirs = torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), is_causal=causal).transpose(0, 1)
            for one in sets
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, their in zip(*(torch.autograd.grad(x, qkv, upstream) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [attention_cuda._Flash, attention_cuda._Efficient])
def test_a_step_calls_two_operators_and_fills_nothing_with_zeros(kernel: Any) -> None:
    """torch.nn.attention.varlen fills two tensors with zeros in every backward pass."""
    qkv = torch.empty(26, 3, 2, 8, device="meta", requires_grad=True)
    lengths = SetLengths(RAGGED, "meta")
    with Launched() as seen:
        out = attention_cuda.attend_packed(kernel, *qkv.unbind(1), lengths)
        out.backward(torch.empty_like(out))
    assert qkv.grad is not None
    views = {"unbind", "unsqueeze", "squeeze", "detach", "empty_like"}
    forward, backward, *rest = [name for name in seen.names if name not in views]
    assert forward.endswith("_attention_forward")
    assert backward.endswith("_attention_backward")
    assert rest == ["stack"]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [6, 24, 64, 80, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-6)])
def test_kernels_equal_float64(dtype: torch.dtype, tolerance: float, width: int) -> None:
    """Lengths as in training; outputs are averages of standard normal numbers, and gradients are a few times larger."""
    each = (77, 1, 200, 150, 33, 256)
    torch.manual_seed(0)
    qkv, upstream = torch.randn(sum(each), 3, 4, width), torch.randn(sum(each), 4, width)
    results = []
    for device, kind, backend in (("cuda", dtype, "sdpa"), ("cpu", torch.float64, "reference")):
        x = qkv.to(dtype).to(device, kind).requires_grad_()
        out = attend(*x.unbind(1), SetLengths(each, device), backend)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(out, x, upstream.to(dtype).to(device, kind))
        results.append((out.double().cpu(), grad.double().cpu()))
    (out, grad), (exact, exact_grad) = results
    assert float((out - exact).abs().max()) < tolerance
    assert float((grad - exact_grad).abs().max()) < 5 * tolerance


# --- what the log says ---


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        (torch.bfloat16, "FlashAttention over packed sets, scaled_dot_product_attention over whole images"),
        (torch.float32, "memory-efficient attention over packed sets, scaled_dot_product_attention over whole images"),
        (torch.float64, "dense products and scaled_dot_product_attention"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fake_cuda")
def test_describes_what_runs_on_cuda(dtype: torch.dtype, kernels: str) -> None:
    device = torch.device("cuda")
    described = describe_backend(device, dtype)
    assert described.startswith(f"sdpa ({kernels}); not xformers: ")
    assert describe_backend(device, dtype, "sdpa") == f"sdpa ({kernels})"
    assert describe_backend(device, dtype, "reference") == "reference"


def test_describes_what_runs_on_a_cpu() -> None:
    expected = "sdpa (dense products and scaled_dot_product_attention)"
    assert describe_backend(torch.device("cpu"), torch.float32) == expected
    with pytest.raises(ValueError, match=r"attention \(='xformers'\) cannot run: it has kernels for CUDA only"):
        describe_backend(torch.device("cpu"), torch.float32, "xformers")
