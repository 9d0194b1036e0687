"""Compiled blocks: the same numbers, and how often they are compiled when lengths change at every step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kit.encoders import ViT, compiled
from jepa_kit.encoders.blocks import (
    Block,
    Compile,
    checkpoint_activations,
    compile_blocks,
    make_blocks,
    run_blocks,
)
from jepa_kit.losses import SmoothL1
from jepa_kit.maskers import RELEASED, MultiBlock
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import PatchSets, View
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget

PROGRAMS = 11
"""Compilations of a whole recipe: three regions (before the first attention, between two, behind the last) for each of
encoder, target encoder and predictor; for the two that are trained also the one that joins gradients of q, k and v."""


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before; a compiler that is quick, except where a test takes another; several chunks of rows."""
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    monkeypatch.setattr(compiled, "ROWS", 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def recipe(*, compile: bool, drop_path: float = 0.0) -> JEPA:
    torch.manual_seed(0)
    encoder = ViT(
        image_size=(32, 32), patch_size=4, embed_dim=16, depth=2, num_heads=2, compile=compile, drop_path=drop_path
    )
    predictor = ViTPredictor(
        embed_dim=16, out_dim=16, grid=encoder.grid, width=8, depth=2, num_heads=2, compile=compile, drop_path=drop_path
    )
    target = RepresentationTarget(embed_dim=16)
    losses = [("smooth_l1", SmoothL1(), 1.0)]
    return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=EMA())


def steps(jepa: JEPA, masker: MultiBlock, count: int, batch_size: int = 3, seed: int = 0) -> Tensor:
    """Losses of so many training steps."""
    optimizer = torch.optim.SGD(jepa.parameters(), lr=1e-2)
    torch.manual_seed(seed)
    losses = []
    for step in range(count):
        samples = np.arange(step * batch_size, (step + 1) * batch_size)
        loss = jepa(View(torch.randn(batch_size, 3, 32, 32), masker(samples, seed=seed, epoch=0, step=step))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        jepa.update_target(0.9)
        losses.append(loss.detach())
    return torch.stack(losses)


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


RAGGED = MultiBlock(grid=(8, 8))
STATIC = MultiBlock(grid=(8, 8), truncation="fixed", context_length=12, target_length=4)
TRUNCATED = MultiBlock(grid=(8, 8), **{**RELEASED, "min_keep": 4, "min_keep_target": 1})
MASKERS = pytest.mark.parametrize("masker", [RAGGED, STATIC, TRUNCATED], ids=["ragged", "static", "truncated"])


@MASKERS
def test_a_handful_of_compilations_in_200_steps(masker: MultiBlock) -> None:
    """Counted, and after three steps forbidden."""
    jepa = recipe(compile=True)
    steps(jepa, masker, 3, seed=1)
    warm = compilations()
    assert warm == PROGRAMS
    with torch.compiler.set_stance("fail_on_recompile"):
        losses = steps(jepa, masker, 197)
    assert torch.isfinite(losses).all()
    assert compilations() == warm
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_training_is_the_same(drop_path: float) -> None:
    expected = steps(recipe(compile=False, drop_path=drop_path), RAGGED, 4)
    torch.testing.assert_close(steps(recipe(compile=True, drop_path=drop_path), RAGGED, 4), expected, rtol=1e-5, atol=0)
    assert compilations() > 0


def test_training_in_bf16_is_the_same() -> None:
    runs = []
    for compile in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            jepa = recipe(compile=compile)
            samples = RAGGED(np.arange(3), seed=0, epoch=0, step=0)
            torch.manual_seed(0)
            loss = jepa(View(torch.randn(3, 3, 32, 32), samples)).loss
        loss.backward()
        gradients = [p.grad for p in jepa.parameters() if p.grad is not None]
        runs.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
        assert all(g.dtype == torch.float32 for g in gradients)
    (plain, expected), (ours, found) = runs
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=0)
    assert float((found - expected).norm() / expected.norm()) < 0.02  # two roundings of bf16, of 2**-9 each, on average
    assert compilations() == PROGRAMS


def first_region(regions: compiled.Regions, width: int) -> Tensor:
    norm, qkv = (torch.ones(width), torch.zeros(width)), (torch.eye(width), None)
    return regions.first(torch.randn(5, width), compiled.Before(norm, qkv))


def test_more_sizes_than_torchs_limit_are_all_compiled() -> None:
    """torch's limit is 8 programs for each function."""
    regions, widths = compiled.Regions(1e-6, "eager"), range(8, 18)
    for width in widths:
        assert first_region(regions, width).shape == (5, width)
    assert compilations() == len(widths)


def test_no_run_falls_back_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_PROGRAMS", 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        regions = compiled.Regions(1e-6, "eager")
        first_region(regions, 8)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            first_region(regions, 9)


@pytest.mark.parametrize("relative_bias", ["shared", "per_block"])
def test_an_encoder_with_every_option_is_the_same(relative_bias: Literal["shared", "per_block"]) -> None:
    outputs = []
    for compile in (False, True):
        torch.manual_seed(0)
        vit = ViT(
            image_size=(16, 16),
            patch_size=4,
            embed_dim=16,
            depth=3,
            num_heads=2,
            class_token=True,
            positions="rotary",
            relative_bias=relative_bias,
            layer_scale=0.1,
            compile=compile,
        )
        for p in vit.parameters():
            torch.nn.init.normal_(p, std=0.2)
        y = vit(torch.randn(3, 3, 16, 16), PatchSets.pack([torch.arange(n) for n in (5, 1, 9)]))
        y.square().sum().backward()
        outputs.append((y.detach(), [p.grad for p in vit.parameters()]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert compilations() == 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_gradients_of_biases_are_the_sums_over_all_rows(rows: int, bias: bool) -> None:
    """Rows are summed in chunks; the last one may be incomplete."""
    torch.manual_seed(0)
    block = Block(8, 2, qkv_bias=bias).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if not bias:
        block.mlp.fc1.bias = None
    x, found = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True), []
    for block.compiled in (False, True):
        y = block(x, SetLengths([rows]))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_wide_gradients_are_read_once_for_product_and_bias() -> None:
    """Sums over all rows, which the compiler cannot fuse with what writes the rows, are left for two biases alone."""

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names[func.overloadpacket.__name__] += 1
            if func.overloadpacket is torch.ops.aten.sum and args[0].ndim == 2:
                sums.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

    names, sums = Counter[str](), []
    x, rows = torch.randn(300, 8), 300
    y = Block(8, 2, compiled=True)(x, SetLengths([rows]))
    with Sums():
        y.backward(torch.ones_like(y))
    assert [shape for shape in sums if shape[0] == rows] == [(rows, 8)] * 2  # mlp.fc2 and attn.proj
    assert not names["stack"]


@pytest.mark.parametrize("why", ["hook", "checkpoint", "one"])
def test_blocks_that_need_a_call_of_their_own_get_one(why: str) -> None:
    """FSDP2 gathers a block's weights in a hook of it; a checkpoint computes a block again."""
    torch.manual_seed(0)
    blocks = make_blocks(8, 3, 2, mlp_ratio=2.0, compiled=True)
    x, lengths = torch.randn(5, 8, requires_grad=True), SetLengths([2, 3])
    *_, expected = run_blocks(blocks, x, lengths)
    assert compilations() == 3
    called = []
    if why == "hook":
        blocks[1].register_forward_pre_hook(lambda module, given: called.append(module))
    elif why == "checkpoint":
        checkpoint_activations(blocks)
    else:
        blocks[1].compiled = False
    *_, found = run_blocks(blocks, x, lengths)
    torch.testing.assert_close(found, expected)
    assert len(called) == (why == "hook")


def test_nothing_is_compiled_unless_asked() -> None:
    steps(recipe(compile=False), RAGGED, 1)
    assert compilations() == 0


@pytest.mark.parametrize(
    ("option", "device", "width", "expected"),
    [
        ("auto", "cuda", 768, True),
        ("auto", "cuda", 384, False),
        ("auto", "cpu", 1280, False),
        (False, "cuda", 1280, False),
        (True, "cpu", 16, True),
    ],
)
def test_auto_compiles_wide_encoders_on_cuda(
    option: Compile, device: str, width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    blocks = make_blocks(8, 2, 2, mlp_ratio=2.0, compiled=option)
    assert all(b.compiled == (option is True) for b in blocks)
    compile_blocks(blocks, torch.device(device), width)
    assert all(b.compiled == expected for b in blocks)
    monkeypatch.undo()


def test_auto_does_not_compile_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    blocks = make_blocks(8, 2, 2, mlp_ratio=2.0, compiled="auto")
    compile_blocks(blocks, torch.device("cuda"), 1280)
    assert not any(b.compiled for b in blocks)
    monkeypatch.undo()


def test_a_copied_block_has_its_own_weights() -> None:
    """A target encoder is a copy: the compiled block must not remember the one it was copied from."""
    block, x, lengths = Block(8, 2, compiled=True), torch.randn(5, 8), SetLengths([2, 3])
    before = block(x, lengths)
    other = copy.deepcopy(block)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    plain = copy.deepcopy(other)
    plain.compiled = False
    assert torch.equal(block(x, lengths), before)
    torch.testing.assert_close(other(x, lengths), plain(x, lengths), rtol=1e-5, atol=1e-5)


def test_weights_have_the_same_names() -> None:
    assert list(recipe(compile=True).state_dict()) == list(recipe(compile=False).state_dict())


@pytest.mark.slow
@MASKERS
def test_the_same_with_inductor(masker: MultiBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "inductor")
    expected = steps(recipe(compile=False), masker, 20)
    jepa = recipe(compile=True)
    first = steps(jepa, masker, 20)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6)
    assert compilations() == PROGRAMS
    with torch.compiler.set_stance("fail_on_recompile"):
        steps(jepa, masker, 180)
