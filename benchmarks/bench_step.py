"""One training step of jepa_kit against a plain, unpacked implementation of the same equations (plain_jepa.py).

Both start from the same weights and see the same images and masks (new masks at every step, as in training); their
losses are compared before anything is timed. A step is forward, backward, AdamW (the same for both) and the target
encoder's average. Times are medians over repeats in which the two take turns. Peak memory is that of a process of its
own for each.

    python benchmarks/bench_step.py --batch-size 16 --threads 2
    python benchmarks/bench_step.py --size base --image-size 224 --masks ragged --dtypes bf16

What the masks are: ``ragged`` is the default multi-block masker (contexts and blocks of different lengths; the plain
side pads them to the longest and masks); ``uniform`` has the released truncation (one length for the batch).

Achieved FLOP/s counts what the equations need, by formula (matrix products and attention of unpadded tokens, backward
as twice forward), over the time of a step; the peak is a large matrix product in the same run and dtype. On a machine
that others use too, wall times are theirs as much as ours: with ``--threads 1`` go by the CPU time of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
from plain_jepa import Encoder, PaddedMasks, PlainJEPA, Predictor
from torch import Tensor

from jepa_kit.encoders import SIZES, ViT
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.engine.step import train_step
from jepa_kit.losses import SmoothL1
from jepa_kit.maskers import RELEASED, MultiBlock
from jepa_kit.predictors import ViTPredictor
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, SetLengths
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "bf16": 1e-2}
"""Largest relative difference between the two losses."""

HYPER = Hyper(lr=1e-4, weight_decay=0.04, momentum=0.996)
WIDTH = 384
"""Of the predictor."""


def predictor_depth(size: str) -> int:
    """6 up to ViT-B, 12 for larger ones (I-JEPA, A.1)."""
    return 6 if SIZES[size].embed_dim <= SIZES["base"].embed_dim else 12


@dataclass(frozen=True)
class Setting:
    """What is measured."""

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
    torch.manual_seed(0)
    side = (s.image_size, s.image_size)
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
    jepa = JEPA(encoder=encoder, predictor=predictor, target=target, losses=losses, target_update=EMA())
    return jepa.to(s.device)


def make_plain(s: Setting, ours: JEPA) -> PlainJEPA:
    shape, grid = SIZES[s.size], ours.encoder.grid
    encoders = [
        Encoder(grid, s.patch_size, shape.embed_dim, shape.depth, shape.num_heads, shape.mlp_ratio) for _ in range(2)
    ]
    predictor = Predictor(grid, shape.embed_dim, WIDTH, predictor_depth(s.size), shape.num_heads)
    plain = PlainJEPA(*encoders, predictor).to(s.device)
    plain.load_state_dict(ours.state_dict())
    return plain


def make_images(s: Setting) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(s.batch_size, 3, s.image_size, s.image_size).to(s.device)


def make_masks(s: Setting) -> Iterator[MaskBatch]:
    """The masks of step 0, 1, ...: in training, no two steps have the same sizes."""
    side = s.image_size // s.patch_size
    options = {**RELEASED, "min_keep_target": 1} if s.masks == "uniform" else {}
    masker = MultiBlock(grid=(side, side), **options)
    for step in itertools.count():
        yield masker(np.arange(s.batch_size), seed=0, epoch=step, step=step).to(s.device)


def autocast(s: Setting) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.dtype == "bf16")


Step = Callable[[MaskBatch], Tensor]


def our_step(s: Setting, jepa: JEPA) -> Step:
    optimizer, images = build_optimizer(jepa), make_images(s)
    return lambda masks: train_step(jepa, optimizer, HYPER, images, masks, autocast=lambda: autocast(s)).loss.detach()


def plain_step(s: Setting, plain: PlainJEPA) -> Step:
    optimizer, images, update = build_optimizer(plain), make_images(s), EMA()

    def step(masks: MaskBatch) -> Tensor:
        set_hyper(optimizer, HYPER)
        with autocast(s):
            loss = plain(images, PaddedMasks(masks))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update.update(plain.target_encoder, plain.encoder, HYPER.momentum)
        return loss.detach()

    return step


# --- measures ---


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """(wall, CPU of this process) in seconds."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def matrix_peak(s: Setting, repeats: int = 7) -> tuple[float, float]:
    """FLOP/s of a large square matrix product in the dtype, by wall and by CPU time; the best of the repeats."""
    side = 8192 if s.device.startswith("cuda") else 3072
    a, b = (torch.randn(side, side, device=s.device, dtype=DTYPES[s.dtype]) for _ in range(2))
    a @ b
    times = [timed(lambda: a @ b, s.device) for _ in range(repeats)]
    return 2 * side**3 / min(t[0] for t in times), 2 * side**3 / min(t[1] for t in times)


def step_flops(s: Setting, masks: MaskBatch) -> float:
    """FLOP of a step by formula: 2 a multiply-add; norms, GELU, softmax, loss and optimiser are left out."""
    shape = SIZES[s.size]
    d, pixels = shape.embed_dim, 3 * s.patch_size**2
    patches = (s.image_size // s.patch_size) ** 2

    def blocks(lengths: SetLengths, dim: int, depth: int, ratio: float) -> float:
        linear = sum(lengths) * 2 * dim * dim * (4 + 2 * ratio)
        return depth * (linear + sum(4 * n * n * dim for n in lengths))

    def encoder(lengths: SetLengths) -> float:
        return sum(lengths) * 2 * pixels * d + blocks(lengths, d, shape.depth, shape.mlp_ratio)

    context, targets = masks.context.lengths, masks.targets.lengths
    pairs = zip(masks.context_of.tolist(), targets, strict=True)
    sequences = SetLengths([context.on_host[c] + n for c, n in pairs])
    predictor = blocks(sequences, WIDTH, predictor_depth(s.size), 4.0) + 2 * d * WIDTH * (context.total + targets.total)
    return encoder(SetLengths([patches] * s.batch_size)) + 3 * (encoder(context) + predictor)


def process_memory(which: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most (Linux)."""
    # Not getrusage: a process that was spawned begins with the peak of its parent there.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{which}:")))


def peak_memory(s: Setting, which: str, out: Any) -> None:
    """Runs in a process of its own: three steps; puts (peak bytes, bytes before the first step)."""
    torch.set_num_threads(s.threads)
    ours = make_ours(s)
    step = our_step(s, ours) if which == "ours" else plain_step(s, make_plain(s, ours))
    if which == "plain":
        del ours
    masks = list(itertools.islice(make_masks(s), 3))
    if s.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for m in masks:
            step(m)
        out.put((torch.cuda.max_memory_allocated(), before))
        return
    before = process_memory("VmRSS")
    for m in masks:
        step(m)
    out.put((process_memory("VmHWM"), before))


def in_own_process(s: Setting, which: str) -> tuple[int, int]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=peak_memory, args=(s, which, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def measure(s: Setting, repeats: int) -> dict[str, Any]:
    """Checks that the losses agree, then times and weighs both."""
    ours = make_ours(s)
    steps = {"ours": our_step(s, ours), "plain": plain_step(s, make_plain(s, ours))}
    masks = make_masks(s)
    first = next(masks)
    # Two steps: the second loss has the first one's gradient in it.
    losses = [{name: float(step(m)) for name, step in steps.items()} for m in (first, next(masks))]
    difference = max(abs(loss["ours"] - loss["plain"]) / loss["plain"] for loss in losses)
    if not difference < TOLERANCE[s.dtype]:
        raise SystemExit(f"the two losses differ: {losses}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    flops = []
    for i, m in enumerate(itertools.islice(masks, repeats)):
        flops.append(step_flops(s, m))
        for name in ("ours", "plain") if i % 2 else ("plain", "ours"):
            times[name].append(timed(partial(steps[name], m), s.device))
    del steps, ours
    wall = {name: statistics.median(t[0] for t in of_side) for name, of_side in times.items()}
    ratio, cpu_ratio = (
        statistics.median(a[i] / b[i] for a, b in zip(times["ours"], times["plain"], strict=True)) for i in range(2)
    )
    peak, cpu_peak = matrix_peak(s)
    rate, cpu_rate = (
        {k: statistics.median(f / t[i] for f, t in zip(flops, v, strict=True)) for k, v in times.items()}
        for i in range(2)
    )
    memory = {name: in_own_process(s, name) for name in ("ours", "plain")}
    activations = {name: top - before for name, (top, before) in memory.items()}
    return {
        **asdict(s),
        "loss": losses[0]["ours"],
        "loss_relative_difference": difference,
        "seconds": wall,
        "time_ratio": ratio,
        "cpu_time_ratio": cpu_ratio,
        "peak_bytes": {name: top for name, (top, _) in memory.items()},
        "peak_memory_ratio": memory["ours"][0] / memory["plain"][0],
        "peak_memory_ratio_above_start": activations["ours"] / activations["plain"],
        "tflop_of_a_step": statistics.median(flops) / 1e12,
        "tflops": {name: r / 1e12 for name, r in rate.items()},
        "matrix_peak_tflops": peak / 1e12,
        "share_of_peak": {name: r / peak for name, r in rate.items()},
        "share_of_peak_by_cpu_time": {name: r / cpu_peak for name, r in cpu_rate.items()},
        "repeats": repeats,
    }


def describe(r: dict[str, Any]) -> str:
    share = r["share_of_peak_by_cpu_time"]
    return (
        f"{r['masks']:8s}{r['dtype']:9s}{r['seconds']['ours']:.2f} s, plain {r['seconds']['plain']:.2f} s; "
        f"ratio of time {r['time_ratio']:.2f} (CPU time {r['cpu_time_ratio']:.2f}), "
        f"of peak memory {r['peak_memory_ratio']:.2f} (above the start {r['peak_memory_ratio_above_start']:.2f}); "
        f"{r['tflops']['ours']:.3f} TFLOP/s, {r['share_of_peak']['ours']:.0%} of the matrix peak "
        f"(by CPU time {share['ours']:.0%}, plain {share['plain']:.0%})"
    )


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu_{platform.machine()}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--masks", nargs="+", choices=["ragged", "uniform"], default=["ragged", "uniform"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--attention", default="auto", help="backend of attend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="steps of each side that are timed")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_step.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    version = torch.__version__.split("+")[0]
    name = f"{machine_name(args.device)}_torch{version}_step.json".replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / name
    results = []
    for masks in args.masks:
        for dtype in args.dtypes:
            setting = Setting(
                size=args.size,
                image_size=args.image_size,
                patch_size=args.patch_size,
                batch_size=args.batch_size,
                masks=masks,
                dtype=dtype,
                device=args.device,
                attention=args.attention,
                threads=args.threads,
            )
            r = measure(setting, args.repeats)
            results.append(r)
            print(describe(r), flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine_name(args.device),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "results": results,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
