"""Measure the cost of ragged sets: an encoder on them, on the same tokens in uniform sets, and with truncation; and
each attention backend at the sizes of ViT-S, B, L and H. (bench_attention.py has alternatives within a backend.)

    python benchmarks/bench_ragged.py --encoder-sizes small --batch-size 8 --threads 1
    python benchmarks/bench_ragged.py --device cuda --dtype bf16 --batch-size 128

All cases take turns in one run; times are medians, on a CPU of the CPU time of the process. Contexts
are those of the multi-block masker. "Uniform" packs as many tokens (to half a token a set) into as many sets of equal
length. "Truncated" cuts contexts as released: it computes less, and loses those tokens. On CUDA also: achieved TFLOP/s
against a large matrix product's, peak memory, and the attention kernels that the profiler saw.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from jepa_kit.encoders import SIZES, ViT
from jepa_kit.encoders.attention import BACKENDS, attend, why_not
from jepa_kit.maskers import MultiBlock
from jepa_kit.planning.flops import encoder_flops
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import PatchSets

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PATCH = {"huge": 14}
"""Patch sizes at 224 pixels; 16 for the others, as in the paper."""
SIDE = 224


def contexts(grid: int, batch_size: int, truncation: str = "none") -> PatchSets:
    """Return the context sets of a batch."""
    masker = MultiBlock(grid=(grid, grid), truncation=truncation)  # type: ignore[arg-type]
    return masker(np.arange(batch_size), seed=0, epoch=0).context


def uniform(sets: PatchSets, patches: int) -> PatchSets:
    """Return as many sets of one length, the rounded mean, with as many tokens."""
    length = round(sets.num_patches / len(sets))
    return PatchSets.from_padded(torch.arange(patches)[:length].repeat(len(sets), 1))


def now(device: str) -> float:
    """Return the seconds of the process on a CPU, or of the clock on CUDA after a synchronisation."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turns(calls: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, after a warm-up call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            start = now(device)
            calls[name]()
            if turn:
                times[name].append(now(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def encoder_case(size: str, batch_size: int, dtype: str, device: str, repeats: int, compile: bool) -> dict[str, Any]:
    """Time forward and backward of an encoder on the three kinds of sets."""
    patch = PATCH.get(size, 16)
    torch.manual_seed(0)
    torch._dynamo.reset()  # each size is compiled as in a run of its own
    encoder = ViT(image_size=(SIDE, SIDE), patch_size=patch, size=size, compile=compile).to(device)  # type: ignore[arg-type]
    grid = SIDE // patch
    ragged = contexts(grid, batch_size)
    kinds = {
        "ragged": ragged,
        "uniform": uniform(ragged, grid * grid),
        "truncated": contexts(grid, batch_size, "released"),
    }
    sets = {name: kind.to(device) for name, kind in kinds.items()}
    images = torch.randn(batch_size, 3, SIDE, SIDE, device=device)

    def run(name: str) -> None:
        # As in training, nothing is there that an earlier step derived from the lengths.
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            out = encoder(images, sets[name].map_tensors(lambda x: x))
        out.float().square().mean().backward()
        encoder.zero_grad(set_to_none=True)

    seconds = in_turns({name: partial(run, name) for name in sets}, device, repeats)
    per_token = {name: seconds[name] / sets[name].num_patches for name in sets}
    flops = encoder_flops(encoder)
    assert flops is not None  # it is a ViT
    flop = 3 * flops(np.array(ragged.lengths.on_host))
    peak = matrix_peak(dtype, device)
    result: dict[str, Any] = {
        "size": size,
        "grid": grid,
        "images": batch_size,
        "tokens": {name: s.num_patches for name, s in sets.items()},
        "milliseconds": {name: round(1e3 * s, 3) for name, s in seconds.items()},
        "ragged_over_uniform_per_token": round(per_token["ragged"] / per_token["uniform"], 3),
        "ragged_over_truncated": round(seconds["ragged"] / seconds["truncated"], 3),
        "ragged_over_truncated_per_token": round(per_token["ragged"] / per_token["truncated"], 3),
        "tflops": round(flop / seconds["ragged"] / 1e12, 4),
        "matrix_peak_tflops": round(peak / 1e12, 4),
        "share_of_matrix_peak": round(flop / seconds["ragged"] / peak, 3),
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run("ragged")
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        result["attention_kernels"] = kernels(partial(run, "ragged"))
    return result


def kernels(call: Callable[[], Any]) -> list[str]:
    """Return the names of the CUDA kernels of attention in a call, which show the library that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    words = ("fmha", "flash", "attention", "xformers", "softmax")
    return sorted({e.key for e in profile.key_averages() if any(word in e.key.lower() for word in words)})


def matrix_peak(dtype: str, device: str) -> float:
    """Return the FLOP/s of a square matrix product, the best of five."""
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(5):
        start = now(device)
        a @ b
        best = min(best, now(device) - start)
    return 2 * side**3 / best


def backend_case(size: str, batch_size: int, dtype: str, device: str, repeats: int) -> dict[str, Any]:
    """Time attention alone, forward and backward, on ragged and uniform sets with each available backend."""
    shape, grid = SIZES[size], SIDE // PATCH.get(size, 16)
    width = shape.embed_dim // shape.num_heads
    ragged = contexts(grid, batch_size)
    like = torch.empty(0, device=device, dtype=DTYPES[dtype])
    reasons = {name: why_not(name, like) for name in BACKENDS}
    row: dict[str, Any] = {"size": size, "heads": shape.num_heads, "head_dim": width, "images": batch_size}
    row["not_run"] = {name: reason for name, reason in reasons.items() if reason is not None}
    for kind, sets in (("ragged", ragged), ("uniform", uniform(ragged, grid * grid))):
        size_of_q = (sets.num_patches, shape.num_heads, width)
        q, k, v, upstream = (torch.randn(size_of_q, device=device, dtype=DTYPES[dtype]) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def run(name: str, lengths: tuple[int, ...], leaves: list[torch.Tensor], upstream: torch.Tensor) -> None:
            out = attend(leaves[0], leaves[1], leaves[2], SetLengths(lengths, device), name)  # type: ignore[arg-type]
            torch.autograd.grad(out, leaves, upstream)

        calls: dict[str, Callable[[], Any]] = {
            name: partial(run, name, sets.lengths.on_host, leaves, upstream)
            for name, reason in reasons.items()
            if reason is None
        }
        row[kind] = {name: round(1e3 * s, 3) for name, s in in_turns(calls, device, repeats).items()}
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["small", "base", "large", "huge"]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes, help="of the backends' table")
    parser.add_argument("--encoder-sizes", nargs="+", choices=SIZES, help="default: those of --sizes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_ragged_DTYPE.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu_{platform.machine()}"
    version = torch.__version__.split("+")[0]
    name = f"{machine}_torch{version}_ragged_{args.dtype}.json".replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / name
    common = (args.batch_size, args.dtype, args.device, args.repeats)
    encoders, backends = [], []
    for size in args.encoder_sizes or args.sizes:
        r = encoder_case(size, *common, args.compile)
        encoders.append(r)
        ms = r["milliseconds"]
        print(
            f"encoder {size:6s} ragged {ms['ragged']:.1f} ms, uniform {ms['uniform']:.1f}, truncated "
            f"{ms['truncated']:.1f}; a ragged token costs {r['ragged_over_uniform_per_token']:.2f} of a uniform one; "
            f"{r['share_of_matrix_peak']:.0%} of the matrix peak",
            flush=True,
        )
    for size in args.sizes:
        r = backend_case(size, *common)
        backends.append(r)
        print(f"attention {size:6s} ms: ragged {r['ragged']}, uniform {r['uniform']}", flush=True)
    report = {
        "machine": machine,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "dtype": args.dtype,
        "threads": args.threads,
        "compiled": args.compile,
        "repeats": args.repeats,
        "encoders": encoders,
        "backends": backends,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
