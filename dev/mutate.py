#!/usr/bin/env python
"""Measure the tests: make one small fault at a time in a copy of the tree, and run the tests of its area.

A mutant is one change of the syntax tree (an operator, a constant off by one, a negated condition, a dropped
statement, swapped arguments). It is killed if a test fails, and survives if all pass. Mutants are stored by file,
function, operator and text, so that a sample drawn once is replayed on later trees; one whose line has changed counts
as gone. A mutant that no input can tell from the original has its reason under "equivalent" and is not run. The
checkout itself is never changed.

examples:
  python dev/mutate.py                                                    # replay dev/mutants.jsonl on this tree
  python dev/mutate.py --areas losses targets                             # some areas
  python dev/mutate.py --only survived                                    # those that survived last time
  python dev/mutate.py --draw 220 --seed 1 --mutants output/mutants.jsonl # another sample

Exit status: 0 if at most 3 % of the mutants that ran survive, 1 otherwise.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mutations import described, mutated

from jepa_kit.arguments import tool_parser
from jepa_kit.files import read_json_lines, write_text

AREAS: dict[str, tuple[str, str]] = {
    "maskers": ("maskers/[!p]*.py", "maskers"),
    "packing": (
        "maskers/packing.py structures.py set_lengths.py",
        "maskers/test_packing.py test_structures.py maskers test_recipe.py",
    ),
    "attention": ("encoders/attention*.py encoders/blocks.py", "encoders predictors"),
    "positions": (
        "encoders/vit.py predictors/vit.py",
        "encoders/test_pos_embed.py encoders/test_vit.py predictors encoders test_recipe.py",
    ),
    "targets": ("targets/*.py", "targets test_recipe.py"),
    "losses": ("losses/*.py", "losses test_recipe.py"),
    "target updates": ("target_updates.py", "test_target_updates.py test_recipe.py"),
    "schedules": ("engine/schedules.py", "engine/test_schedules.py engine/test_optimizer.py"),
    "random numbers": ("rng.py", "test_rng.py data/test_order.py data/test_exactness.py"),
    "loader": (
        "data/loader.py data/views.py data/shards/reader.py data/making/sample_workers.py data/remote/prefetch.py",
        "data/test_loader.py data/test_views.py data/test_actions.py data/remote data/shards/test_dataset.py "
        "data/test_exactness.py data/test_errors.py data/making tools/test_make_shards.py",
    ),
    "probes": ("evaluation/protocols/*.py", "evaluation/protocols"),
    "health": (
        "evaluation/health/measure.py evaluation/health/measures.py evaluation/health/statistics.py",
        "evaluation/health evaluation/test_online.py",
    ),
    "conversions": ("interop/*.py", "interop"),
}
"""Files of jepa_kit/ and of tests/, for each area. Tests run in this order, those that bear the file's name first."""

LEFT_OUT = "not compil and not worker_that_dies"
"""pytest's -k: torch.compile takes most of the time of its tests, and torch's SIGCHLD handler may raise anywhere."""
PRELOAD = (
    *("torch", "torch.utils.tensorboard", "numpy", "PIL.Image", "scipy.stats", "sklearn.linear_model"),
    *("sklearn.neighbors", "hypothesis", "pytest", "transformers", "matplotlib.pyplot", "safetensors.torch"),
    *("xformers.ops", "fvcore.nn", "onnxruntime", "datasets", "webdataset"),
)
"""Imported once, before the fork of each mutant's process; nothing of jepa_kit."""

PATIENCE = 1800.0
"""Seconds that a mutant's tests may take, waiting included; their CPU time is limited by that of the area's tests."""


def draw(tree: Path, number: int, seed: int) -> list[dict[str, Any]]:
    """Return a random sample: of each area in proportion to the square root of its number of mutants, 8 or more."""
    found = {
        area: [
            mutant
            for part in files.split()
            for file in sorted((tree / "jepa_kit").glob(part))
            for mutant, *_ in described(tree, str(file.relative_to(tree)))
        ]
        for area, (files, _) in AREAS.items()
    }
    rng = random.Random(seed)
    scale = number / sum(len(mutants) ** 0.5 for mutants in found.values())
    return [
        {"area": area, **mutant}
        for area, mutants in found.items()
        for mutant in rng.sample(mutants, min(len(mutants), max(8, round(scale * len(mutants) ** 0.5))))
    ]


def stages(tree: Path, area: str, file: str, killer: str) -> list[list[str]]:
    """Return the tests of an area, most likely killers first: the last one's, those with the file's name, the rest."""
    found = [f for part in AREAS[area][1].split() for f in sorted((tree / "tests").glob(part))]
    files = [str(g.relative_to(tree)) for f in found for g in (sorted(f.rglob("test_*.py")) if f.is_dir() else [f])]
    named = [f for f in files if file and Path(file).stem in Path(f).stem]
    first = [killer] if (tree / killer.partition("::")[0]).is_file() else []
    return [first, named, [f for f in dict.fromkeys(files) if f not in named]]


def start(copy: Path, tests: list[list[str]], log: Path, seconds: int) -> int:
    """Fork a process that runs tests, stage by stage, in a copy of the tree, for so many seconds of CPU. Return its id.

    Its status is 0 if all pass; no test in a stage, or one that is gone by now, counts as passed.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(copy)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p) != ROOT)]
        os.environ.update(PYTHONPATH=str(copy))
        for name in [m for m in sys.modules if m.split(".")[0] == "jepa_kit"]:
            del sys.modules[name]
        sys.modules["__main__"] = ModuleType("__main__")  # a spawned process would run this file, and find the checkout
        pytest = import_module("pytest")
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy}.tmp", "-m", "not slow and not gpu"]
        for stage in filter(None, tests):
            code = int(pytest.main([*options, "-k", LEFT_OUT, *stage]))
            gone = "::" in stage[0] and code == pytest.ExitCode.USAGE_ERROR
            code = 0 if gone or code == pytest.ExitCode.NO_TESTS_COLLECTED else code
            if code:
                break
        sys.stdout.flush()
    finally:
        os._exit(code)


class Sandbox:
    """A copy of the tree in which one mutant at a time is tested.

    Args:
        tree: the checkout; only files that git tracks or would track are copied.
        folder: where the copy goes.
    """

    def __init__(self, tree: Path, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=tree, text=True)
        for name in filter(None, listed.split("\0")):
            if (tree / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tree / name, folder / name)

    def write(self, file: str, text: str) -> None:
        """Change a file; delete its bytecode, whose source could have the same size and time."""
        (self.folder / file).write_text(text)
        Path(cache_from_source(str(self.folder / file))).unlink(missing_ok=True)

    def begin(self, area: str, change: tuple[str, str] | None, killer: str, cpu: int) -> None:
        """Start the tests of an area with ``change`` made, or with none, ``killer`` first."""
        self.file = change[0] if change else ""
        if change:
            self.text = (self.folder / self.file).read_text()
            self.write(*change)
        self.deadline = time.monotonic() + PATIENCE
        self.pid = start(self.folder, stages(self.folder, area, self.file, killer), self.log, cpu)

    def poll(self) -> tuple[str, str, float] | None:
        """Return (verdict, the test that failed, seconds of CPU) after the tests end, and restore the file."""
        late = time.monotonic() > self.deadline
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status, usage = os.wait4(self.pid, 0 if late else os.WNOHANG)
        if not pid:
            return None
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.file:
            self.write(self.file, self.text)
        log = self.log.read_text(errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
        by = failed[0] if failed else "time limit" if os.WIFSIGNALED(status) else "tests cannot be collected"
        return "survived" if status == 0 else "killed", "" if status == 0 else by, usage.ru_utime + usage.ru_stime


class Run:
    """Mutants under test, one in each box at a time; the tests of each area run without a mutant first.

    Args:
        tree: the checkout.
        mutants: those to run; ``column`` of each gets its verdict, ``by`` the test that killed it.
        column: ``before`` or ``after``.
        save: called after each verdict.
    """

    def __init__(self, tree: Path, mutants: list[dict[str, Any]], column: str, save: Callable[[], None]) -> None:
        self.tree, self.column, self.save = tree, column, save
        areas = dict.fromkeys(m["area"] for m in mutants)
        self.waiting: list[tuple[str, dict[str, Any] | None]] = [(area, None) for area in areas]
        self.mutants = mutants
        self.cost: dict[str, float] = {}
        self.broken: list[str] = []

    def next(self, box: Sandbox) -> tuple[str, dict[str, Any] | None] | None:
        """Start the next mutant in a free box; return None if none is left."""
        while self.waiting:
            area, mutant = self.waiting.pop(0)
            change = mutated(box.folder, mutant) if mutant else None
            if mutant is None or change:
                killer = mutant.get("by", "") if mutant else ""
                box.begin(area, change, killer, int(30 + 4 * self.cost.get(area, 300)))
                return area, mutant
            mutant[self.column] = "gone"
        return None

    def finish(self, area: str, mutant: dict[str, Any] | None, done: tuple[str, str, float], log: Path) -> None:
        """Store a verdict; an area whose own tests fail is left out, and one whose tests pass gets its mutants in."""
        verdict, by, seconds = done
        if mutant:
            mutant.pop("by", None)
            mutant.update({self.column: verdict, **({"by": by} if by else {})})
            self.save()
            print(
                f"{verdict:9}{seconds:4.0f} s  {mutant['file']}: {mutant['was']}  ->  {mutant['now']}  {by}", flush=True
            )
        elif verdict == "survived":
            self.cost[area] = seconds
            self.waiting += [(area, m) for m in self.mutants if m["area"] == area]
            print(f"{area}: {seconds:.0f} s of CPU without a mutant", flush=True)
        else:
            self.broken.append(area)
            print(f"{area}: left out, its tests fail without a mutant: {by}\n{log.read_text()[-2000:]}", flush=True)

    def all(self, processes: int) -> None:
        """Run everything, ``processes`` at a time."""
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            free = [Sandbox(self.tree, Path(folder) / str(k)) for k in range(processes)]
            busy: dict[Sandbox, tuple[str, dict[str, Any] | None]] = {}
            while True:
                for box in [p for p in free if p not in busy]:
                    if begun := self.next(box):
                        busy[box] = begun
                if not busy:
                    break
                time.sleep(0.1)
                for box in list(busy):
                    if done := box.poll():
                        self.finish(*busy.pop(box), done, box.log)
        self.save()


TITLE = """# Mutants

Written by `make mutate`, which replays `dev/mutants.jsonl` on this tree: small faults, drawn at random before the tests
that kill them were written. *Survived before* counts those that no test noticed then, *gone* those whose line has
changed since, *not replayed* those that tests killed then and that have not run since. Equivalent mutants, which no
input can tell from the original, are counted apart."""


def report(mutants: list[dict[str, Any]]) -> str:
    """Return counts per area, the survivors and the equivalent mutants, as Markdown."""
    lines = [
        *TITLE.splitlines(),
        "",
        "| area | mutants | equivalent | survived before | gone | killed | survive | not replayed |",
        "|---|" + "---:|" * 7,
    ]
    for area in [*dict.fromkeys(m["area"] for m in mutants), "all"]:
        ours = [m for m in mutants if area in (m["area"], "all")]
        real = [m for m in ours if "equivalent" not in m]
        now = Counter(m.get("after") for m in real)
        before = sum(m.get("before") == "survived" for m in real)
        counts = (len(ours), len(ours) - len(real), before, *(now[v] for v in ("gone", "killed", "survived", None)))
        lines.append(f"| {area} | " + " | ".join(map(str, counts)) + " |")
    survivors = [(m, m.get("why", "")) for m in mutants if m.get("after") == "survived" and "equivalent" not in m]
    equivalent = [(m, m["equivalent"]) for m in mutants if "equivalent" in m]
    for title, found in (("Survivors", survivors), ("Equivalent mutants", equivalent)):
        lines += ["", f"## {title}", ""] + ([] if found else ["None."])
        for m, reason in found:
            lines.append(f"- `{m['file']}`, `{m['function']}`: `{m['was']}` -> `{m['now']}`. {reason}".rstrip())
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = tool_parser("mutate.py", __doc__)
    parser.add_argument("--mutants", type=Path, default=ROOT / "dev" / "mutants.jsonl", help="file of the sample")
    parser.add_argument("--draw", type=int, metavar="N", help="draw N mutants first, and write the file anew")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout to take the sample from and to test")
    parser.add_argument("--column", choices=("before", "after"), default="after", help="field that gets the verdicts")
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), default=list(AREAS))
    parser.add_argument(
        "--only", choices=("survived", "missing"), help="mutants that survived, or that have no verdict"
    )
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.draw:
        mutants = draw(args.tree, args.draw, args.seed)
    else:
        mutants = read_json_lines(args.mutants)

    def save() -> None:
        args.mutants.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.mutants, "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in mutants))

    wanted = {"survived": "survived", "missing": None}
    chosen = [m for m in mutants if m["area"] in args.areas and "equivalent" not in m]
    chosen = [m for m in chosen if not args.only or m.get(args.column) == wanted[args.only]]
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    for name in PRELOAD:
        with suppress(ModuleNotFoundError):
            import_module(name)
    run = Run(args.tree.resolve(), chosen, args.column, save)
    run.all(args.processes)
    text = report(mutants)
    args.mutants.with_suffix(".md").write_text(text)
    print(text)
    ran = [m for m in mutants if m.get(args.column) in {"killed", "survived"} and "equivalent" not in m]
    return int(bool(run.broken) or sum(m[args.column] == "survived" for m in ran) > 0.03 * len(ran))


if __name__ == "__main__":
    sys.exit(main())
