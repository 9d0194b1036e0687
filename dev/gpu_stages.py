"""The stages of gpu_check.py: functions that record results as they are measured.

    python dev/gpu_stages.py NAME --device cuda|cpu [--small] --end SECONDS FILE     (as gpu_check.py runs them)

Measurements are those of benchmarks/ and of the logs of runs. With --small everything is tiny, and compiled blocks run
without Inductor, which would take minutes to compile on a CPU: their rows are marked "(aot_eager)".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
CONFIGS = ROOT / "projects" / "ijepa" / "configs"


class Record:
    """The results of a stage; each row rewrites the file, so that a stage that is stopped loses nothing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.small, self.images, self.file = args.device, args.small, args.images, args.file
        self.end = args.end
        self.folder = self.file.with_suffix("")
        self.rows: list[tuple[str, str]] = []
        self.data: dict[str, Any] = {}

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Return the seconds until all stages must end."""
        return self.end - time.time()

    def row(self, label: str, value: str, **data: Any) -> None:
        """Add a line of the summary, with its data."""
        self.rows.append((label, value))
        self.data |= data
        self.file.write_text(json.dumps({"rows": self.rows, "data": self.data}, indent=1) + "\n")
        print(f"{label}: {value}", flush=True)

    def benchmark(self, script: str, *arguments: object, **environment: str) -> dict[str, Any] | None:
        """Run a program of benchmarks/ and return the JSON that it writes; None if it failed, which is a row."""
        self.folder.mkdir(exist_ok=True)
        output = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments), "--output", str(output)]
        done = subprocess.run(command, env={**os.environ, **environment}, check=False)
        if done.returncode:
            self.row(f"{script} {' '.join(map(str, arguments[:4]))}", f"failed with exit status {done.returncode}")
            return None
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def machine(r: Record) -> None:
    """Record versions, bandwidth and the rate of large matrix products."""
    import platform

    import torch

    from jepa_kit.encoders.attention import describe_backend
    from jepa_kit.planning.peak_flops import matrix_peak

    device = torch.device("cuda", 0) if r.cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if r.cuda else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    r.row("device", f"{name}, {os.cpu_count()} CPU cores")
    r.row("versions", f"torch {torch.__version__}, Python {platform.python_version()}, CUDA {torch.version.cuda}")
    for dtype in (torch.bfloat16, torch.float32):
        r.row(f"attention, {dtype}".replace("torch.", ""), describe_backend(device, dtype))
    source = torch.empty(2**24 if r.small else 2**30, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), r.cuda) for _ in range(8))
    r.row("memory bandwidth (copy)", f"{2 * source.nbytes / best / 1e9:.3g} GB/s", bandwidth=2 * source.nbytes / best)
    for precision in ("bf16", "float32"):
        peak = matrix_peak(device, precision)
        r.row(f"matrix product, {precision}", f"{peak / 1e12:.3g} TFLOP/s", **{f"peak_{precision}": peak})


def seconds_of(work: Callable[[], object], cuda: bool) -> float:
    """Return the seconds of some work, by events on CUDA, else by the clock."""
    import torch

    if not cuda:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def tests(r: Record) -> None:
    """Run all tests marked gpu, or on a CPU the same tests there; the row is updated while they run."""
    what = ["-m", "gpu", "tests"] if r.cuda else ["-m", "not gpu", "tests/engine/test_on_device.py"]
    if r.small:
        what += ["-k", "six_steps or accumulat"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=5", *what]
    found: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if test := re.match(r"(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b.*%\]$", line):
                found[test[2]].append(test[1])
                bad = found["FAILED"] + found["ERROR"]
                r.rows.clear()
                r.rows += [("failed", name) for name in bad]
                counts = f"{len(found['PASSED'])} passed, {len(bad)} failed, {len(found['SKIPPED'])} skipped"
                r.row("tests", counts, failed=bad)
    if process.returncode or not found["PASSED"]:
        sys.exit("tests failed, or none ran")


def parity(r: Record) -> None:
    """Compare with the recording of the released code, in both precisions."""
    import torch

    from projects.ijepa.check_parity import check
    from projects.ijepa.parity_fixture import DTYPES, read_fixture

    failed = []
    for name, dtype in reversed(DTYPES.items()):
        fixture = read_fixture(str(ROOT / "tests" / "fixtures" / "released_step"))
        fixture.trajectory = fixture.trajectory[: 4 if r.small else None]
        report = check(fixture, device=torch.device(r.device), dtype=dtype)
        absolute, relative = (max(gaps[i] for gaps in report.rows.values()) for i in range(2))
        failed += report.failed()
        verdict = f"{len(report.failed())} of {len(report.rows)} quantities beyond {report.tolerance:g}"
        r.row(name, f"largest difference {absolute:.1e}, relative {relative:.1e}; {verdict}", **{name: report.rows})
    if failed:
        sys.exit(f"parity: {', '.join(failed[:5])}")


def attention(r: Record) -> None:
    """Time ``attend`` forward and backward with heads of H/14 (80) and the predictor (24), with and without cuDNN."""
    sizes = (
        ("--grid", 6, "--batch-size", 2, "--heads", 2)
        if r.small
        else ("--grid", 16, "--batch-size", 128, "--heads", 16)
    )
    repeats = ("--repeats", 1 if r.small else 5, "--dtypes", "bf16", "--device", r.device)
    for dim in (80, 24):
        for cudnn in (True, False) if r.cuda else (False,):
            label = f"head {dim}{', cuDNN first' if cudnn else ''}"
            without = {} if cudnn else {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
            found = r.benchmark("bench_attention.py", *sizes, "--head-dim", dim, *repeats, **without)
            if found is None:
                continue
            kinds: dict[str, list[str]] = {}
            for row in found["results"]:
                kinds.setdefault(row["sets"], []).append(f"{row['way']} {row['ms']:.2f}")
            text = "; ".join(f"{kind}: {', '.join(ways)}" for kind, ways in kinds.items())
            r.row(label, f"{text} ms", **{label: found["results"]})
    if not r.data:
        sys.exit("no measurement of attention succeeded")


BOTH = ("plain", "release")
STEPS: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("huge", "uniform", 128, ()),
    ("huge", "uniform", 32, BOTH),
    ("huge", "ragged", 128, ()),
    ("large", "ragged", 64, BOTH),
    ("base", "ragged", 128, BOTH),
    ("large", "uniform", 64, BOTH),
    ("base", "uniform", 128, BOTH),
)
"""Size, masks, images and whom a step is compared with, worth first: if time runs out, the last ones are missing. All
contenders share the device's memory at once: with them, batches are small enough for 80 GB (estimated)."""


def eager(r: Record) -> None:
    """Time a training step of jepa_kit, of plain code, and of plain code as the release does it (bench_step.py)."""
    small = (("tiny", "ragged", 2, BOTH), ("tiny", "uniform", 2, ()))
    for size, masks, images, against in small if r.small else STEPS:
        shape = ("--masks", masks, "--batch-size", images, *(("--image-size", 96) if r.small else ()))
        turns = ("--repeats", 1 if r.small else 3, "--device", r.device, "--dtypes", "bf16", "--against", *against)
        found = r.benchmark("bench_step.py", "--sizes", size, *shape, *turns)
        for result in found["results"] if found else []:
            seconds = result["seconds"]
            texts = [f"{images / seconds['ours']:.3g} img/s, {result['share_of_peak']['ours']:.0%} of the matrix peak"]
            for name in against:
                ratio = seconds[name] / seconds["ours"]
                texts.append(f"{name} {images / seconds[name]:.3g} img/s (ours {ratio:.2f} x)")
            label = f"{size}/{result['patch_size']} {masks}, batch {images}"
            r.row(label, "; ".join(texts), **{label: result})
    if not r.data:
        sys.exit("no measurement of a step succeeded")


def compiled(r: Record) -> None:
    """Time the same step with compiled blocks (bench_engine.py)."""
    if r.small:
        from jepa_kit.encoders import compiled as blocks

        blocks.COMPILER = "aot_eager"
        import bench_engine

        output = r.file.with_name("compiled_small.json")
        small = "--sizes tiny --image-size 96 --batch-size 2 --repeats 1 --no-processes --options bf16 bf16_compile"
        bench_engine.main([*small.split(), "--device", r.device, "--output", str(output)])
        found: dict[str, Any] | None = json.loads(output.read_text())
        rows = found["results"] if found else []
    else:
        rows = []
        for size in ("huge", "large", "base"):
            options = ("--options", "bf16", "bf16_compile", "--repeats", 6, "--device", r.device, "--no-processes")
            found = r.benchmark("bench_engine.py", "--sizes", size, *options)
            rows += found["results"] if found else []
            show_compiled(r, rows[-1:])
        return
    show_compiled(r, rows)


def show_compiled(r: Record, rows: list[dict[str, Any]]) -> None:
    """Add a row for each size."""
    for result in rows:
        texts = []
        for name, of_option in result["options"].items():
            texts.append(f"{name} {of_option['images_per_second']:.3g} img/s, {of_option['share_of_peak']:.0%}")
        kind = " (aot_eager)" if r.small else ""
        r.row(f"{result['size']}/{result['patch_size']} ragged{kind}", "; ".join(texts), **{result["size"]: result})


def profile(r: Record) -> None:
    """Profile kernels by kind in three steps, eager and compiled, and waits of the host."""
    shape = ("--size", "huge", "--patch-size", 14)
    if r.small:
        shape = ("--size", "tiny", "--image-size", 96, "--batch-size", 2, "--compiler", "aot_eager")
    found = r.benchmark("profile_step.py", *shape, "--device", r.device)
    if found is None:
        sys.exit("profile_step.py failed")
    for name, result in found["results"].items():
        kinds = sorted(result["share"].items(), key=lambda item: -item[1])[:6]
        r.row(
            f"{name}{' (aot_eager)' if r.small and 'compile' in name else ''}",
            f"{1e3 * result['seconds_of_a_step']:.1f} ms, {result['launches_of_a_step']:.0f} kernels; "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds),
            **{name: result},
        )
        r.row("  waits of the host", ", ".join(f"{n} x {c}" for n, c in result["waits"].items()) or "none")


def repeats(r: Record) -> None:
    """Compare two equal runs and one that is resumed from their middle: equal bits, or the difference."""
    options = ("--steps", 4, "--batch-size", 4, "--size", "tiny") if r.small else ("--steps", 20, "--batch-size", 64)
    found = r.benchmark("bench_repeats.py", *options, "--device", r.device)
    if found is None:
        sys.exit("bench_repeats.py failed")
    for result in found["results"]:
        label = f"{result['precision']}{', deterministic' if result['deterministic'] else ''}"
        for pair in ("second run", "resumed run"):
            r.row(f"{label}: {pair}", result[pair]["text"], results=found["results"])


def loader(r: Record) -> None:
    """Measure images per second and data waits of training B/16 on JPEG files of 500 x 375, by workers and decoder."""
    from bench_feed import main as feed

    output = r.file.with_name("feed.json")
    small = ["--size", "tiny", "--images", "24", "--image-size", "96", "--batch-size", "4", "--steps", "4"]
    options = small if r.small else ["--size", "base", "--images", "768", "--batch-size", "256", "--steps", "24"]
    workers = ["--workers", "2", "1" if r.small else "14"]

    def tell(result: dict[str, Any]) -> None:
        label = f"{result['workers']} workers, {result['decoder']}"
        text = f"{result['images_per_second']:.3g} img/s, {result['data_wait']:.1%} of the time waiting for data"
        r.row(label, text, **{label: result})

    feed([*options, *workers, "--device", r.device, "--output", str(output)], tell=tell)


def training(r: Record) -> None:
    """Train on CIFAR-10 (``--images``) or scenes for the remaining time, then measure probes and health."""
    from gpu_training import pretrain_and_probe

    pretrain_and_probe(r)


STAGES = {
    f.__name__: f for f in (machine, tests, parity, attention, eager, compiled, profile, repeats, loader, training)
}


def main() -> None:
    """Run one stage; gpu_check.py gives the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--end", type=float, required=True, help="when all stages must have ended, in Unix time")
    parser.add_argument("file", type=Path, help="where rows and data go")
    args = parser.parse_args()
    STAGES[args.stage](Record(args))


if __name__ == "__main__":
    main()
