"""What a run tells: ``metrics.jsonl``, a progress bar or plain lines, and ``curves.png``.

One line of ``metrics.jsonl`` for each logged step:

    step, epoch, samples          update counted from 0, its epoch, images seen with it
    loss, loss/<term>             of this step, mean over processes
    lr, weight_decay, momentum    what the step ran with
    images_per_second             over all processes, since the line before; checkpoints are not counted
    tokens_per_second             the same for patches seen by the context encoder and patches predicted
    data_wait                     share of that time in which the step waited for images
    context_length, target_length mean patches of a context set and of a target set in this step
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from jepa_kit.engine.distributed import World, mean_over_ranks
from jepa_kit.engine.schedules import Hyper
from jepa_kit.recipe import Output
from jepa_kit.structures import MaskBatch

Record = dict[str, float]
"""A line of metrics.jsonl."""

METRICS = "metrics.jsonl"


class Meter:
    """Measures one process between two lines, on the host; the device is asked in ``record`` alone.

    Args:
        world: the processes.
        batch_size: images of a step over all processes.
        steps_per_epoch: updates in an epoch.
        clock: seconds.
    """

    def __init__(
        self, *, world: World, batch_size: int, steps_per_epoch: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.world = world
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        """Starts a new stretch of time."""
        self.start = self.clock()
        self.steps = 0
        self.tokens = 0
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for images."""
        start = self.clock()
        yield
        self.waited += self.clock() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Around what is no part of training, such as a checkpoint."""
        start = self.clock()
        yield
        self.start += self.clock() - start

    def count(self, masks: MaskBatch) -> None:
        """Counts a step."""
        self.steps += 1
        self.tokens += masks.context.num_patches + masks.targets.num_patches

    def record(self, step: int, hyper: Hyper, out: Output, masks: MaskBatch) -> Record:
        """The line of a step; every process must call it. Waits for the device, then starts a new stretch of time.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        on_device = torch.stack([out.loss, *out.terms.values()]).detach().double()
        losses = mean_over_ranks(on_device).tolist()
        seconds = max(self.clock() - self.start, 1e-9)
        on_host = [
            self.tokens * self.world.size / seconds,
            self.waited / seconds,
            masks.context.num_patches / len(masks.context),
            masks.targets.num_patches / len(masks.targets),
        ]
        means = mean_over_ranks(torch.tensor(on_host, dtype=torch.float64, device=on_device.device)).tolist()
        if not torch.isfinite(torch.tensor(losses[0])):
            raise FloatingPointError(
                f"the loss is {losses[0]} at step {step} (lr {hyper.lr:.3g}, momentum {hyper.momentum:.6g}): "
                "the run has diverged; a smaller optim.lr, a longer warm-up or optim.clip_grad may help"
            )
        record: Record = {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "samples": (step + 1) * self.batch_size,
            "loss": losses[0],
            **{f"loss/{name}": value for name, value in zip(out.terms, losses[1:], strict=True)},
            "lr": hyper.lr,
            "weight_decay": hyper.weight_decay,
            "momentum": hyper.momentum,
            "images_per_second": self.steps * self.batch_size / seconds,
            "tokens_per_second": means[0],
            "data_wait": means[1],
            "context_length": means[2],
            "target_length": means[3],
        }
        self.restart()
        return record


def read_metrics(folder: Path) -> list[Record]:
    """The lines of a run.

    Raises:
        ValueError: a line that is not JSON, unless it is the last, which a killed run may leave cut short.
    """
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    records: list[Record] = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:  # noqa: PERF203 (the message names the line)
            if number < len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1} is not JSON: {error}") from error
    return records


class Journal:
    """Writes the lines of a run and shows its progress; only the main process has one.

    Args:
        folder: of the run.
        first_step: lines at or after it are dropped, so that a resumed run has none twice.
        steps: of the whole run.
        bar: a progress bar in place of plain lines; None for a bar on a terminal.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int, bar: bool | None = None) -> None:
        self.folder = folder
        self.steps = steps
        kept = [record for record in read_metrics(folder) if record["step"] < first_step]
        temporary = folder / f".{METRICS}.part"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(folder / METRICS)
        self.file = (folder / METRICS).open("a")
        with_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: Any = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True) if with_bar else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """A line for people."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def advance(self) -> None:
        """A step is done (as far as the host can tell)."""
        if self.bar is not None:
            self.bar.update()

    def write(self, record: Record) -> None:
        """A line for programs, and its short form for people."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.bar is not None:
            self.bar.set_postfix_str(_short(record))
            return
        images_a_step = record["samples"] / (record["step"] + 1)
        seconds = (self.steps - record["step"] - 1) * images_a_step / record["images_per_second"]
        width = len(str(self.steps))
        left = timedelta(seconds=round(seconds))
        print(f"step {record['step'] + 1:{width}}/{self.steps}  {_short(record)}  {left} left", flush=True)


def _short(record: Record) -> str:
    return (
        f"epoch {record['epoch']}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"momentum {record['momentum']:.4f}  {record['images_per_second']:.0f} images/s  "
        f"data wait {record['data_wait']:.0%}"
    )


def plot_curves(folder: Path) -> Path | None:
    """Draws ``curves.png`` from ``metrics.jsonl``: loss and its terms, learning rate, weight decay, momentum.

    Returns:
        the picture's path, or None where there is no line to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(folder)
    if not records:
        return None
    updates = [record["step"] + 1 for record in records]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1.6, 1))
    loss = figure.add_subplot(grid[:, 0])
    terms = [key for key in records[0] if key.startswith("loss/")]
    for key in ["loss", *(terms if len(terms) > 1 else [])]:
        label = key if key == "loss" else key.removeprefix("loss/")
        loss.plot(updates, [record[key] for record in records], linewidth=1.2, label=label)
    loss.set(title="loss", xlabel="update")
    if len(terms) > 1:
        loss.legend(frameon=False)
    panels = [loss]
    for row, (key, title) in enumerate(
        (("lr", "learning rate"), ("weight_decay", "weight decay"), ("momentum", "momentum"))
    ):
        panel = figure.add_subplot(grid[row, 1])
        panel.plot(updates, [record[key] for record in records], linewidth=1.2, color="tab:gray")
        panel.set_title(title, fontsize="medium")
        panel.ticklabel_format(axis="y", useOffset=False)
        panels.append(panel)
    panels[-1].set_xlabel("update")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.set_xlim(0, max(updates[-1], 2))
        panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for panel in panels[1:-1]:
        panel.tick_params(labelbottom=False)
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path
