"""Linear layers by oneDNN against ``nn.Linear`` and float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_kit.encoders import products
from jepa_kit.encoders.products import Linear, linear

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of the largest entry."""


def close(a, b, dtype):
    assert (a.double() - b.double()).abs().max() <= TOLERANCE[dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 37])
def test_values_and_gradients_are_those_of_float64(dtype, bias, rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 24, dtype=torch.float64, requires_grad=True)
    exact = nn.Linear(24, 56, bias=bias, dtype=torch.float64)
    ours = Linear(24, 56, bias=bias, dtype=torch.float64)
    ours.load_state_dict(exact.state_dict())
    ours.float() if dtype != torch.float64 else ours
    of_ours = x.detach().to(ours.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = ours(of_ours)
    expected = exact(x)
    assert y.dtype == dtype
    close(y, expected, dtype)
    grad = torch.randn_like(expected)
    y.backward(grad.to(dtype))
    expected.backward(grad)
    for a, b in ((of_ours, x), *zip(ours.parameters(), exact.parameters(), strict=True)):
        assert a.grad.dtype == a.dtype
        close(a.grad, b.grad, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("grad", [True, False])
def test_gelu(dtype, grad):
    torch.manual_seed(0)
    layer, x = Linear(24, 56), torch.randn(9, 24)
    expected = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    if dtype == torch.float64:
        layer, x = layer.double(), x.double()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer.gelu(x)
    assert y.dtype == dtype
    close(y, expected, dtype)


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_without_the_libraries_torch_computes_it(missing, monkeypatch):
    products._available.cache_clear()
    monkeypatch.setattr(getattr(torch.backends, missing), "is_available", lambda: False)
    monkeypatch.setattr(products, "_onednn", None)
    layer, x = Linear(3, 5), torch.randn(2, 3)
    assert torch.equal(linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        assert torch.equal(layer.gelu(x), F.gelu(F.linear(x, layer.weight, layer.bias)))
    products._available.cache_clear()


def test_only_gradients_that_are_needed_are_computed():
    layer, x = Linear(3, 5).requires_grad_(False), torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 3))
    assert layer.weight.grad is None
