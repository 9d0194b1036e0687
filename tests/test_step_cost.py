"""What a training step asks of a device: kernels a block, and no wait of the host. Counted without a GPU."""

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks.count_operators import CountOperators, Phase
from benchmarks.fake_cuda import as_if_on_hopper, on_fake_cuda
from jepa_kit.encoders import ViT
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.interfaces import Masker
from jepa_kit.losses import SmoothL1
from jepa_kit.maskers import RELEASED, MultiBlock
from jepa_kit.precision import autocast_of
from jepa_kit.predictors import TokenPredictor, ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.registry import MASKERS
from jepa_kit.structures import MaskBatch, View
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget

GRID = (8, 8)
BATCH = 4
HYPER = Hyper(lr=1e-3, weight_decay=0.04, momentum=0.996)

FAKE_HAS_NO_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)
"""RuntimeError: a CPU build refuses what such an operator would do next on CUDA."""

LEVEL = {
    "encoder": {"forward": 36, "backward": 29},
    "predictor": {"forward": 18, "backward": 29},
}
"""Kernels of one block in float32: context and target encoder together, and the predictor's."""


def small_jepa(encoder_depth: int = 2, predictor_depth: int = 2, **options: Any) -> JEPA:
    shape = {"num_heads": 2, "attention": "sdpa"}
    encoder = ViT(image_size=(64, 64), patch_size=8, embed_dim=48, depth=encoder_depth, **shape, **options)
    predictor = ViTPredictor(embed_dim=48, out_dim=48, grid=GRID, width=24, depth=predictor_depth, **shape)
    target = RepresentationTarget(embed_dim=48)
    losses: list[tuple[str, nn.Module, float]] = [("smooth_l1", SmoothL1(), 1.0)]
    return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=EMA())


def masks_of(masker: Masker) -> MaskBatch:
    masks = masker(np.arange(BATCH), seed=0, epoch=0, step=0)
    masks.map_tensors(lambda x: x)  # what is derived from masks needs real numbers on the host
    return masks


def count_on_meta(encoder_depth: int, predictor_depth: int) -> dict[str, int]:
    """Kernels of a forward and a backward pass in float32 with the released masks, on meta tensors."""
    masks = masks_of(MultiBlock(grid=GRID, **{**RELEASED, "min_keep": 4, "min_keep_target": 1})).to("meta")
    with torch.device("meta"):
        jepa = small_jepa(encoder_depth, predictor_depth)
        images = torch.empty(BATCH, 3, 64, 64)
    counter = CountOperators(device="meta", phase="forward")
    with counter:
        loss = jepa(View(images, masks)).loss
        counter.phase = "backward"
        loss.backward()
    return {name: phase.kernels for name, phase in counter.phases.items()}


def test_a_block_launches_no_more_kernels_than_the_level_reached():
    """Fewer is progress: lower ``LEVEL``. More needs a reason."""
    base, encoder, predictor = count_on_meta(2, 2), count_on_meta(3, 2), count_on_meta(2, 3)
    added = {
        "encoder": {name: encoder[name] - base[name] for name in base},
        "predictor": {name: predictor[name] - base[name] for name in base},
    }
    assert all(added[part][name] <= LEVEL[part][name] for part in LEVEL for name in base), added


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", MASKERS.names())
def test_the_host_never_waits_for_the_device(name, half):
    """A step on fake CUDA tensors. The CPU build of torch cannot differentiate those, so gradients are made up."""
    options = {"maskers": [{"name": "random"}, {"name": "block"}]} if name == "mixture" else {}
    masks = masks_of(MASKERS.build(name, options, grid=GRID))
    hides = {"mask_token": True, "class_token": True, "positions": "rotary", "layer_scale": 0.1}
    real = small_jepa(**hides if name == "in_place" else {})
    if name == "in_place":
        real.predictor = TokenPredictor(embed_dim=48, out_dim=48)
    with as_if_on_hopper(), FakeTensorMode(allow_non_fake_inputs=True):
        jepa = on_fake_cuda(real)
        images = torch.empty(BATCH, 3, 64, 64, device="cuda")
        on_device = masks.map_tensors(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        optimizer, counter = build_optimizer(jepa), CountOperators()
        jepa.requires_grad_(False)

        def backward(loss: torch.Tensor) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.empty_like(p)

        with mock.patch.object(torch.Tensor, "backward", backward), torch.no_grad(), counter:
            autocast = autocast_of("bf16" if half else "float32", images.device)
            train_step(jepa, optimizer, HYPER, [View(images, on_device)], autocast=autocast, clip_grad=1.0)
    total = sum(counter.phases.values(), Phase())
    assert total.kernels > 100
    assert counter.kernels_of["_fused_adamw_"] > 0
    assert total.syncs == 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.ops.aten.nonzero(x),
        lambda x: torch.ops.aten.index(x, [torch.empty(3, dtype=torch.bool, device="cuda")]),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device="cuda")),
    ],
    ids=["number", "copy", "nonzero", "boolean index", "repeat"],
)
def test_a_wait_is_counted(wait):
    with as_if_on_hopper(), FakeTensorMode(), CountOperators() as counter, contextlib.suppress(FAKE_HAS_NO_NUMBERS):
        wait(torch.empty(3, device="cuda"))
    assert counter.phases["other"].syncs >= 1


def test_a_copy_reads_its_source_alone():
    with CountOperators(device="cpu") as counter:
        torch._foreach_copy_([torch.empty(8, dtype=torch.bfloat16)], [torch.ones(8)])
    assert counter.bytes_of["_foreach_copy_"] == 8 * 4 + 8 * 2


def test_the_optimizer_writes_its_state_too():
    parameter = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    for _ in range(2):
        parameter.grad = torch.ones(8)
        with CountOperators(device="cpu") as counter:
            optimizer.step()
    step = 4
    read = 4 * 8 * 4  # parameter, gradient, two averages
    assert counter.bytes_of["_fused_adamw_"] == read + step + 3 * 8 * 4
