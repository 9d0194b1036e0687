"""Compare a training step of jepa_kit with other code for the same equations.

    plain       projects/ijepa/plain.py: dense tokens, padding and masks; our fused AdamW and average
    release     the same as the released code does it: attention with its scores in memory, AdamW neither fused
                nor foreach, the average parameter by parameter
    reference   --reference PATH: a checkout of the released code itself (uniform masks only)
    base        --base PATH: another checkout of jepa_kit

Each contender has its own process. All start from the same weights and get the same images and masks (new masks at
every step, as in training); their losses are compared before timing. Then they take turns, step by step;
ratios are medians over the turns. Peak memory is that of each process.

    python benchmarks/bench_step.py --batch-size 16 --threads 1
    python benchmarks/bench_step.py --sizes small base --base ../before --dtypes bf16

Masks: ``ragged`` is the default multi-block masker (contexts and blocks of different lengths; the plain
side pads them to the longest and masks); ``uniform`` has the released truncation (one length for the batch).

Achieved FLOP/s counts what the equations need, by the formula of jepa_kit/planning/flops.py, over a step's time; the
peak is a large matrix product in the same run and dtype. On a shared machine, use the CPU time of the process
with ``--threads 1`` instead of wall times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from steps import DTYPES, Setting, machine_name, make_masks, matrix_peak, step_flops

from jepa_kit.encoders import SIZES

TOLERANCE = {"float32": 1e-5, "bf16": 1e-2}
"""Largest relative difference between two losses."""
CHECKED = 2
"""Steps whose losses are compared: the second loss has the first one's gradient in it."""


class Contender:
    """A process of step_worker.py.

    Raises:
        SystemExit: the process ended; what it wrote is on stderr.
    """

    def __init__(self, name: str, s: Setting, path: Path | None) -> None:
        self.name = name
        root, kind = (path, "ours") if name == "base" else (ROOT, name)
        command = [sys.executable, str(Path(__file__).with_name("step_worker.py")), str(root), kind]
        command += [json.dumps(asdict(s)), *([str(path)] if kind == "reference" else [])]
        # cuDNN's attention builds a plan for every new length, for which plain code would wait.
        environment = {**os.environ, "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *order: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"contender {self.name!r} ended with exit code {self.process.wait()}; see above")
        return json.loads(answer)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()


def measure(s: Setting, others: dict[str, Path | None], repeats: int) -> dict[str, Any]:
    """Check that the losses agree; then measure time and memory of all contenders, and profile them."""
    contenders: dict[str, Contender] = {}
    try:
        for name, path in {"ours": None, **others}.items():
            contenders[name] = Contender(name, s, path)
        with tempfile.TemporaryDirectory() as folder:
            state = str(Path(folder) / "weights.pt")
            saver = Contender("ours", s, None)  # a process of its own: its memory is not that of a step
            saver("save", state)
            saver.close()
            for contender in contenders.values():
                contender("start", state)
        losses = {name: [c("loss") for _ in range(CHECKED)] for name, c in contenders.items()}
        for name, of_other in losses.items():
            pairs = zip(losses["ours"], of_other, strict=True)
            if not max(abs(a - b) / abs(b) for a, b in pairs) < TOLERANCE[s.dtype]:
                raise SystemExit(f"the losses of 'ours' and {name!r} differ: {losses}")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        order = list(contenders)
        for _ in range(repeats):
            for name in order:
                times[name].append(contenders[name]("turn"))
            order = order[1:] + order[:1]
        memory = {name: c("memory") for name, c in contenders.items()}
        profiles = {}
        if not s.device.startswith("cuda"):
            profiles = {name: c("profile") for name, c in contenders.items() if name in ("ours", "base")}
    finally:
        for contender in contenders.values():
            contender.close()
    return {**asdict(s), "repeats": repeats, "losses": losses, **summary(s, times, memory), "profile": profiles}


def summary(
    s: Setting, times: dict[str, list[tuple[float, float]]], memory: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return the results from (wall, CPU) seconds of each turn and (peak, initial) bytes."""
    others = [name for name in times if name != "ours"]

    def median(i: int) -> dict[str, float]:
        return {name: statistics.median(t[i] for t in of_one) for name, of_one in times.items()}

    def ratio(i: int) -> dict[str, float]:
        pairs = {name: zip(times["ours"], times[name], strict=True) for name in others}
        return {name: statistics.median(a[i] / b[i] for a, b in of_pair) for name, of_pair in pairs.items()}

    result = {
        "seconds": median(0),
        "cpu_seconds": median(1),
        "time_ratio": ratio(0),
        "cpu_time_ratio": ratio(1),
        "cpu_time_turns": {name: [t[1] for t in of_one] for name, of_one in times.items()},
        "peak_bytes": {name: most for name, (most, _) in memory.items()},
        "peak_memory_ratio": {name: memory["ours"][0] / memory[name][0] for name in others},
        "peak_memory_ratio_above_start": {
            name: (memory["ours"][0] - memory["ours"][1]) / (memory[name][0] - memory[name][1]) for name in others
        },
    }
    torch.set_num_threads(s.threads)
    peak, cpu_peak = matrix_peak(s)
    # On CUDA a turn has masks of several steps; the mean over all of them stands for each.
    flop = statistics.mean(step_flops(s, m) for m in islice(make_masks(s), CHECKED, CHECKED + len(times["ours"])))
    return {
        **result,
        "tflop_of_a_step": flop / 1e12,
        "matrix_peak_tflops": peak / 1e12,
        "share_of_peak": {name: flop / t / peak for name, t in median(0).items()},
        "share_of_peak_by_cpu_time": {name: flop / t / cpu_peak for name, t in median(1).items()},
    }


def describe(r: dict[str, Any]) -> str:
    wall, cpu = r["seconds"]["ours"], r["cpu_seconds"]["ours"]
    head = (
        f"{r['size']} {r['masks']} {r['dtype']}: {wall:.2f} s a step (CPU {cpu:.2f}), "
        f"{r['share_of_peak_by_cpu_time']['ours']:.0%} of the matrix peak by CPU time"
    )
    if r["profile"]:
        products, attention = (r["profile"]["ours"].get(k, 0.0) for k in ("products", "attention"))
        head += f"; {products:.1%} in products, {attention:.1%} in fused attention"
    lines = [
        f"  over {name:10s} time {r['time_ratio'][name]:.3f}, CPU time {r['cpu_time_ratio'][name]:.3f}, "
        f"peak memory {r['peak_memory_ratio'][name]:.3f}"
        for name in r["time_ratio"]
    ]
    return "\n".join([head, *lines])


def instruction_set() -> str:
    """Return the instruction sets that torch and oneDNN use on this CPU."""
    found = [torch.backends.cpu.get_cpu_capability()]
    found += [name for name, has in (("bf16", "avx512_bf16"), ("amx", "amx_tile")) if has in _flags()]
    return "_".join(found).lower()


def _flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return next((line.split() for line in text.splitlines() if line.startswith("flags")), [])


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: small; huge on CUDA")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--patch-size", type=int, help="default: 16; 14 for huge")
    parser.add_argument("--batch-size", type=int, help="default: 16; 128 on CUDA")
    parser.add_argument("--masks", nargs="+", choices=["ragged", "uniform"], default=["ragged", "uniform"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--attention", default="auto", help="backend of attend")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    parser.add_argument("--against", nargs="*", choices=["plain", "release"], default=["plain", "release"])
    parser.add_argument("--base", type=Path, help="another checkout of jepa_kit")
    parser.add_argument("--reference", type=Path, help="a checkout of the released I-JEPA code")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_step.json")
    args = parser.parse_args(argv)
    on_cuda = args.device.startswith("cuda")
    args.sizes = args.sizes or ["huge" if on_cuda else "small"]
    args.batch_size = args.batch_size or (128 if on_cuda else 16)
    return args


def store(output: Path, machine: str, results: list[dict[str, Any]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "torch": torch.__version__, "load_average": os.getloadavg()[0], "results": results}
    output.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine = machine_name(args.device)
    if not args.device.startswith("cuda"):
        machine += f"_{instruction_set()}"
    name = f"{machine}_torch{torch.__version__.split('+')[0]}_step.json".replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / name
    results = []
    for size in args.sizes:
        for masks in args.masks:
            for dtype in args.dtypes:
                setting = Setting(
                    size=size,
                    image_size=args.image_size,
                    patch_size=args.patch_size or (14 if size == "huge" else 16),
                    batch_size=args.batch_size,
                    masks=masks,
                    dtype=dtype,
                    device=args.device,
                    attention=args.attention,
                    threads=args.threads,
                )
                others: dict[str, Path | None] = dict.fromkeys(args.against)
                if args.reference is not None and masks == "uniform":
                    others["reference"] = args.reference.resolve()
                if args.base is not None:
                    others["base"] = args.base.resolve()
                results.append(measure(setting, others, args.repeats))
                print(describe(results[-1]), flush=True)
                store(output, machine, results)  # after each: what follows may be stopped
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
