"""All weights of a block cast at once: the numbers of autocast, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kit.encoders import blocks, casts
from jepa_kit.encoders.blocks import Block
from jepa_kit.set_lengths import SetLengths

LENGTHS = SetLengths([5, 1, 9])


def run(block: Block, enabled: bool = True) -> list[Tensor]:
    """Return output and gradients of a block in bf16."""
    torch.manual_seed(1)
    x = torch.randn(LENGTHS.total, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out = block(x, LENGTHS)
    of = [p for p in block.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), [x, *of])]


def block(**options: Any) -> Block:
    torch.manual_seed(0)
    made = Block(24, 3, **options)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_autocast_bit_for_bit(bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = block(qkv_bias=bias)
    one.mlp.fc1.bias.requires_grad_(not frozen)
    found = run(one)
    monkeypatch.setattr(blocks, "cast_weights", lambda linears, device_type: torch.autograd.set_grad_enabled(True))
    expected = run(one)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_weights_are_cast_in_one_operation() -> None:
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    one, counts = block(), Counter[str]()
    linears = [one.attn.qkv, one.attn.proj, one.mlp.fc1, one.mlp.fc2]
    with torch.autocast("cpu", torch.bfloat16), Count():
        cast = casts.cast_together(linears, "cpu")
        every = [x for affine in cast for x in affine if x is not None]
        torch.autograd.backward(every, [torch.ones_like(x) for x in every])
    assert (counts["_foreach_copy_"], counts["_to_copy"]) == (2, 0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for layer in linears for p in layer.parameters())


def test_the_weights_are_the_blocks_own_again() -> None:
    one = block()
    own = dict(one.named_parameters())
    run(one)
    with pytest.raises(ValueError, match="lengths add up to"), torch.autocast("cpu", torch.bfloat16):
        one(torch.randn(3, 24), SetLengths([4]))
    assert {name: id(p) for name, p in one.named_parameters()} == {name: id(p) for name, p in own.items()}


def test_devices_without_autocast_take_the_weights_as_they_are() -> None:
    one = block().to("meta")
    assert one(torch.empty(LENGTHS.total, 24, device="meta"), SetLengths(LENGTHS.each, "meta")).shape == (15, 24)


def test_other_precisions_are_left_alone() -> None:
    one = block().double()
    linears = [one.attn.qkv, one.mlp.fc1]
    with torch.autocast("cpu", torch.bfloat16):
        assert casts.cast_together(linears, "cpu")[0][0] is one.attn.qkv.weight
    assert casts.cast_together([block().mlp.fc2], "cpu")[0][0].dtype == torch.float32
