#!/usr/bin/env python
"""Time the quickstart's training step under each policy of waiting threads, with and without other load.

Threads of a step wait for one another many times. GNU's and Intel's OpenMP spin at first while they wait, which costs
nothing on an idle machine, and a time slice whenever another process has the core of the thread that is waited for.
One process for each policy takes its steps in turn with the others, while every core is left alone (idle) or has a busy
process on it (loaded). The results are the medians over rounds, and ratios to `spinning`, the OpenMP runtime's default.

    python benchmarks/bench_threads.py --rounds 15 --output benchmarks/results/threads.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(ROOT))

from jepa_kit.machine import SPINS

CONFIG = ROOT / "projects/ijepa/configs/quickstart.yaml"
POLICIES: dict[str, dict[str, str]] = {
    "spinning": {},
    "tools": {"GOMP_SPINCOUNT": SPINS},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""``spinning`` is the runtime's default, ``tools`` what jepa_kit's tools set (jepa_kit/machine.py)."""
VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def serve() -> None:
    """Run in a child process: take as many steps as each line of stdin says, and print the seconds of each step."""
    import numpy as np
    import torch

    from jepa_kit.config import load_config
    from jepa_kit.engine.optimizer import build_optimizer
    from jepa_kit.engine.schedules import Hyper
    from jepa_kit.engine.step import train_step
    from jepa_kit.from_config import build_masker, build_recipe
    from jepa_kit.precision import autocast_of
    from jepa_kit.structures import View

    config = load_config(CONFIG)
    torch.manual_seed(0)
    jepa = build_recipe(config).train()
    optimizer, masker, batch = build_optimizer(jepa), build_masker(config), config.train.batch_size
    images = torch.randn(batch, 3, *config.data.image_size)
    hyper = Hyper(lr=1e-4, weight_decay=0.05, momentum=0.999)
    autocast = autocast_of(os.environ["PRECISION"], images.device)
    number = 0
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            masks = masker(np.arange(batch), seed=0, epoch=0, step=(number := number + 1))
            start = time.perf_counter()
            train_step(jepa, optimizer, hyper, [View(images, masks)], autocast=autocast)
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Start a busy process per core."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


@contextmanager
def child(variables: dict[str, str], precision: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that takes steps, and warm it up."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment = kept | variables | {"PYTHONPATH": str(ROOT), "PRECISION": precision}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        steps(process, 3)
        yield process
    finally:
        process.kill()
        process.wait()


def set_policy(process: subprocess.Popen[str], realtime: bool) -> None:
    """Move all threads of a process into the scheduler's real-time class, or out of it."""
    policy, priority = (os.SCHED_RR, 1) if realtime else (os.SCHED_OTHER, 0)
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))


def steps(process: subprocess.Popen[str], count: int) -> list[float]:
    """Return the seconds of each of ``count`` steps of a child."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    return list(json.loads(process.stdout.readline()))


def measure(rounds: int, count: int, precision: str, realtime: bool) -> dict[str, dict[str, float]]:
    """Return policy -> {"idle", "loaded": median seconds a step; "idle_over_spinning", "loaded_over_idle": ratios}."""
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        children = {name: stack.enter_context(child(v, precision)) for name, v in POLICIES.items()}
        times: dict[str, dict[str, list[float]]] = {name: {"idle": [], "loaded": []} for name in children}
        for _ in range(rounds):
            for name, process in children.items():
                if realtime:
                    set_policy(process, True)
                times[name]["idle"].append(median(steps(process, count)))
                if realtime:
                    set_policy(process, False)
            with busy(cores):
                for name, process in children.items():
                    times[name]["loaded"].append(median(steps(process, count)))
    found = {name: {load: median(values) for load, values in by.items()} for name, by in times.items()}
    for name, by in times.items():
        pairs = zip(by["idle"], times["spinning"]["idle"], strict=True)
        found[name]["idle_over_spinning"] = median(own / other for own, other in pairs)
        found[name]["loaded_over_idle"] = median(b / a for a, b in zip(by["idle"], by["loaded"], strict=True))
        found[name]["fastest_idle_over_spinning"] = min(by["idle"]) / min(times["spinning"]["idle"])
    return found


def cpu_flags() -> list[str]:
    """Return the instruction sets that matter to matrix products, of those that Linux lists."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6, help="of each policy and load in a round; default: %(default)s")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="idle steps at real-time priority: for a machine with other users (root)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve()
        return
    before = os.getloadavg()
    found = measure(options.rounds, options.steps, options.precision, options.realtime)
    for name, row in found.items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    if options.output:
        about = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "flags": cpu_flags()}
        about |= {"load_before": before[0], "precision": options.precision, "realtime": options.realtime}
        options.output.write_text(json.dumps({"about": about, "policies": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
