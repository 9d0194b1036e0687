#!/usr/bin/env python
"""Kill a training run repeatedly in every phase, and check that its results equal those of an undisturbed run.

A tiny run is trained once without stops and once with: SIGKILL during its start, between two steps, during and just
after the writing of a checkpoint, and at random; and SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP, which must write a
checkpoint and exit with status 75, or 130 for SIGINT. It is resumed after each stop. Losses, gradient norms and
schedules of every step, and the final weights and moments, must be equal bit for bit. With --processes N the run
has N processes under torchrun, which restarts all if one is killed.

examples:
  python dev/torture.py                               # 20 SIGKILLs and 4 other signals; a few minutes
  python dev/torture.py --kills 3 --signals 1 --fork  # half a minute: processes are forked, and import nothing
  python dev/torture.py --processes 2 --kills 4       # one rank is killed, torchrun restarts all
  python dev/torture.py --processes 2 --kills 4 train.parallel=fsdp checkpoint.format=sharded

Exit status: 0 if all is equal, 1 otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(ROOT))

from jepa_kit.arguments import tool_parser
from jepa_kit.config import load_config
from jepa_kit.data.shards.writing import Sample, write_index, write_shard
from jepa_kit.distributed.signals import Preempted
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import MEASURED, METRICS, read_metrics
from jepa_kit.training import train

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE = 1800.0
"""Seconds that any phase may take to come."""


def write_shards(folder: Path, images: int = 24) -> None:
    """Write shards of small images of random colours."""
    draw = np.random.default_rng(0)
    samples = []
    for number in range(images):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((24, 20)).save(buffer, "PNG")
        samples.append(Sample(f"{number:03d}", "png", buffer.getvalue()))
    shard, rows = write_shard(str(folder / "shard-000000.tar"), samples)
    write_index(str(folder), [shard], [rows], classes={}, refused=[], made_by={})


def write_config(path: Path, shards: Path, steps: int, every: int, overrides: Sequence[str] = ()) -> None:
    """Write the config of a run of ``steps`` steps of 4 images with random order, crops, masks and stochastic depth."""
    transforms = [{"name": "random_resized_crop"}, {"name": "horizontal_flip", "p": 0.5}]
    config = {
        "masker": {"name": "multiblock"},
        "encoder": {"name": "vit", "embed_dim": 96, "depth": 3, "num_heads": 2, "patch_size": 4, "drop_path": 0.3},
        "predictor": {"name": "vit", "width": 48, "depth": 1, "num_heads": 2},
        "target": {"name": "representation"},
        "loss": [{"name": "smooth_l1"}, {"name": "cosine", "weight": 0.5}],
        "target_update": {"name": "ema", "momentum": [0.9, 1.0]},
        "data": {"image_size": 16, "num_workers": 0, "shards": str(shards), "transforms": transforms},
        "optim": {"warmup_epochs": 1},
        "train": {
            "batch_size": 4,
            "epochs": max(steps // 6, 2),
            "steps_per_epoch": 6,
            "precision": "float32",
            "log_every": 1,
            "device": "cpu",
            "tensorboard": False,
        },
        "checkpoint": {"every": every},
    }
    path.write_text(json.dumps(config))


class Process:
    """A resumed run of the config: a new process, a fork of this one, or several under torchrun."""

    def __init__(
        self,
        config: Path,
        folder: Path,
        log: Path,
        *,
        fork: bool,
        processes: int,
        overrides: Sequence[str] = (),
        restarts: int = 0,
    ) -> None:
        self.folder = folder
        self.processes = processes
        if fork:
            self.pid = self._fork(config, folder, log, overrides)
            return
        tool = [
            str(ROOT / "tools" / "train_net.py"),
            "--config-file",
            str(config),
            "--output-dir",
            str(folder),
            "--resume",
            *overrides,
        ]
        runner = [sys.executable]
        if processes > 1:
            runner += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            runner += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        with log.open("a") as out:
            self.child = subprocess.Popen([*runner, *tool], env=environment, stdout=out, stderr=subprocess.STDOUT)
        self.pid = self.child.pid

    @staticmethod
    def _fork(config: Path, folder: Path, log: Path, overrides: Sequence[str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            with log.open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            train(load_config(config, [f"train.output_dir={json.dumps(str(folder))}", *overrides]), resume=True)
            status = 0
        except Preempted as stopped:
            status = stopped.status
        finally:
            if status == 1:  # os._exit would hide it
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None during the run."""
        if hasattr(self, "child"):
            return self.child.poll()
        if not hasattr(self, "status"):
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if not done:
                return None
            self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self) -> int:
        start = time.monotonic()
        while (status := self.poll()) is None:
            if time.monotonic() - start > PATIENCE:
                raise TimeoutError(f"process {self.pid} does not end")
            time.sleep(0.01)
        return status

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to the process, or to one rank of torchrun."""
        with suppress(ProcessLookupError, FileNotFoundError, KeyError):  # it has just ended by itself
            os.kill(self.pid if rank is None else self.ranks()[rank], number)

    def ranks(self) -> dict[int, int]:
        """Return rank -> process id of the children of torchrun."""
        found = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            for entry in environment:
                if entry.startswith("RANK="):
                    found[int(entry[5:])] = int(pid)
        return found


def lines(folder: Path) -> int:
    """Return the number of complete lines of metrics.jsonl."""
    path = folder / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_step(folder: Path) -> int:
    records = read_metrics(folder)
    return int(records[-1]["step"]) if records else -1


def phases(draw: random.Random, folder: Path) -> dict[str, Callable[[], Callable[[], bool]]]:
    """Return phase -> function that, at the start of a process, returns a test of whether the phase is reached."""

    def after(seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end

    def steps() -> Callable[[], bool]:
        marker = (folder / METRICS).stat().st_ino if (folder / METRICS).exists() else None
        more = draw.randrange(1, 4)
        begun: list[int] = []

        def there() -> bool:
            path = folder / METRICS
            if not path.exists() or path.stat().st_ino == marker:  # a resumed run writes the file anew first
                return False
            begun.append(lines(folder))
            return begun[-1] >= begun[0] + more

        return there

    def writing() -> bool:
        return any(folder.glob(".checkpoint_*.part"))

    def written() -> Callable[[], bool]:
        before = {path.name for path in checkpoints(folder)}
        return lambda: bool({path.name for path in checkpoints(folder)} - before)

    return {
        "start": lambda: after(draw.uniform(0.0, 4.0)),
        "step": steps,
        "writing a checkpoint": lambda: writing,
        "checkpoint written": written,
        "any time": lambda: after(draw.uniform(0.0, 8.0)),
    }


def stop_once(process: Process, there: Callable[[], bool], number: int, rank: int | None) -> bool:
    """Wait for the phase and send the signal; return whether the phase came before the process ended."""
    start = time.monotonic()
    while not there():
        if process.poll() is not None:
            return False
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError("the phase does not come")
        time.sleep(0.0002)
    process.send(number, rank)
    return True


def plan(draw: random.Random, kills: int, signals: int, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield pairs (phase, signal) in random order, with each phase equally often."""
    stops = [(names[k % len(names)], signal.SIGKILL) for k in range(kills)]
    stops += [("step", SIGNALS[k % len(SIGNALS)]) for k in range(signals)]
    draw.shuffle(stops)
    yield from stops


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without times."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(folder)]


def differences(whole: Path, stopped: Path) -> list[str]:
    """Return the differences between the two runs; empty if all is equal bit for bit."""
    found = []
    one, other = numbers(whole), numbers(stopped)
    if [line["step"] for line in one] != [line["step"] for line in other]:
        found.append(f"steps of the lines: {len(one)} without stops, {len(other)} with them")
    for a, b in zip(one, other, strict=False):
        unlike = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        if unlike:
            found.append(f"step {a['step']}: " + ", ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in unlike))
    first, second = (load_checkpoint(folder) for folder in (whole, stopped))
    if first.step != second.step:
        found.append(f"last checkpoint: step {first.step} without stops, {second.step} with them")
    found += [f"weights: {name}" for name, value in first.model.items() if not torch.equal(value, second.model[name])]
    for name, state in first.optimizer.items():
        found += [f"moments: {name} {k}" for k, v in state.items() if not torch.equal(v, second.optimizer[name][k])]
    return found


def torture(work: Path, options: argparse.Namespace) -> int:
    """Train both runs, compare them, and return the exit status."""
    draw = random.Random(options.seed)
    (work / "shards").mkdir(parents=True)
    write_shards(work / "shards")
    config, whole, stopped = work / "config.yaml", work / "whole", work / "stopped"
    write_config(config, work / "shards", options.steps, options.every)
    many = options.processes > 1
    kind = {"fork": options.fork, "processes": options.processes, "overrides": options.overrides}
    log = work / "whole.log"
    if Process(config, whole, log, **kind).wait():
        print(log.read_text())
        return 1
    log = work / "stopped.log"
    makers = phases(draw, stopped)
    done: list[str] = []
    bad: list[str] = []
    process: Process | None = None
    for name, number in plan(draw, options.kills, 0 if many else options.signals, list(makers)):
        if process is None or process.poll() is not None:
            process = Process(config, stopped, log, **kind, restarts=options.kills)
        rank = draw.randrange(options.processes) if many else None
        came = stop_once(process, makers[name](), number, rank)
        if not came and process.wait():
            bad.append(f"ended by itself with status {process.wait()}")
            break
        where = f"after step {last_step(stopped) + 1}" if came else "it had ended before"
        if came and not many:
            status = process.wait()
            wanted = -number if number == signal.SIGKILL else Preempted(number, 0).status
            if status not in (wanted, 0):
                bad.append(f"{signal.Signals(number).name} left status {status}, not {wanted}")
        done.append(f"{signal.Signals(number).name:8} {name:22} {where}" + (f", rank {rank}" if many else ""))
        print(done[-1], flush=True)
        if not came:  # a run that is done is begun anew, so that every stop stops something
            bad += differences(whole, stopped)
            shutil.rmtree(stopped)
            process = None
        elif many:
            time.sleep(1.0)  # torchrun is at its restart
    if process is None or process.poll() is not None:
        process = Process(config, stopped, log, **kind)
    if process.wait():
        bad.append(f"the last process left status {process.wait()}")
    bad = bad or differences(whole, stopped)
    if bad:
        print(*bad, sep="\n")
        print("\n".join(log.read_text().splitlines()[-40:]))
        return 1
    print(
        f"{len(done)} stops: all lines, weights and moments of {last_step(whole) + 1} steps are the same, bit for bit"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    p = tool_parser("torture.py", __doc__)
    p.add_argument("--kills", type=int, default=20, help="SIGKILLs (20)")
    p.add_argument(
        "--signals", type=int, default=4, help="SIGTERM, SIGINT, SIGUSR1 and SIGHUP in turn (4); none with --processes"
    )
    p.add_argument("--steps", type=int, default=60, help="length of the run, in multiples of 6 (60)")
    p.add_argument("--every", type=int, default=2, help="steps between two checkpoints (2)")
    p.add_argument("--seed", type=int, default=0, help="of the times of the kills (0)")
    p.add_argument("--fork", action="store_true", help="fork this process in place of starting new ones")
    p.add_argument("--processes", type=int, default=1, help="ranks, under torchrun (1: without it)")
    p.add_argument("--work", type=Path, help="folder to work in, kept afterwards; otherwise a temporary one")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of the run")
    options = p.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in a background job and under nohup, and inherited
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        return torture(options.work, options)
    with tempfile.TemporaryDirectory() as folder:
        return torture(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
