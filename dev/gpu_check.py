"""Run all tests and measurements that need a GPU, without a network.

    dev/gpu_check.sh OUT                                on a GPU: under ten minutes
    dev/gpu_check.sh OUT --images cifar10/train         the last stage trains on these (a folder per class)
    dev/gpu_check.sh OUT --device cpu --small           the same stages, tiny: minutes on two CPU cores
    dev/gpu_check.sh OUT --stages parity compiled       some of them

Each stage (gpu_stages.py) is a process with its own time limit. A stage that fails or is stopped keeps its results so
far and does not stop the others. OUT gets N_STAGE.json and N_STAGE.log of each stage, and summary.txt, one page with
results of all. Exit status: 0 if all stages succeed, 1 if one fails, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOTAL = 580.0
"""Seconds for all stages together."""
SLOWER = 5.0
"""On a CPU a stage may take so many times its limit: other programs may use its cores."""


@dataclass(frozen=True)
class Stage:
    """A command that writes its rows and data to the file that its last argument names.

    Args:
        name: of the stage.
        limit: most seconds it may take.
        command: what is run, without the file.
    """

    name: str
    limit: float
    command: tuple[str, ...]


STAGES = {
    "machine": 30,
    "tests": 90,
    "parity": 30,
    "attention": 45,
    "eager": 110,
    "compiled": 110,
    "profile": 40,
    "repeats": 40,
    "loader": 80,
    "training": 240,
}
"""Stages in their order, and their limits in seconds; the last one takes what time is left."""


def run_stage(stage: Stage, limit: float, stem: Path) -> dict[str, Any]:
    """Run a stage and return its rows and data, status ("ok", or the error) and seconds."""
    begin, file = time.monotonic(), stem.with_suffix(".json")
    file.unlink(missing_ok=True)
    # unbuffered: a log in the order of its lines, and whole if the stage is killed
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with stem.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [*stage.command, str(file)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(timeout=limit)
            status = "ok" if code == 0 else f"failed with exit status {code}: {last_line(stem.with_suffix('.log'))}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:  # loader workers and contenders too, also if this process is interrupted
            kill_group(process)
    result = {"rows": [], "data": {}, **(json.loads(file.read_text()) if file.exists() else {})}
    result |= {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - begin, 1)}
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def run_all(stages: Sequence[Stage], out: Path, total: float) -> list[dict[str, Any]]:
    """Run all stages, one after another, within ``total`` seconds; write the summary after each."""
    out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + total, []
    for number, stage in enumerate(stages):
        limit = min(stage.limit, end - time.monotonic())
        if limit > 1:
            result = run_stage(stage, limit, out / f"{number}_{stage.name}")
        else:
            result = {"stage": stage.name, "status": "not run: no time was left", "seconds": 0.0, "rows": []}
        results.append(result)
        print(describe(result), flush=True)
        (out / "summary.txt").write_text("\n".join(describe(r) for r in results) + "\n")
    return results


def describe(result: dict[str, Any]) -> str:
    """Return the lines of the summary for a stage: name, time, status, and a line per result."""
    head = f"{result['stage']:10s} {result['seconds']:6.1f} s  {result['status']}"
    return "\n".join([head, *(f"    {label:34s} {value}" for label, value in result["rows"])])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; made if missing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images of the last stage, a folder a class")
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="NAME", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all stages (default: {TOTAL:.0f})")
    args = parser.parse_args(argv)
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images (={args.images}) must be a folder of images")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return the exit status."""
    args = parse(argv)
    slower = SLOWER if args.device == "cpu" else 1.0
    if args.device == "cpu":  # threads that wait for one another take a busy machine's time
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = ["--device", args.device, *(["--small"] if args.small else [])]
    options += ["--images", str(args.images.resolve())] if args.images else []
    end = time.time() + slower * args.seconds
    stages = [
        Stage(name, slower * limit, (sys.executable, str(HERE / "gpu_stages.py"), name, *options, f"--end={end:.0f}"))
        for name, limit in STAGES.items()
        if not args.stages or name in args.stages
    ]
    results = run_all(stages, args.out.resolve(), slower * args.seconds)
    print(f"wrote {args.out / 'summary.txt'}")
    return 0 if all(result["status"] == "ok" for result in results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stage too
    sys.exit(main())
