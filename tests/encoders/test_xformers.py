"""xformers as a backend: taken if its kernels load, and refused with the reason if they do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launched import Launched, on_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kit.encoders import attend, attention_cuda
from jepa_kit.encoders.attention import describe_backend, why_not
from jepa_kit.set_lengths import SetLengths


def fake_xformers(monkeypatch: pytest.MonkeyPatch, *, loads: bool, refuses: str | None) -> None:
    """An xformers whose operators are registered, and run only if its library loads and they refuse nothing."""

    class Operator:
        NAME = "fa2F@2.5.7-pt"

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def not_supported_reasons(inputs: Any) -> list[str]:
            assert inputs.query.shape[:3] == (1, 1, 1)
            return [refuses] if refuses else []

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        assert loads
        assert not refuses
        return torch.full_like(q, 7)

    fmha = SimpleNamespace(
        ALL_FW_OPS=[Operator],
        ALL_BW_OPS=[Operator],
        Inputs=lambda q, k, v, attn_bias: SimpleNamespace(query=q),
        BlockDiagonalMask=SimpleNamespace(from_seqlens=lambda lengths, keys=None, device=None: lengths),
    )
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers._cpp_lib")}
    modules["xformers"].ops, modules["xformers"]._cpp_lib = modules["xformers.ops"], modules["xformers._cpp_lib"]
    modules["xformers.ops"].fmha = fmha
    modules["xformers.ops"].memory_efficient_attention = attention
    modules["xformers._cpp_lib"]._built_with_cuda = loads
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    """Nothing is remembered of an xformers from one test to the next."""
    cached = (attention_cuda._xformers, attention_cuda._refusal)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def attend_on_fake_cuda(backend: Any = "auto") -> list[str]:
    with FakeTensorMode(), torch.no_grad(), Launched() as seen:
        q = torch.empty(26, 2, 8, device="cuda", dtype=torch.bfloat16)
        attend(q, q, q, on_cuda(SetLengths([13, 13])), backend)
    return seen.names


def test_xformers_is_taken_if_its_kernels_load(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers(monkeypatch, loads=True, refuses=None)
    assert "full_like" in attend_on_fake_cuda()
    assert "full_like" in attend_on_fake_cuda("xformers")
    with FakeTensorMode():
        assert describe_backend(torch.device("cuda"), torch.bfloat16) == "xformers"


@pytest.mark.parametrize(
    ("loads", "refuses", "message"),
    [
        (False, None, "the kernels of this xformers do not load.*torch 2.10.*nvidia-cuda-runtime-cu12==12.8.90"),
        (
            True,
            "xFormers wasn't build with CUDA support",
            r"none of its operators supports bfloat16 with heads of 8 \(fa2F@2.5.7-pt: xFormers wasn't build with CUDA",
        ),
    ],
    ids=["library", "operators"],
)
def test_registered_kernels_that_do_not_run_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, loads: bool, refuses: str | None, message: str
) -> None:
    fake_xformers(monkeypatch, loads=loads, refuses=refuses)
    assert "_flash_attention_forward" in attend_on_fake_cuda()
    with pytest.raises(ValueError, match=rf"attention \(='xformers'\) cannot run: {message}"):
        attend_on_fake_cuda("xformers")


def test_the_installed_xformers_is_asked_for_its_library() -> None:
    """Not a fake one: the names that the answer hangs on exist, and on a CPU build of torch nothing loads."""
    pytest.importorskip("xformers")
    library = pytest.importorskip("xformers._cpp_lib")
    reason = attention_cuda._xformers()[1]
    assert (reason is None) == library._built_with_cuda
    from xformers.ops import fmha

    assert all(hasattr(op, "not_supported_reasons") for op in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS))


def test_auto_does_without_an_xformers_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # what an import then raises is an ImportError
    with FakeTensorMode():
        q = torch.empty(26, 2, 8, device="cuda", dtype=torch.bfloat16)
        reason = why_not("xformers", q)
    assert reason is not None
    assert reason.startswith("xformers does not import (")
    assert "_flash_attention_forward" in attend_on_fake_cuda()


# --- keys of other lengths, bias, causal ---


@pytest.fixture
def real_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of the installed xformers, with attention by plain maths, on a CPU."""
    fmha = pytest.importorskip("xformers.ops.fmha")

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, h, L, d]
        mask = None if attn_bias is None else attn_bias.materialize((*q.shape[:3], k.shape[2]), dtype=q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    ops = SimpleNamespace(fmha=fmha, memory_efficient_attention=attention)
    monkeypatch.setattr(attention_cuda, "_xformers", lambda: (ops, None))
    monkeypatch.setattr("jepa_kit.encoders.attention.why_not_xformers", lambda q, causal: None)


@pytest.mark.parametrize(
    ("lengths", "keys", "causal"),
    [
        ((3, 17, 1), (2, 1, 9), False),
        ((3, 17, 1), (3, 17, 1), True),
        ((4, 4), (7, 7), False),
        ((4, 4), (3, 5), False),
        ((4, 4), (4, 4), True),
    ],
)
@pytest.mark.usefixtures("real_masks")
def test_masks_of_xformers_are_those_of_the_reference(
    lengths: tuple[int, ...], keys: tuple[int, ...], causal: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(n), 2, 8, dtype=torch.float64) for n in (lengths, keys, keys))
    ours, exact = (
        attend(q, k, v, lengths, backend, key_lengths=keys, causal=causal)  # type: ignore[arg-type]
        for backend in ("xformers", "reference")
    )
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("real_masks")
def test_masks_are_cached_by_lengths_of_keys() -> None:
    torch.manual_seed(0)
    q, more = torch.randn(21, 2, 8, dtype=torch.float64), torch.randn(12, 2, 8, dtype=torch.float64)
    lengths = SetLengths((3, 17, 1))
    cases: list[tuple[Tensor, dict[str, Any]]] = [(q, {}), (q, {"causal": True}), (more, {"key_lengths": (2, 1, 9)})]
    for k, terms in cases * 2:
        ours, exact = (attend(q, k, k, lengths, name, **terms) for name in ("xformers", "reference"))
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    assert len(lengths.layouts) == 2


@pytest.mark.usefixtures("real_masks")
def test_xformers_takes_no_bias() -> None:
    q, bias = torch.randn(6, 2, 8), torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match=r"'xformers'\) cannot run: it takes no bias over packed sets; use 'sdpa'"):
        attend(q, q, q, [3, 3], "xformers", bias=bias)
    assert torch.equal(attend(q, q, q, [3, 3], bias=bias), attend(q, q, q, [3, 3], "sdpa", bias=bias))


def test_causal_needs_operators_that_support_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers(monkeypatch, loads=True, refuses=None)
    fmha = sys.modules["xformers.ops"].fmha
    mask = SimpleNamespace(make_causal=lambda: "causal")
    fmha.BlockDiagonalMask = SimpleNamespace(from_seqlens=lambda lengths, keys=None, device=None: mask)
    operator = fmha.ALL_FW_OPS[0]
    fmha.Inputs = lambda q, k, v, attn_bias: attn_bias
    monkeypatch.setattr(operator, "not_supported_reasons", lambda bias: ["no causal mask"] * (bias == "causal"))
    with FakeTensorMode():
        q = torch.empty(26, 2, 8, device="cuda", dtype=torch.bfloat16)
        assert why_not("xformers", q) is None
        assert "no causal mask" in str(why_not("xformers", q, causal=True))
