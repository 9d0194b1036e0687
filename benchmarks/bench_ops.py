"""Count the operations of a training step on a CUDA device, on a machine without one.

The whole ``train_step`` of a config runs on fake CUDA tensors (shapes and dtypes without memory), and a dispatch mode
logs every operator. The autograd graph is walked in Python, because torch's own engine needs a driver. Reported for
each phase of a step:

    kernels      one for each operator that computes, none for views; a multi-tensor operator counts each launch
                 (LayerNorm's and attention's backward passes need two or three kernels and count as one)
    gigabytes    read and written outside matrix products and attention
    tflop        of matrix products; the total has attention as well, by the formula of jepa_kit.planning.flops
    zero_fills   gigabytes written by fills with zeros: most are scratch space that a better backward would not need
    syncs        operators for which the host waits (a number read, a copy from the device, a size set by data)

These are counts, not times. In mode ``compiled`` the compiled regions count as inductor would schedule them: a launch
for each fused kernel and each matrix product, and the bytes that the fused kernels read and write.

Needs a CUDA build of torch (a driver is not needed); the CPU build cannot differentiate fake CUDA tensors.

    python benchmarks/bench_ops.py                                    # B/16, L/16, H/14 x ragged, released masks
    python benchmarks/bench_ops.py --models H/14 --masks ragged --modes eager --operators 20
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
from count_operators import CountOperators, Phase, Scheduled
from fake_cuda import HOPPER, as_if_on_hopper
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx, record_original_output_strides, shape_env_from_inputs
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from walk_graph import gradients_of, set_gradients

from jepa_kit.config import Config, load_config
from jepa_kit.encoders import compiled
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.planning.flops import Lengths, model_flops
from jepa_kit.precision import autocast_of
from jepa_kit.structures import View

CONFIGS = ROOT / "projects" / "ijepa" / "configs"
MODELS = {"B/16": "in1k_vitb16", "L/16": "in1k_vitl16", "H/14": "released_in1k_vith14"}
"""Configs with the released masker."""
MASKS = {
    "ragged": {
        "edges": "inclusive",
        "coupled_scale_and_aspect": False,
        "size_per": "block",
        "truncation": "none",
        "min_keep": 4,
        "min_keep_target": 1,
    },
    "released": {},
}
"""Options of the masker that replace a config's: the corrected ones, whose contexts differ in length, or none."""

HYPER = Hyper(lr=1e-3, weight_decay=0.04, momentum=0.996)


# --- compiled regions ---


def schedule(graph_module: Any, inputs: Sequence[Any]) -> Scheduled:
    """Lower and fuse a graph as inductor does, and count instead of generating code."""
    record_original_output_strides(graph_module)
    graph = GraphLowering(graph_module, shape_env=shape_env_from_inputs(inputs))
    with V.set_graph_handler(graph), V.set_real_inputs(inputs), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = [n for n in graph.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
        fused = [n for n in nodes if not isinstance(n, ExternKernelSchedulerNode)]
        moved = sum(int(n.get_read_write_buffers_sizes()) for n in fused)
    return Scheduled(len(nodes), moved / 1e9)


def counting_compiler(counter: CountOperators) -> Callable[..., Any]:
    """A backend of ``torch.compile`` that runs each graph as it is and counts what inductor would launch."""

    def inner(graph_module: Any, inputs: Sequence[Any], **_: Any) -> Any:
        scheduled = schedule(graph_module, inputs)

        def run(args: list[Any]) -> Any:
            counter.add_compiled(scheduled)
            with counter.without_kernels():
                return graph_module(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)


# --- one step ---


@contextmanager
def counted_compilation(counter: CountOperators) -> Iterator[None]:
    """Compile as for a Hopper card, counting instead of generating code; a graph for each size: bytes need numbers."""
    static = {"automatic_dynamic_shapes": False, "assume_static_by_default": True, "recompile_limit": 64}
    torch._dynamo.reset()
    with (
        mock.patch.object(compiled, "COMPILER", counting_compiler(counter)),
        mock.patch.object(torch._dynamo, "maybe_mark_dynamic", return_value=None),
        mock.patch.object(torch.autograd, "grad", gradients_of),
        mock.patch.object(scheduler, "has_triton", return_value=True),
        mock.patch.object(CudaInterface, "get_device_properties", return_value=HOPPER),
        torch._dynamo.config.patch(static),
    ):
        yield


@contextmanager
def phase(counter: CountOperators, name: str) -> Iterator[None]:
    before, counter.phase = counter.phase, name
    try:
        yield
    finally:
        counter.phase = before


def named_phases(jepa: Any, counter: CountOperators) -> None:
    """Name the phases of a step: forward passes of the three networks, optimizer and average."""

    def wrap(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            with phase(counter, name):
                return inner(*args, **kwargs)

        object.__setattr__(owner, method, run)

    wrap(jepa.encoder, "forward", "encoder")
    wrap(jepa.predictor, "forward", "predictor")
    wrap(jepa.target, "forward", "target encoder")
    wrap(jepa, "update_target", "average")


def count_step(config: Config, batch_size: int) -> tuple[CountOperators, float]:
    """Run two steps of a config under fake CUDA tensors and count the second, when optimiser state exists.

    Returns:
        The counts, and the FLOP of the step by formula.
    """
    counter = CountOperators()
    masker = build_masker(config)
    masks = [masker(np.arange(batch_size), seed=0, epoch=step, step=step) for step in (0, 1)]
    for of_step in masks:
        of_step.map_tensors(lambda x: x)  # whatever is derived from masks needs real numbers on the host
    with as_if_on_hopper(), counted_compilation(counter), FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            jepa = build_recipe(config)
        optimizer = optimizer_of(jepa, config.optim)
        images = torch.empty(batch_size, 3, *config.data.image_size, device="cuda")
        named_phases(jepa, counter)
        optimizer.register_step_pre_hook(lambda *_: setattr(counter, "phase", "optimiser"))
        optimizer.register_step_post_hook(lambda *_: setattr(counter, "phase", "other"))

        def backward(loss: Tensor) -> None:
            with phase(counter, "backward"):
                set_gradients(loss)

        with mock.patch.object(Tensor, "backward", backward):
            for of_step in masks:
                on_device = of_step.to("cuda")
                counter.clear()
                with counter:
                    views = [View(images, on_device)]
                    train_step(jepa, optimizer, HYPER, views, autocast=autocast_of("bf16", torch.device("cuda")))
        flops = model_flops(jepa).training(Lengths.of(masks[-1], batch_size))
    assert flops is not None, "every network of these configs has a formula"
    return counter, flops


# --- report ---


def report(model: str, masks: str, compiled: bool, batch_size: int) -> tuple[dict[str, Any], CountOperators]:
    """Return the counts of a setting, by phase and in total."""
    # Attention is named, because what ``auto`` takes depends on the machine.
    overrides = [f"masker.{k}={v}" for k, v in MASKS[masks].items()] + ["train.attention=sdpa"]
    if compiled:
        overrides += ["encoder.compile=true", "predictor.compile=true"]
    counter, flops = count_step(load_config(CONFIGS / f"{MODELS[model]}.yaml", overrides), batch_size)
    total = sum(counter.phases.values(), Phase())
    total.tflop = flops / 1e12
    phases = {name: asdict(p) for name, p in counter.phases.items()}
    setting = {"model": model, "masks": masks, "compiled": compiled, "batch_size": batch_size}
    return {**setting, "total": asdict(total), "phases": phases}, counter


def describe(r: dict[str, Any]) -> str:
    """Return a line of the table."""
    t = r["total"]
    return (
        f"{r['model']:6s}{r['masks']:10s}{'compiled' if r['compiled'] else 'eager':10s}{t['kernels']:7d}"
        f"{t['gigabytes']:11.1f}{t['tflop']:9.1f}{t['zero_fills']:12.2f}{t['syncs']:7d}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--operators", type=int, default=0, help="list so many operators with the most kernels")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts, by phase")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if torch.version.cuda is None:
        raise SystemExit(f"bench_ops: torch {torch.__version__} is a CPU build; this needs a CUDA build, but no driver")
    print("model masks     mode      kernels  gigabytes    TFLOP  zero fills  syncs")
    results = []
    for model, masks, mode in itertools.product(args.models, args.masks, args.modes):
        result, counter = report(model, masks, mode == "compiled", args.batch_size)
        results.append(result)
        print(describe(result), flush=True)
        for name, n in counter.kernels_of.most_common(args.operators):
            print(f"    {name:50s}{n:6d}{counter.bytes_of[name] / 1e9:10.2f} GB")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
