"""Training steps for the benchmarks, and functions that measure them.

A step is forward, backward, AdamW and the target encoder's average. ``make_plain`` copies our weights.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from plain_step import IJEPA, Encoder, Predictor, set_attention
from torch import Tensor

from jepa_kit.encoders import SIZES, ViT
from jepa_kit.engine.schedules import Hyper
from jepa_kit.losses import SmoothL1
from jepa_kit.maskers import RELEASED, MultiBlock
from jepa_kit.planning.flops import Lengths, ModelFlops, model_flops
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
HYPER = Hyper(lr=1e-4, weight_decay=0.04, momentum=0.996)
WIDTH = 384
"""Of the predictor."""


def predictor_depth(size: str) -> int:
    """Return 6 up to ViT-B, 12 for larger networks (I-JEPA, A.1)."""
    return 6 if SIZES[size].embed_dim <= SIZES["base"].embed_dim else 12


@dataclass(frozen=True)
class Setting:
    """Sizes of a measurement."""

    size: str
    image_size: int
    patch_size: int
    batch_size: int
    masks: str
    dtype: str
    device: str
    attention: str
    threads: int


def make_ours(s: Setting) -> JEPA:
    """Build jepa_kit's model; weights are drawn on the device, as ViT-H takes 17 s on a CPU."""
    torch.manual_seed(0)
    side = (s.image_size, s.image_size)
    with torch.device(s.device):
        encoder = ViT(image_size=side, patch_size=s.patch_size, size=s.size, attention=s.attention)  # type: ignore[arg-type]
        predictor = ViTPredictor(
            embed_dim=encoder.embed_dim,
            out_dim=encoder.embed_dim,
            grid=encoder.grid,
            width=WIDTH,
            depth=predictor_depth(s.size),
            num_heads=SIZES[s.size].num_heads,
            attention=s.attention,  # type: ignore[arg-type]
        )
        target = RepresentationTarget(embed_dim=encoder.embed_dim)
        losses = [("smooth_l1", SmoothL1(), 1.0)]
        return JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=EMA())


def make_plain(s: Setting, ours: JEPA, *, explicit: bool = False) -> IJEPA:
    """Build the plain model with our weights; ``explicit`` computes attention scores, as the released code does."""
    shape, grid = SIZES[s.size], ours.encoder.grid
    with torch.device(s.device):
        encoder = Encoder(grid, s.patch_size, shape.embed_dim, shape.depth, shape.num_heads, shape.mlp_ratio)
        predictor = Predictor(grid, shape.embed_dim, WIDTH, predictor_depth(s.size), shape.num_heads)
        plain = IJEPA(encoder, predictor)
        set_attention(plain, explicit=explicit, padded=s.masks == "ragged")
    plain.load_state_dict({**plain.state_dict(), **ours.state_dict()})  # position tables are in no state dict of ours
    return plain


def make_images(s: Setting) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(s.batch_size, 3, s.image_size, s.image_size).to(s.device)


def make_masks(s: Setting) -> Iterator[MaskBatch]:
    """Yield the masks of step 0, 1, ..., whose sizes differ as in training."""
    side = s.image_size // s.patch_size
    options = {**RELEASED, "min_keep_target": 1} if s.masks == "uniform" else {}
    masker = MultiBlock(grid=(side, side), **options)
    for step in itertools.count():
        yield masker(np.arange(s.batch_size), seed=0, epoch=step, step=step).to(s.device)


def autocast(s: Setting) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.dtype == "bf16")


# --- measures ---


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Return (wall, CPU of this process) in seconds."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def matrix_peak(s: Setting, repeats: int = 7) -> tuple[float, float]:
    """Return the FLOP/s of a large square matrix product, by wall and CPU time; the best of the repeats."""
    side = 8192 if s.device.startswith("cuda") else 3072
    a, b = (torch.randn(side, side, device=s.device, dtype=DTYPES[s.dtype]) for _ in range(2))
    a @ b
    times = [timed(lambda: a @ b, s.device) for _ in range(repeats)]
    return 2 * side**3 / min(t[0] for t in times), 2 * side**3 / min(t[1] for t in times)


@lru_cache(maxsize=4)
def _flops(s: Setting) -> ModelFlops:
    with torch.device("meta"):
        return model_flops(make_ours(replace(s, device="meta")))


def step_flops(s: Setting, masks: MaskBatch) -> float:
    """Return the FLOP of a step by the formula of jepa_kit/planning/flops.py."""
    flops = _flops(s).training(Lengths.of(masks, s.batch_size))
    assert flops is not None
    return flops


def process_memory(which: str) -> int:
    """Return the memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak (Linux)."""
    # Not getrusage: a process that was spawned begins with the peak of its parent there.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{which}:")))


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu_{platform.machine()}"
