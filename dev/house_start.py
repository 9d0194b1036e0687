"""Work of the quickstart's training before its first step: files of jepa_kit entered, calls, changes of file.

Training runs in a process of its own, on a few scenes in a temporary folder, on one core of the CPU: there the config's
default is to load in the training process, and the count does not depend on the machine. A profile function
(``sys.setprofile``, in all threads) notes every call of a function of jepa_kit, and ends the process at the first step.
What runs while a module is imported is left out.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = "jepa_kit"
TRAINING = ("tools/train_net.py", "--config-file", "projects/ijepa/configs/quickstart.yaml")
SHARDS = ("tools/make_shards.py", "synthetic:scenes")
SCENES = 128
"""Two batches of the quickstart."""

INLINED = {"<listcomp>", "<setcomp>", "<dictcomp>"}
"""Calls up to Python 3.11 only."""


class Call(NamedTuple):
    """One call, or the resumption of a generator.

    Attributes:
        thread: its identifier.
        file: of the function, below the package.
        function: its name and first line.
        training: whether the training function had been called.
    """

    thread: int
    file: str
    function: str
    training: bool


class Recorder:
    """A profile function that notes calls of functions of a package until one named ``stop`` is called.

    Args:
        package: its folder.
        start: file, below the package, and name of the training function.
        stop: name of the function that makes a step.
        out: file for ``summary`` of the calls, in JSON; it is written at the step, which then ends the process.
    """

    def __init__(self, package: Path, start: tuple[str, str], stop: str, out: Path) -> None:
        self.folder, self.start, self.stop, self.out = f"{package}{os.sep}", start, stop, out
        self.training = False
        self.importing: Counter[int] = Counter()
        self.calls: list[Call] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in {"call", "return"} or not code.co_filename.startswith(self.folder):
            return
        thread = threading.get_ident()
        if code.co_name == "<module>":
            self.importing[thread] += 1 if event == "call" else -1
        elif event == "call" and not self.importing[thread] and code.co_name not in INLINED:
            file = code.co_filename.removeprefix(self.folder)
            if code.co_name == self.stop:
                self.out.write_text(json.dumps(summary(self.calls)))
                sys.stdout.flush()
                os._exit(0)
            self.training = self.training or (file, code.co_name) == self.start
            self.calls.append(Call(thread, file, f"{code.co_name}:{code.co_firstlineno}", self.training))


def changes(calls: list[Call]) -> Counter[tuple[str, str]]:
    """Return how often a call in one file came right after one in another file of the same thread."""
    found: Counter[tuple[str, str]] = Counter()
    for _, group in groupby(sorted(calls, key=lambda call: call.thread), key=lambda call: call.thread):
        files = [call.file for call in group]
        found.update((a, b) for a, b in pairwise(files) if a != b)
    return found


def summary(calls: list[Call]) -> dict[str, Any]:
    """Return the figures of the calls from the training function on, and who contributes most to them."""
    training = [call for call in calls if call.training]
    pairs = changes(training)
    entered: Counter[str] = Counter()
    for (_, file), count in pairs.items():
        entered[file] += count
    return {
        "figures": {
            "files entered before step 0": len({call.file for call in training}),
            "functions entered before step 0": len({(call.file, call.function) for call in training}),
            "calls before step 0": len(training),
            "changes of file before step 0": sum(pairs.values()),
            "different changes of file before step 0": len(pairs),
            "files entered from the program's start": len({call.file for call in calls}),
            "changes of file from the program's start": sum(changes(calls).values()),
        },
        "pairs": {f"{a} -> {b}": count for (a, b), count in pairs.most_common(20)},
        "files": dict(entered.most_common(20)),
    }


def environment(root: Path) -> dict[str, str]:
    """Return the environment of a process that imports the package from ``root``, on the CPU with one thread."""
    own = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    return {**os.environ, **own}


def run_python(root: Path, *arguments: str) -> str:
    """Run Python in ``root`` and return what it prints.

    Raises:
        RuntimeError: its exit status is not 0.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def work_before_step_0(root: Path, start: tuple[str, str], stop: str) -> dict[str, Any]:
    """Return ``summary`` for the quickstart's training in a checkout.

    Args:
        root: the checkout.
        start: file, below the package, and name of the training function.
        stop: name of the function that makes a step.

    Raises:
        RuntimeError: a program failed, or training ended without a call of ``stop``.
    """
    with tempfile.TemporaryDirectory() as folder:
        shards, out = f"{folder}/shards", Path(folder, "calls.json")
        run_python(root, *SHARDS, shards, "--num-scenes", str(SCENES), "--workers", "1")
        training = [*TRAINING, "--output-dir", f"{folder}/run", f"data.shards={shards}"]
        printed = run_python(root, __file__, str(root), *start, stop, str(out), *training)
        if not out.exists():
            raise RuntimeError(f"{' '.join(training)} called no {stop} (the function of a step)\n{printed}")
        return json.loads(out.read_text())


def record(root: str, file: str, function: str, stop: str, out: str, *program: str) -> None:
    """Run a program of ``root``, given with its arguments, under a ``Recorder``."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    recorder = Recorder(Path(root, PACKAGE), (file, function), stop, Path(out))
    sys.argv = [*program]
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    record(*sys.argv[1:])
