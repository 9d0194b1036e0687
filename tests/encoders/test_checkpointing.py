"""Activation checkpointing: the same gradients, bit for bit, stochastic depth and compilation included; less memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jepa_kit.encoders import ViT, blocks, compiled
from jepa_kit.encoders.blocks import Block, checkpoint_activations
from jepa_kit.losses import SmoothL1
from jepa_kit.maskers import MultiBlock
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import View
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget


def recipe(*, drop_path: float, compile: bool = False) -> JEPA:
    torch.manual_seed(0)
    options = {"depth": 3, "num_heads": 2, "drop_path": drop_path, "compile": compile}
    encoder = ViT(image_size=(32, 32), patch_size=4, embed_dim=16, **options)  # type: ignore[arg-type]
    predictor = ViTPredictor(embed_dim=16, out_dim=16, grid=encoder.grid, width=8, **options)  # type: ignore[arg-type]
    target = RepresentationTarget(embed_dim=16)
    losses = [("smooth_l1", SmoothL1(), 1.0)]
    return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=EMA())


def gradients(jepa: JEPA, *, bf16: bool = False) -> tuple[dict[str, Tensor], int, Tensor]:
    """Gradients by name, numbers kept for the backward pass beside parameters, and the random state afterwards."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in jepa.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.data_ptr()] = x.numel()
        return x

    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    masks = MultiBlock(grid=(8, 8))(np.arange(4), seed=0, epoch=0)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = jepa(View(images, masks)).loss
    loss.backward()
    return {n: p.grad for n, p in jepa.named_parameters() if p.grad is not None}, sum(kept.values()), torch.rand(1)


def checkpointed(jepa: JEPA) -> JEPA:
    checkpoint_activations(jepa.encoder)
    checkpoint_activations(jepa.predictor)
    return jepa


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_the_same_gradients_bit_for_bit(drop_path: float, bf16: bool) -> None:
    wanted, all_kept, state = gradients(recipe(drop_path=drop_path), bf16=bf16)
    found, kept, state_after = gradients(checkpointed(recipe(drop_path=drop_path)), bf16=bf16)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(state, state_after)  # what is drawn next is the same too
    assert kept < 0.5 * all_kept


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_with_compiled_blocks(drop_path: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    wanted = gradients(recipe(drop_path=drop_path, compile=True))[0]
    found = gradients(checkpointed(recipe(drop_path=drop_path, compile=True)))[0]
    torch._dynamo.reset()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)


def test_stochastic_depth_without_its_draws_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is worth something: a checkpoint that does not replay draws gives other gradients."""
    plain = blocks.checkpoint
    forgetful = lambda *args, preserve_rng_state, **options: plain(*args, preserve_rng_state=False, **options)  # noqa: E731
    wanted = gradients(recipe(drop_path=0.5))[0]
    monkeypatch.setattr(blocks, "checkpoint", forgetful)
    found = gradients(checkpointed(recipe(drop_path=0.5)))[0]
    assert any(not torch.equal(found[name], value) for name, value in wanted.items())


def test_without_gradients_nothing_is_kept_or_computed_again() -> None:
    block = Block(8, 2)
    checkpoint_activations(block)
    calls: list[int] = []
    block.mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        block(torch.randn(4, 8), SetLengths([2, 2]))
    assert len(calls) == 1


def test_a_network_without_our_blocks() -> None:
    with pytest.raises(ValueError, match=r"Linear has no block \(a module with is_block = True\), so there is nothing"):
        checkpoint_activations(nn.Linear(2, 2))
