"""Time a training step with each option of the engine, and plain eager PyTorch with the same maths (plain_step.py).

    python benchmarks/bench_engine.py                     # CPU, one thread: ViT-S/16 and B/16 at 224
    python benchmarks/bench_engine.py --device cuda       # ViT-B/16, L/16, H/14 in bf16, and where the time goes
    python benchmarks/bench_engine.py --sizes small --options bf16 bf16_compile --no-processes

Every option is a step of one model, with the same weights, images and (ragged) masks as the plain one. The learning
rate is 0, so that weights stay, and loss and gradient norm must equal the plain ones. All take turns in repeats; times
are medians over repeats, and ratios are computed per repeat. Results:

    seconds, cpu_seconds     of a step; on a shared machine, use the CPU time (with --threads 1)
    ratio, cpu_ratio         over the plain step in the same precision
    images_per_second        by wall clock
    share_of_peak            FLOP of the equations (bench_step.py) over time, over a large matrix product's rate in the
                             same run and precision: by wall clock, and on a CPU by CPU time as well
    peak_bytes               in two steps: of a process of its own, less its imports (CPU); of the allocator, which
                             holds the other models too (CUDA)
    profile                  on CUDA: share of a step's time by kind of kernel, and what no kernel filled

Processes (CPU alone: two, gloo, half the batch each): DDP and FSDP2 against torch's DDP around the plain model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from kernel_kinds import profiled
from plain_step import tables
from steps import (
    Setting,
    autocast,
    machine_name,
    make_images,
    make_masks,
    make_ours,
    make_plain,
    matrix_peak,
    process_memory,
    step_flops,
    timed,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jepa_kit.distributed.collectives import World, process_group
from jepa_kit.encoders import SIZES
from jepa_kit.encoders.blocks import Block
from jepa_kit.engine.optimizer import build_optimizer, clip_gradients
from jepa_kit.engine.parallel import Mode, parallelize
from jepa_kit.engine.schedules import Hyper, set_hyper
from jepa_kit.engine.step import train_step
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, View
from jepa_kit.target_updates import EMA

STILL = Hyper(lr=0.0, weight_decay=0.0, momentum=1.0)
TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of loss and gradient norm from the plain ones."""


@dataclass(frozen=True)
class Option:
    """An option of the engine's step."""

    dtype: str
    compile: bool = False
    checkpointing: bool = False
    accumulate: int = 1


OPTIONS = {
    "float32": Option("float32"),
    "float32_accumulate": Option("float32", accumulate=2),
    "float32_checkpointing": Option("float32", checkpointing=True),
    "bf16": Option("bf16"),
    "bf16_compile": Option("bf16", compile=True),
    "bf16_accumulate": Option("bf16", accumulate=2),
    "bf16_checkpointing": Option("bf16", checkpointing=True),
}
"""``plain`` in the same precision stands beside each."""

Result = tuple[Tensor, Tensor]
"""Loss and norm of the gradients, on the device."""


class Ours:
    """The engine's step; ``use`` switches options of the model on and off."""

    def __init__(self, s: Setting, mode: Mode = "auto") -> None:
        self.s, self.jepa, self.images = s, make_ours(s), make_images(s)
        self.forwards: dict[int, nn.Module] = {}
        self.mode = mode
        self.forward = self.made(1)
        self.optimizer = build_optimizer(self.jepa)

    def made(self, accumulate: int) -> nn.Module:
        if accumulate not in self.forwards:
            self.forwards[accumulate] = parallelize(self.jepa, torch.device(self.s.device), self.mode, accumulate)
        return self.forwards[accumulate]

    def use(self, option: Option) -> None:
        self.forward = self.made(option.accumulate)
        self.s = replace(self.s, dtype=option.dtype)
        for block in self.jepa.modules():
            if isinstance(block, Block):
                block.compiled, block.checkpointed = option.compile, option.checkpointing

    def __call__(self, masks: MaskBatch) -> Result:
        context: Callable[[], AbstractContextManager[object]] = partial(autocast, self.s)
        views = [View(self.images, masks)]
        out = train_step(self.jepa, self.optimizer, STILL, views, forward=self.forward, autocast=context)
        return out.loss.detach(), out.grad_norm


class Plain:
    """The plain step, inside torch's DDP if there are several processes."""

    def __init__(self, s: Setting, ours: JEPA, *, ddp: bool = False) -> None:
        self.s, self.model, self.images = s, make_plain(s, ours), make_images(s)
        self.forward: nn.Module = DistributedDataParallel(self.model) if ddp else self.model
        self.optimizer = build_optimizer(self.model)

    def __call__(self, masks: MaskBatch) -> Result:
        set_hyper(self.optimizer, STILL)
        with autocast(self.s):
            loss = self.forward(self.images, *tables(masks))
        loss.backward()
        norm = clip_gradients(self.model)  # ours tells it at every step
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        EMA().update(self.model.target_encoder, self.model.encoder, STILL.momentum)
        return loss.detach(), norm


Step = Callable[[MaskBatch], Result]


def chosen(s: Setting, name: str, ours: Ours, plain: Plain) -> tuple[Setting, Step]:
    """Prepare a step of an option, or of ``plain_<dtype>``."""
    if name.startswith("plain_"):
        plain.s = replace(s, dtype=name.removeprefix("plain_"))
        return plain.s, plain
    ours.use(OPTIONS[name])
    return ours.s, ours


def with_plain(names: list[str]) -> list[str]:
    """Return the options with the plain step of every precision among them."""
    dtypes = dict.fromkeys(OPTIONS[name].dtype for name in names)
    return [f"plain_{dtype}" for dtype in dtypes] + names


def plain_of(name: str) -> str:
    return name if name.startswith("plain_") else f"plain_{OPTIONS[name].dtype}"


def check(name: str, found: Result, wanted: Result, dtype: str) -> None:
    for what, a, b in zip(("loss", "norm of gradients"), found, wanted, strict=True):
        if not abs(float(a) - float(b)) <= TOLERANCE[dtype] * abs(float(b)):
            raise SystemExit(f"{name}: {what} is {float(a)}, and the plain step's is {float(b)}")


# --- one process ---


def measure(s: Setting, names: list[str], repeats: int, profile: bool) -> dict[str, Any]:
    """Time all options in turns."""
    ours = Ours(s)
    plain = Plain(s, ours.jepa)
    every, masks = with_plain(names), make_masks(s)
    memory = {}
    for number, m in enumerate(itertools.islice(masks, 2)):  # compiles, fills caches, and checks
        results: dict[str, Result] = {}
        for name in every:
            setting, step = chosen(s, name, ours, plain)
            if s.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            results[name] = step(m)
            if s.device.startswith("cuda"):
                memory[name] = torch.cuda.max_memory_allocated()
            if number == 0:
                check(name, results[name], results[plain_of(name)], setting.dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    flops = []
    for k, m in enumerate(itertools.islice(masks, repeats)):
        flops.append(step_flops(s, m))
        for name in every if k % 2 else reversed(every):
            _, step = chosen(s, name, ours, plain)
            times[name].append(timed(lambda step=step, m=m: step(m)[0], s.device))
    peaks = {dtype: matrix_peak(replace(s, dtype=dtype)) for dtype in {OPTIONS[name].dtype for name in names}}
    out: dict[str, Any] = {}
    for name in every:
        mine, other, peak = times[name], times[plain_of(name)], peaks[plain_of(name).removeprefix("plain_")]
        out[name] = {
            **compared(mine, other, s.batch_size),
            "share_of_peak": median(f / t[0] / peak[0] for f, t in zip(flops, mine, strict=True)),
            "share_of_peak_by_cpu_time": median(f / t[1] / peak[1] for f, t in zip(flops, mine, strict=True)),
        }
        if name in memory:
            out[name]["peak_bytes"] = memory[name]
            del out[name]["cpu_ratio"], out[name]["share_of_peak_by_cpu_time"]
        if profile:
            _, step = chosen(s, name, ours, plain)
            out[name]["profile"] = kernels(step, list(itertools.islice(masks, 3)))
    return {"tflop_of_a_step": median(flops) / 1e12, "matrix_peak_tflops": tera(peaks, 0), "options": out}


def median(values: Any) -> float:
    return float(statistics.median(values))


def tera(peaks: dict[str, tuple[float, float]], which: int) -> dict[str, float]:
    return {dtype: peak[which] / 1e12 for dtype, peak in peaks.items()}


def compared(mine: list[tuple[float, float]], other: list[tuple[float, float]], images: int) -> dict[str, float]:
    wall, cpu = (median(t[i] for t in mine) for i in range(2))
    ratio, cpu_ratio = (median(a[i] / b[i] for a, b in zip(mine, other, strict=True)) for i in range(2))
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "images_per_second": images / wall,
    }


def kernels(step: Step, masks: list[MaskBatch]) -> dict[str, float]:
    """Return the fraction of the time of some steps by kind of kernel; ``none`` is time without a kernel."""
    seconds: list[float] = []
    found = profiled(lambda: seconds.extend(timed(lambda m=m: step(m)[0], "cuda")[0] for m in masks), "cuda")
    shares = {kind: spent / sum(seconds) for kind, spent in found["seconds"].items()}
    return {**shares, "none": 1.0 - sum(shares.values())}


# --- processes of their own, forked before this one has run anything ---

FORK = multiprocessing.get_context("fork")


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    queue = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: queue.put(work(*arguments)))
    process.start()
    result = queue.get()
    process.join()
    return result


def peak_memory(s: Setting, name: str) -> int:
    """Return the peak bytes of a process with this step alone in two steps, minus those of the imports."""
    torch.set_num_threads(s.threads)
    before = process_memory("VmRSS")
    if name.startswith("plain_"):
        template = make_ours(s)
        step: Step = Plain(replace(s, dtype=name.removeprefix("plain_")), template)
        del template
    else:
        step = Ours(s)
        step.use(OPTIONS[name])
    for m in itertools.islice(make_masks(s), 2):
        step(m)
    return process_memory("VmHWM") - before


def measure_processes(s: Setting, repeats: int, world: World, queue: Any) -> None:
    """Time DDP and FSDP2 over two processes, and torch's DDP around the plain model; rank 0 sends the result."""
    torch.set_num_threads(1)
    s = replace(s, batch_size=s.batch_size // world.size)
    with process_group(world, torch.device("cpu")):
        ddp, fsdp = Ours(s, "ddp"), Ours(s, "fsdp")
        steps: dict[str, Step] = {"plain_ddp": Plain(s, ddp.jepa, ddp=True), "ddp": ddp, "fsdp": fsdp}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for k, m in enumerate(itertools.islice(make_masks(s), repeats + 1)):
            for name, step in steps.items():
                result: list[Result] = []
                t = timed(lambda step=step, m=m, to=result: to.append(step(m)) or to[0][0], "cpu")
                if k:
                    times[name].append(t)
                elif name == "plain_ddp":
                    wanted = result[0]
                else:
                    check(name, result[0], wanted, s.dtype)
    if world.is_main:
        queue.put({n: compared(t, times["plain_ddp"], s.batch_size * world.size) for n, t in times.items()})


def two_processes(s: Setting, repeats: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    queue = FORK.SimpleQueue()
    ranks = [FORK.Process(target=measure_processes, args=(s, repeats, World(k, k, 2), queue)) for k in range(2)]
    for rank in ranks:
        rank.start()
    result = queue.get()
    for rank in ranks:
        rank.join()
    return result


# --- command ---


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: small base; on CUDA base large huge")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, help="default: all; on CUDA those of bf16")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--batch-size", type=int, help="images of a step; default: 8, on CUDA 128")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, help="steps of each that are timed; default: 5, on CUDA 20")
    parser.add_argument("--no-processes", action="store_true", help="leave out DDP and FSDP2 over two processes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_engine.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cuda = args.device.startswith("cuda")
    sizes = args.sizes or (["base", "large", "huge"] if cuda else ["small", "base"])
    names = args.options or [name for name, option in OPTIONS.items() if not cuda or option.dtype == "bf16"]
    repeats = args.repeats or (20 if cuda else 5)
    results = []
    for size in sizes:
        torch._dynamo.reset()  # it gives up compiling a function after eight programs, and each size takes some
        s = Setting(
            size=size,
            image_size=args.image_size,
            patch_size=14 if size == "huge" else 16,
            batch_size=args.batch_size or (128 if cuda else 8),
            masks="ragged",
            dtype="float32",
            device=args.device,
            attention="auto",
            threads=args.threads,
        )
        processes = {} if cuda or args.no_processes else in_own_process(two_processes, s, repeats)
        memory = {} if cuda else {name: in_own_process(peak_memory, s, name) for name in with_plain(names)}
        found = measure(s, names, repeats, cuda) if cuda else in_own_process(cpu_measure, s, names, repeats)
        for name, bytes_ in memory.items():
            found["options"][name]["peak_bytes"] = bytes_
        for name, of_option in found["options"].items():
            peak = found["options"][plain_of(name)]["peak_bytes"]
            of_option["peak_memory_ratio"] = of_option["peak_bytes"] / peak
            print(f"{size:6s} {name:22s} {describe(of_option)}", flush=True)
        for name, of_mode in processes.items():
            print(f"{size:6s} {name:22s} {describe(of_mode)}", flush=True)
        setting = {key: value for key, value in asdict(s).items() if key != "dtype"}
        results.append({**setting, "repeats": repeats, **found, "two_processes": processes})
        write(args, results)


def cpu_measure(s: Setting, names: list[str], repeats: int) -> dict[str, Any]:
    torch.set_num_threads(s.threads)
    return measure(s, names, repeats, False)


def describe(r: dict[str, Any]) -> str:
    by_cpu = f" (CPU time {r['cpu_ratio']:.2f})" if "cpu_ratio" in r else ""
    text = f"{r['seconds']:7.3f} s  {r['images_per_second']:7.1f} images/s  ratio {r['ratio']:.2f}{by_cpu}"
    if "share_of_peak" in r:
        by_cpu = f" (CPU time {r['share_of_peak_by_cpu_time']:.0%})" if "share_of_peak_by_cpu_time" in r else ""
        text += f"  peak share {r['share_of_peak']:.0%}{by_cpu}"
        text += f"  memory {r['peak_bytes'] / 2**30:.2f} GiB, ratio {r['peak_memory_ratio']:.2f}"
    return text


def write(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    version = torch.__version__.split("+")[0]
    name = f"{machine_name(args.device)}_torch{version}_engine.json".replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine_name(args.device),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "results": results,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
