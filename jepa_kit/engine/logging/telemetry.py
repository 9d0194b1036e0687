"""Metrics of a run: ``metrics.jsonl``, and a progress bar or printed lines.

One line of ``metrics.jsonl`` for each logged step:

    step, epoch, samples          update counted from 0, its epoch, images up to and including it
    loss, loss/<term>             of this step, mean over processes
    grad_norm                     of this step, all gradients together, before any clipping
    lr, weight_decay, momentum    of this step
    images_per_second             over all processes, since the previous line, without the time of checkpoints and hooks
    tokens_per_second             the same for patches seen by the context encoder and patches predicted; in views
                                  without masks, all patches
    gflop_per_image               model GFLOP of an image (flops.py): forward, and backward as twice that
    tflops                        model TFLOP/s of one process, mean over processes
    mfu                           ``tflops`` over those of a large matrix product in the run's precision, measured at
                                  the start (planning/peak_flops.py; ``mfu_peak`` in run.json), 0 to 1
    data_wait                     fraction of the time in which the step waited for images
    peak_memory_gib               peak memory of a process since its start: tensors on CUDA, resident memory on the CPU
    reserved_memory_gib           CUDA: the most that torch's allocator reserved
    context_length, target_length mean patches of a context set and of a target set in this step, if it has masks
    data/skipped                  unusable images that were left out since the run began (skipped_samples.py)
    <hook>/<name>                 numbers that hooks returned after this step (run.py)

Figures of FLOP are left out if a network has no formula and was not counted.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jepa_kit.distributed.collectives import all_gather
from jepa_kit.engine.logging.loggers import SPEED, Logger
from jepa_kit.engine.schedules import Hyper
from jepa_kit.files import read_json_lines, write_json_lines
from jepa_kit.planning.peak_flops import peak_memory
from jepa_kit.run_folder import METRICS
from jepa_kit.structures import PatchSets, Update, View

Record = dict[str, float]
"""A line of metrics.jsonl."""

BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"
MEASURED = frozenset((*SPEED, "eval/seconds"))
"""Values measured on the machine. All others of a line are the same in a resumed run."""


class Meter:
    """Measures one process between two lines, on the host; only ``record`` waits for the device.

    Args:
        patch_size: side of the encoder's patches in pixels.
        flops: FLOP of a training step by its views; None leaves the figures of FLOP out.
        peak: FLOP/s that this process's device can do; None leaves ``mfu`` out.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        flops: Callable[[Sequence[View]], float | None] | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.patch_size, self.flops, self.peak, self.clock = patch_size, flops, peak, clock
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self.start = self.clock()
        self.images = 0
        self.tokens = 0
        self.flop: float | None = 0.0
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the wait for images inside the ``with``."""
        start = self.clock()
        yield
        self.waited += self.clock() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Exclude the time inside the ``with``, such as that of a checkpoint."""
        start = self.clock()
        yield
        self.start += self.clock() - start

    def count(self, views: Sequence[View]) -> None:
        """Count a step of this process with these views of each of its images."""
        images, masks = len(views[0]), [view.masks for view in views if view.masks is not None]
        self.images += images
        self.tokens += sum(m.context.num_patches + m.targets.num_patches for m in masks)
        self.tokens += sum(view.images[:, 0].numel() // self.patch_size**2 for view in views if view.masks is None)
        flop = None if self.flops is None else self.flops(views)
        self.flop = None if flop is None or self.flop is None else self.flop + flop

    def record(self, hyper: Hyper, out: Update, views: Sequence[View]) -> Record:
        """Return a step's line from its loss on; every process must call it.

        Waits for the device, then starts a new interval.
        """
        masks = [view.masks for view in views if view.masks is not None]
        terms = {f"loss/{name}": term for name, term in out.terms.items()}
        figures = {f"figures/{name}": value for name, value in out.figures.items()}
        measured = {"loss": out.loss, **terms, **figures, "grad_norm": out.grad_norm}
        on_device = torch.stack([value.detach().double() for value in measured.values()])
        losses = on_device.tolist()  # waits for the device: only now is the time that of the steps
        seconds = max(self.clock() - self.start, 1e-9)
        device = on_device.device
        speed = {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": self.waited / seconds,
            "context_length": mean_length([m.context for m in masks]),
            "target_length": mean_length([m.targets for m in masks]),
            "peak_memory_gib": peak_memory(device) / 2**30,
            "reserved_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30
            if device.type == "cuda"
            else math.nan,
            "flop": math.nan if self.flop is None else self.flop / seconds,
            "peak": math.nan if self.peak is None else self.peak,
        }
        table = all_gather(torch.tensor([*losses, *speed.values()], dtype=torch.float64, device=device))
        self.restart()
        means = dict(zip(measured, table.mean(0).tolist(), strict=False))
        return {**means, **vars(hyper), **speed_over_ranks(list(speed), table[:, len(measured) :])}


def mean_length(parts: Sequence[PatchSets]) -> float:
    """Return the mean number of patches of a set; NaN without any."""
    sets = sum(map(len, parts))
    return sum(part.num_patches for part in parts) / sets if sets else math.nan


def speed_over_ranks(names: Sequence[str], table: Tensor) -> Record:
    """Return the values on speed and memory of a line, without those that are NaN.

    Args:
        names: of the columns; ``flop`` is the FLOP/s of the training, ``peak`` those of the device.
        table: [ranks, names] values of each rank.
    """
    record: Record = dict(zip(names, table.mean(0).tolist(), strict=True))
    largest: Record = dict(zip(names, table.amax(0).tolist(), strict=True))
    flop, peak = record.pop("flop"), record.pop("peak")
    images = record["images_per_second"]
    record |= {"gflop_per_image": flop / max(images, 1e-9) / 1e9, "tflops": flop / 1e12, "mfu": flop / peak}
    for name in ("images_per_second", "tokens_per_second"):
        record[name] *= len(table)
    for name in ("peak_memory_gib", "reserved_memory_gib"):
        record[name] = largest[name]
    return {name: value for name, value in record.items() if math.isfinite(value)}


def read_metrics(folder: Path) -> list[Record]:
    """Return the lines of a run, without a last one that is cut short.

    Raises:
        ValueError: another line is not JSON, or has no step.
    """
    path = folder / METRICS
    records: list[Record] = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number} ({json.dumps(record):.40}) must be a mapping with a 'step'")
        if "share_of_peak" in record:  # of earlier versions
            record["mfu"] = record.pop("share_of_peak")
    return records


class Journal(AbstractContextManager["Journal"]):
    """Writes the lines of a run and shows its progress, on the main process.

    Args:
        folder: of the run.
        first_step: lines from it on are dropped, so that a resumed run has none twice.
        steps: of the whole run.
        bar: a progress bar in place of plain lines; None for a bar on a terminal.
        loggers: get a copy of each line; closed at the end.
    """

    def __init__(
        self, folder: Path, *, first_step: int, steps: int, bar: bool | None = None, loggers: Sequence[Logger] = ()
    ) -> None:
        self.folder, self.steps, self.loggers = folder, steps, loggers
        kept = [record for record in read_metrics(folder) if record["step"] < first_step]
        write_json_lines(folder / METRICS, kept)
        self.file = (folder / METRICS).open("a")
        with_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: Any = tqdm(total=steps, initial=first_step, bar_format=BAR, dynamic_ncols=True) if with_bar else None

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        for logger in self.loggers:
            logger.close()

    def info(self, text: str) -> None:
        """Print a message."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self.bar is not None:
            self.bar.update()

    def write(self, record: Record) -> None:
        """Write a line to ``metrics.jsonl`` and the loggers, and print a short form."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger.write(record)
        if "loss" not in record:  # a step without its batch, with what hooks returned
            return
        if self.bar is not None:
            self.bar.set_description_str(_short(record, bar=True))
            return
        images_a_step = record["samples"] / (record["step"] + 1)
        seconds = (self.steps - record["step"] - 1) * images_a_step / record["images_per_second"]
        width = len(str(self.steps))
        left = timedelta(seconds=round(seconds))
        print(f"step {record['step'] + 1:{width}}/{self.steps}  {_short(record)}  {left} left", flush=True)

    def flush(self) -> None:
        """Flush all lines to the disk."""
        os.fsync(self.file.fileno())


def _short(record: Record, bar: bool = False) -> str:
    """Format a line; the form for a progress bar leaves the bar 25 of 120 columns."""
    mfu = f"  mfu {record['mfu']:.0%}" if "mfu" in record else ""
    skipped = f"  {record['data/skipped']:.0f} images skipped" if record.get("data/skipped") else ""
    if bar:
        wait = f"  wait {record['data_wait']:.0%}"
        return f"loss {record['loss']:.4f}  {record['images_per_second']:.0f} images/s{wait}{mfu}{skipped}"
    return (
        f"epoch {record['epoch']}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"momentum {record['momentum']:.4f}  {record['images_per_second']:.0f} images/s  "
        f"data wait {record['data_wait']:.0%}{mfu}{skipped}"
    )
