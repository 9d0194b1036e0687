#!/usr/bin/env python
"""Try everything that a run can do with every recipe: one line per project, one column per ability.

Each project's configs/quick.yaml (for JEPA itself: projects/ijepa/configs/quickstart.yaml) is trained for 32 updates on
a few synthetic scenes. A cell is a figure, "yes", or "no: " with the reason. The columns:

  lines            code lines of the project, without check.py, comments and docstrings
  core             lines of jepa_kit that name the project
  train            loss of the first and of the last update
  resume           bits of weights, buffers and optimiser that differ after a stop at a random step
  two ranks        largest relative difference of the losses of two gloo ranks (DDP) from those of one process
  fsdp             the same with FSDP2
  accumulate       the same with two parts (a recipe that compares images sees those of a part)
  bf16             loss of the last update
  checkpointed     largest relative difference with activation checkpointing
  nonfinite        whether a batch with a NaN is skipped, and changes no buffer
  telemetry        whether every logged figure is finite
  eval_net health visualize plan_run mask_report     exit status of the tool, or what it printed as its reason

examples:
  python dev/recipe_matrix.py                              # all projects, all columns
  python dev/recipe_matrix.py --projects mae --columns train,resume
  python dev/recipe_matrix.py --output docs/recipes.md

Exit status: 0 if no cell says "no", 1 otherwise.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(ROOT))

from jepa_kit.arguments import tool_parser
from jepa_kit.config import Config, config_from_dict, load_config
from jepa_kit.distributed.signals import Preempted
from jepa_kit.engine import step as engine_step
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.checkpoint.locate import to_read
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.run import Run
from jepa_kit.tools import eval_net, health, make_shards, mask_report, plan_run, visualize
from jepa_kit.training import train

STEPS = 32
SETTINGS = [
    "train.batch_size=8",
    "train.epochs=4",
    "train.precision=float32",
    "train.log_every=1",
    "train.device=cpu",
    "train.tensorboard=false",
    "optim.warmup_epochs=1",
    "data.num_workers=0",
    "checkpoint.every=null",
    "checkpoint.keep=8",
]
LIMIT = 1e-6
"""Largest relative difference of losses in float32 that counts as equal."""
RANDOM = ("drop_path", "noise_std")
"""Options of parts that draw numbers in training, which 0 turns off."""
COMPARED = 2
"""Losses that are compared: before the first update, and after it. Rounding grows with every further one."""


def quick_configs() -> dict[str, Path]:
    """Return the small config of each project."""
    found = {path.parents[1].name: path for path in sorted(ROOT.glob("projects/*/configs/quick.yaml"))}
    return {"ijepa": ROOT / "projects/ijepa/configs/quickstart.yaml", **found}


class Project:
    """A project on trial.

    Args:
        name: of the project.
        file: its small config.
        folder: for shards and runs.
        steps: updates of a run, a multiple of 4.
    """

    def __init__(self, name: str, file: Path, folder: Path, steps: int = STEPS) -> None:
        self.name, self.file, self.folder, self.steps = name, file, folder, steps
        self.shards = folder / "shards"

    def prepare(self) -> None:
        """Make the shards, if they do not exist, and train the tokenizer or the teacher if the config needs one."""
        for part, seed, count in (("train", 0, 96), ("test", 1_000_003, 32)):
            if not (self.shards / part).exists():
                options = ["--num-scenes", str(count), "--image-size", "64", "--seed", str(seed)]
                call(make_shards.main, ["synthetic:scenes", str(self.shards / part), *options])
        paths = self.overrides()
        if any(".tokenizer=" in path for path in paths):
            (script,) = ROOT.glob("projects/*/train_tokenizer.py")
            command = [sys.executable, str(script), "--config-file", str(self.file), *paths]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment())
        if any(path.startswith("target_update.weights=") for path in paths) and not self.teacher.exists():
            Project(self.name, self.file.with_name("quick_teacher.yaml"), self.folder, self.steps).run(
                self.teacher.name
            )

    @property
    def teacher(self) -> Path:
        """The folder of the run that is the teacher, if the config needs one."""
        return self.folder / self.name / "teacher"

    def overrides(self) -> list[str]:
        """Return the overrides of paths."""
        found = [f"data.shards={self.shards / 'train'}"]
        for slot, part in load_config(self.file).slots.items():
            if "tokenizer" in part.options:
                found.append(f"{slot}.tokenizer={self.folder / self.name / 'tokenizer.safetensors'}")
            if slot == "target_update" and part.options.get("weights"):
                found.append(f"{slot}.weights={self.teacher}")
        return found

    def config(self, run: str, *overrides: str) -> Config:
        """Return the config of a run on trial, whose folder is named ``run``."""
        raw = load_config(self.file).to_dict() | {"evaluate": {}}
        own = [f"train.output_dir={self.folder / self.name / run}", f"train.steps_per_epoch={self.steps // 4}"]
        return config_from_dict(raw, [*SETTINGS, *self.overrides(), *own, *overrides], source=str(self.file))

    def run(self, run: str, *overrides: str) -> Path:
        """Return the folder of a run, trained in this process."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return train(self.config(run, *overrides))

    @cached_property
    def base(self) -> Path:
        """The folder of the undisturbed run."""
        return self.run("base")

    @cached_property
    def still(self) -> list[str]:
        """Overrides without stochastic depth and noise: their draws depend on the process and the part of a batch."""
        parts = load_config(self.file).slots.items()
        return [f"{slot}.{name}=0.0" for slot, part in parts for name in RANDOM if part.options.get(name)]

    @cached_property
    def reference(self) -> Path:
        """The folder of the run that others are compared with."""
        return self.run("reference", *self.still) if self.still else self.base

    def difference(self, folder: Path) -> str:
        """Return the largest relative difference of the first losses from those of one process."""
        pairs = list(zip(losses(folder), losses(self.reference), strict=True))[:COMPARED]
        worst = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
        return f"{worst:.0e}" if worst <= LIMIT else f"no: {worst:.1e}"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def call(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> str:
    """Return "yes" if a tool succeeds, else "no: " with the last line that it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status: object = main(list(arguments))
        except SystemExit as end:  # of argparse
            status = end.code
    lines = printed.getvalue().strip().splitlines()
    return "yes" if not status else f"no: {lines[-1] if lines else status}"


def lines(project: Project) -> str:
    """Count lines of code, without comments, docstrings and blank lines."""
    count = 0
    for file in (ROOT / "projects" / project.name).glob("*.py"):
        if file.name in ("check.py", "__init__.py"):
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                body[0].value.value = ""
        count += sum(line.strip() not in ("", "''", '""') for line in ast.unparse(tree).splitlines())
    return str(count)


def core(project: Project) -> str:
    """Count the lines of jepa_kit that import from the project."""
    pattern = re.compile(rf"projects[./]{project.name}\b")
    files = (ROOT / "jepa_kit").rglob("*.py")
    count = sum(
        bool(pattern.search(line)) for file in files for line in file.read_text().splitlines() if "import" in line
    )
    return str(count) if not count else f"no: {count}"


def trained(project: Project) -> str:
    found = losses(project.base)
    right = len(found) == project.steps and all(map(math.isfinite, found))
    return f"{found[0]:.3f} -> {found[-1]:.3f}" if right else f"no: {len(found)} steps, {found[-1:]}"


class StopAt:
    """A hook that sends SIGTERM to the process after a step."""

    def __init__(self, step: int) -> None:
        self.every = step

    def __call__(self, run: Run, step: int) -> dict[str, float]:
        if step + 1 == self.every:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


def resumed(project: Project) -> str:
    stop = random.Random(project.name).randrange(2, project.steps - 1)
    config = project.config("resumed")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(Preempted):
            train(config, hooks=[lambda run: StopAt(stop)])
        folder = train(config, resume=True)
    count = sum(different_bits(a, b) for a, b in zip(tensors(folder), tensors(project.base), strict=True))
    return f"{count}, after {stop}" if not count else f"no: {count} after {stop}"


def tensors(folder: Path) -> list[Tensor]:
    held = load_checkpoint(to_read(folder))
    state = [value for name in sorted(held.optimizer) for value in held.optimizer[name].values()]
    return [*(held.model[name] for name in sorted(held.model)), *(x for x in state if isinstance(x, Tensor))]


def different_bits(a: Tensor, b: Tensor) -> int:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return int((bits[0] != bits[1]).sum())


def ranks(project: Project, run: str, *overrides: str) -> str:
    """Train with two gloo ranks under torchrun."""
    config = project.config(run, *project.still, *overrides)
    config.save(project.folder / project.name / f"{run}-config")
    file = project.folder / project.name / f"{run}-config" / "config.yaml"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*launch, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "tools/train_net.py")]
    done = subprocess.run(
        [*command, "--config-file", str(file)], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    if done.returncode:
        return f"no: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    return project.difference(Path(config.train.output_dir))


def nonfinite(project: Project) -> str:
    plain, at, seen = engine_step.train_step, [0], []

    def train_step(jepa: Any, optimizer: Any, hyper: Any, views: Any, **options: Any) -> Any:
        at[0] += 1
        before = {name: value.clone() for name, value in jepa.named_buffers()}
        if at[0] == 6:
            views = [view.map_tensors(torch.clone) for view in views]
            views[0].images[0] = math.nan
        out = plain(jepa, optimizer, hyper, views, **options)
        if at[0] == 6:
            moved = [
                n for n, value in jepa.named_buffers() if not n.startswith("target_") and not same(value, before[n])
            ]
            seen.append(moved)
        return out

    with mock.patch.object(engine_step, "train_step", train_step):
        found = losses(project.run("nonfinite", "train.on_nonfinite=skip"))
    right = seen == [[]] and all(map(math.isfinite, found[6:]))
    return "yes" if right else f"no: buffers {seen}, losses {found[4:9]}"


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def telemetry(project: Project) -> str:
    record = read_metrics(project.base)[-1]
    missing = {"loss", "grad_norm", "images_per_second", "tokens_per_second", "gflop_per_image"} - record.keys()
    broken = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return f"no: missing {sorted(missing)}, not finite {broken}" if missing or broken else "yes"


def report_of_masks(project: Project) -> str:
    config = project.config("base")
    if "masker" not in config.slots:
        return "no masks"
    folder = str(project.folder / project.name / "masks")
    return call(mask_report.main, ["--config-file", str(project.base), "--draws", "64", "--output-dir", folder])


def evaluated(project: Project) -> str:
    shards = ["--train-shards", str(project.shards / "train"), "--test-shards", str(project.shards / "test")]
    return call(eval_net.main, ["--checkpoint", str(project.base), "--protocol", "knn", "--label", "count", *shards])


def visualized(project: Project) -> str:
    few = ["--images", "32", "--decoder-images", "64", "--decoder-steps", "4"]
    return call(visualize.main, ["--checkpoint", str(project.base), *few])


def planned(project: Project) -> str:
    device = ["--gpus", "2", "--peak", "1", "--memory", "8"]
    return call(plan_run.main, ["--config-file", str(project.base), *device])


COLUMNS: dict[str, Callable[[Project], str]] = {
    "lines": lines,
    "core": core,
    "train": trained,
    "resume": resumed,
    "two ranks": lambda p: ranks(p, "ddp", "train.parallel=ddp"),
    "fsdp": lambda p: ranks(p, "fsdp", "train.parallel=fsdp"),
    "accumulate": lambda p: p.difference(p.run("accumulate", *p.still, "train.accumulate=2")).removeprefix("no: "),
    "bf16": lambda p: f"{losses(p.run('bf16', 'train.precision=bf16'))[-1]:.3f}",
    "checkpointed": lambda p: p.difference(p.run("checkpointed", *p.still, "train.activation_checkpointing=true")),
    "nonfinite": nonfinite,
    "telemetry": telemetry,
    "eval_net": evaluated,
    "health": lambda p: call(health.main, ["--checkpoint", str(p.base), "--images", "32"]),
    "visualize": visualized,
    "plan_run": planned,
    "mask_report": report_of_masks,
}


def trial(project: Project, columns: Sequence[str]) -> dict[str, str]:
    """Return the cells of a project."""
    project.prepare()
    return {name: COLUMNS[name](project) for name in columns}


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return the cells as a table in Markdown."""
    columns = list(next(iter(rows.values())))
    head = [f"| project | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials and print the table; see the module's text."""
    parser = tool_parser("recipe_matrix.py", __doc__)
    parser.add_argument("--projects", metavar="NAME[,NAME]", help="default: all")
    parser.add_argument("--columns", metavar="NAME[,NAME]", help="default: all")
    parser.add_argument("--output", metavar="FILE", help="file for the table, in Markdown")
    arguments: argparse.Namespace = parser.parse_args(argv)
    configs = quick_configs()
    names = arguments.projects.split(",") if arguments.projects else list(configs)
    columns = arguments.columns.split(",") if arguments.columns else list(COLUMNS)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            rows[name] = trial(Project(name, configs[name], Path(folder)), columns)
            print(json.dumps({name: rows[name]}), flush=True)
    print(table(rows))
    if arguments.output:
        Path(arguments.output).write_text(table(rows) + "\n", encoding="utf-8")
    return int(any(cell.startswith("no:") for cells in rows.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
