"""Profile a training step: kernels by kind, the longest kernels, and waits of the host.

    python benchmarks/profile_step.py --size huge --patch-size 14 --batch-size 128 --device cuda
    python benchmarks/profile_step.py --size tiny --image-size 96 --batch-size 2 --device cpu --output profile.json

Steps are those of bench_engine.py (bf16, the default multi-block masks), eager and compiled. ``launches`` counts
kernels (on a CPU operators) of a step. ``waits`` has the calls of the host that wait for a CUDA device: a training step
has none, and torch's profiler adds one cudaDeviceSynchronize of its own at its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from bench_engine import OPTIONS, Ours, Setting, make_masks
from kernel_kinds import profiled

from jepa_kit.encoders import SIZES, compiled

STEPS = 3


def measure(s: Setting, name: str) -> dict[str, Any]:
    """Profile ``STEPS`` steps with an option of bench_engine, after two warm-up steps."""
    step = Ours(s)
    step.use(OPTIONS[name])
    masks = list(islice(make_masks(s), 2 + STEPS))
    for m in masks[:2]:
        step(m)
    found = profiled(lambda: [step(m) for m in masks[2:]], torch.device(s.device).type)
    total = sum(found["seconds"].values())
    return {
        "share": {kind: seconds / total for kind, seconds in found["seconds"].items()},
        "seconds_of_a_step": total / STEPS,
        "launches_of_a_step": found["launches"] / STEPS,
        "waits": found["waits"],
        "longest": found["longest"],
    }


def main(argv: list[str] | None = None) -> None:
    """Profile and print; ``--output`` also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile (default: inductor)")
    parser.add_argument("--output", type=Path, help="a file of JSON")
    args = parser.parse_args(argv)
    compiled.COMPILER = args.compiler
    setting = Setting(
        size=args.size,
        image_size=args.image_size,
        patch_size=args.patch_size,
        batch_size=args.batch_size,
        masks="ragged",
        dtype="float32",
        device=args.device,
        attention="auto",
        threads=torch.get_num_threads(),
    )
    results = {}
    for name in ("bf16", "bf16_compile"):
        r = results[name] = measure(setting, name)
        kinds = sorted(r["share"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds if share >= 0.005)
        print(f"{name}: {1e3 * r['seconds_of_a_step']:.1f} ms in {r['launches_of_a_step']:.0f} kernels: {shares}")
        print(f"  waits of the host: {r['waits'] or 'none'}")
        for kernel in r["longest"]:
            print(f"  {1e3 * kernel['seconds'] / STEPS:8.2f} ms {kernel['count'] // STEPS:5d} x {kernel['name']}")
    if args.output:
        args.output.write_text(json.dumps({"setting": vars(setting), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
