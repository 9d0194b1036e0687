"""Process of a contender of bench_step.py: reads commands from stdin and writes results as JSON lines.

    python benchmarks/step_worker.py ROOT KIND SETTING [CHECKOUT]

ROOT is the checkout whose jepa_kit is imported; KIND is ``ours``, ``plain``, ``release`` or ``reference``, whose code
is at CHECKOUT. Each command is a JSON list: the name of a method of ``Worker``, and its arguments.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--help" in sys.argv:
    print(__doc__)
    sys.exit()
ROOT, KIND = sys.argv[1:3]
sys.path[:0] = [ROOT, str(Path(__file__).parent)]

import torch
from plain_step import average, tables
from steps import HYPER, Setting, autocast, make_images, make_masks, make_ours, make_plain, process_memory, timed
from torch import Tensor

from jepa_kit.engine.optimizer import build_optimizer, parameter_groups
from jepa_kit.engine.schedules import set_hyper
from jepa_kit.engine.step import train_step
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, View
from jepa_kit.target_updates import EMA

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
WARM_UP, STEPS = 2, 8
"""Of a turn on CUDA: untimed steps, and steps between two synchronisations."""


def make_step(s: Setting, state: Path) -> tuple[Callable[[MaskBatch], Any], Callable[[Any], Tensor]]:
    """Return (function that prepares masks, step on them), with the weights at ``state``."""
    images, ours = make_images(s), make_ours(s)
    ours.load_state_dict(torch.load(state, map_location=s.device))
    if KIND == "ours":
        return lambda masks: masks, our_step(s, ours, images)
    if KIND == "reference":
        from step_reference import Reference, uniform_masks

        return uniform_masks, plain_step(s, Reference(sys.argv[4], s, ours), images)
    return tables, plain_step(s, make_plain(s, ours, explicit=KIND == "release"), images)


def our_step(s: Setting, jepa: JEPA, images: Tensor) -> Callable[[Any], Tensor]:
    optimizer = build_optimizer(jepa)

    def step(masks: Any) -> Tensor:
        return train_step(jepa, optimizer, HYPER, [View(images, masks)], autocast=lambda: autocast(s)).loss.detach()

    return step


def plain_step(s: Setting, model: Any, images: Tensor) -> Callable[[Any], Tensor]:
    plain = KIND == "plain"
    groups = parameter_groups(model)
    optimizer = build_optimizer(model) if plain else torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)
    update = EMA().update if plain else average

    def step(masks: Any) -> Tensor:
        set_hyper(optimizer, HYPER)
        with autocast(s):
            loss = model(images, *masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(model.target_encoder, model.encoder, HYPER.momentum)
        return loss.detach()

    return step


class Worker:
    """Runs commands; step i of every contender has the same masks."""

    def __init__(self, s: Setting) -> None:
        self.s, self.masks, self.drawn = s, make_masks(s), 0
        self.cuda = s.device.startswith("cuda")

    def save(self, path: str) -> None:
        """Write the initial weights of all contenders."""
        torch.save(make_ours(self.s).state_dict(), path)

    def start(self, path: str) -> None:
        self.prepare, self.step = make_step(self.s, Path(path))
        self.before = self._memory("VmRSS")

    def _memory(self, which: str) -> int:
        if self.cuda:
            return torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
        return process_memory(which)

    def _next(self) -> Any:
        return self.prepare(next(self.masks))

    def loss(self) -> float:
        """Run a step and return its loss."""
        return float(self.step(self._next()))

    def turn(self) -> tuple[float, float]:
        """Return (wall, CPU) seconds of a step; on CUDA the mean of several between two synchronisations."""
        if not self.cuda:
            masks = self._next()
            return timed(lambda: self.step(masks), self.s.device)
        ready = [self._next() for _ in range(WARM_UP + STEPS)]
        for masks in ready[:WARM_UP]:
            self.step(masks)
        wall, cpu = timed(lambda: [self.step(m) for m in ready[WARM_UP:]][-1], self.s.device)
        torch.cuda.empty_cache()  # for the contender that is next
        return wall / STEPS, cpu / STEPS

    def memory(self) -> tuple[int, int]:
        """Return the peak bytes, and those before the first step."""
        return self._memory("VmHWM"), self.before

    def profile(self) -> dict[str, float]:
        """Return fractions of a step's time on a CPU: matrix products, attention, and all others of at least 1 %."""
        from torch.profiler import ProfilerActivity, profile

        masks, of = self._next(), Counter[str]()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            self.step(masks)
        for event in recorded.events():
            name = "products" if event.name in PRODUCTS else event.name
            of["attention" if "scaled_dot_product" in name else name] += event.self_cpu_time_total
        total = sum(of.values())
        return {name: time / total for name, time in of.most_common() if time >= 0.01 * total}


def main() -> None:
    setting = Setting(**json.loads(sys.argv[3]))
    torch.set_num_threads(setting.threads)
    worker, answers = Worker(setting), sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
