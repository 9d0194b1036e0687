"""xformers as a backend: taken if its kernels load, and refused with the reason if they do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
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
        BlockDiagonalMask=SimpleNamespace(from_seqlens=lambda lengths, device: lengths),
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
