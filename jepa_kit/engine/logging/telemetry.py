"""What a run tells: ``metrics.jsonl``, a progress bar or plain lines.

One line of ``metrics.jsonl`` for each logged step:

    step, epoch, samples          update counted from 0, its epoch, images asked for with it
    loss, loss/<term>             of this step, mean over processes
    grad_norm                     of this step, all gradients together, before any clipping
    lr, weight_decay, momentum    what the step ran with
    images_per_second             over all processes, since the line before; checkpoints and hooks are not counted
    tokens_per_second             the same for patches seen by the context encoder and patches predicted
    gflop_per_image               model GFLOP of an image (flops.py): forward, and backward as twice that
    tflops                        model TFLOP a second of one process, mean over processes
    mfu                           ``tflops`` over what the device does in a large matrix product of the run's precision,
                                  measured at the start (speed.py; ``mfu_peak`` in run.json), 0 to 1
    data_wait                     share of the time in which the step waited for images
    peak_memory_gib               most memory of a process since it began: tensors on CUDA, resident memory on the CPU
    reserved_memory_gib           CUDA: the most that torch's allocator held for them
    context_length, target_length mean patches of a context set and of a target set in this step
    data/skipped                  images that could not be used and were left out, since the run began (skipped.py)
    <hook>/<name>                 what hooks gave after this step (hooks.py)

The figures of FLOP are left out where a network has no formula.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jepa_kit.distributed.collectives import all_gather
from jepa_kit.engine.logging.loggers import Board
from jepa_kit.engine.schedules import Hyper
from jepa_kit.files import read_json_lines, write_json_lines
from jepa_kit.planning.peak_flops import peak_memory
from jepa_kit.run_folder import METRICS
from jepa_kit.structures import MaskBatch, Update

Record = dict[str, float]
"""A line of metrics.jsonl."""

BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"
MEASURED = frozenset(
    (
        "images_per_second",
        "tokens_per_second",
        "data_wait",
        "tflops",
        "mfu",
        "peak_memory_gib",
        "reserved_memory_gib",
        "gflop_per_image",
        "eval/seconds",
    )
)
"""What was measured since the line before. Everything else of a line is the same in a run that goes on."""


class Meter:
    """Measures one process between two lines, on the host; the device is asked in ``record`` alone.

    Args:
        flops: FLOP of a training step by the masks and the number of images; None leaves the figures of FLOP out.
        peak: FLOP/s that this process's device can do; None leaves the share of it out.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        flops: Callable[[MaskBatch, int], float | None] | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops = flops
        self.peak = peak
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        """Starts a new stretch of time."""
        self.start = self.clock()
        self.images = 0
        self.tokens = 0
        self.flop: float | None = 0.0
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

    def count(self, masks: MaskBatch, images: int) -> None:
        """Counts a step of this process, by the masks and the number of images of its batch."""
        self.images += images
        self.tokens += masks.context.num_patches + masks.targets.num_patches
        flop = None if self.flops is None else self.flops(masks, images)
        self.flop = None if flop is None or self.flop is None else self.flop + flop

    def record(self, hyper: Hyper, out: Update, masks: MaskBatch) -> Record:
        """What a step's line tells from its loss on; every process must call it.

        Waits for the device, then starts a new stretch of time.
        """
        terms = {f"loss/{name}": term for name, term in out.terms.items()}
        measured = {"loss": out.loss, **terms, "grad_norm": out.grad_norm}
        on_device = torch.stack([value.detach().double() for value in measured.values()])
        losses = on_device.tolist()  # waits for the device: only now is the time that of the steps
        seconds = max(self.clock() - self.start, 1e-9)
        device = on_device.device
        own = [
            *losses,
            self.images / seconds,
            self.tokens / seconds,
            self.waited / seconds,
            masks.context.num_patches / len(masks.context),
            masks.targets.num_patches / len(masks.targets),
            peak_memory(device) / 2**30,
            torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else math.nan,
            math.nan if self.flop is None else self.flop / seconds,
            math.nan if self.peak is None else self.peak,
        ]
        table = all_gather(torch.tensor(own, dtype=torch.float64, device=device))  # [ranks, values]
        means = dict(zip(measured, table.mean(0).tolist(), strict=False))
        record: Record = {
            **means,
            "lr": hyper.lr,
            "weight_decay": hyper.weight_decay,
            "momentum": hyper.momentum,
            **self._speed(table[:, len(measured) :]),
        }
        self.restart()
        return record

    def _speed(self, table: Tensor) -> Record:
        """From the host's values of each rank: [ranks, 9]."""
        ranks = len(table)
        images, tokens, wait, context, target, _, _, flop, peak = table.mean(0).tolist()
        record = {
            "images_per_second": images * ranks,
            "tokens_per_second": tokens * ranks,
            "data_wait": wait,
            "peak_memory_gib": float(table[:, 5].max()),
            "context_length": context,
            "target_length": target,
        }
        if math.isfinite(reserved := float(table[:, 6].max())):
            record["reserved_memory_gib"] = reserved
        if math.isfinite(flop):
            record |= {"gflop_per_image": flop / max(images, 1e-9) / 1e9, "tflops": flop / 1e12}
            if math.isfinite(peak):
                record["mfu"] = flop / peak
        return record


def read_metrics(folder: Path) -> list[Record]:
    """The lines of a run.

    Raises:
        ValueError: a line that is not JSON, unless it is the last, which a killed run may leave cut short; or one that
            is no line of a step.
    """
    path = folder / METRICS
    records: list[Record] = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number} ({json.dumps(record):.40}) must be a mapping with a 'step'")
        if "share_of_peak" in record:  # of earlier versions
            record["mfu"] = record.pop("share_of_peak")
    return records


class Journal:
    """Writes the lines of a run and shows its progress; only the main process has one.

    Args:
        folder: of the run.
        first_step: lines at or after it are dropped, so that a resumed run has none twice.
        steps: of the whole run.
        bar: a progress bar in place of plain lines; None for a bar on a terminal.
        boards: what gets a copy of each line; closed at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        steps: int,
        bar: bool | None = None,
        boards: Sequence[Board] = (),
    ) -> None:
        self.folder = folder
        self.steps = steps
        self.boards = boards
        kept = [record for record in read_metrics(folder) if record["step"] < first_step]
        write_json_lines(folder / METRICS, kept)
        self.file = (folder / METRICS).open("a")
        with_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: Any = tqdm(total=steps, initial=first_step, bar_format=BAR, dynamic_ncols=True) if with_bar else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        for board in self.boards:
            board.close()

    def info(self, text: str) -> None:
        """Print a message."""
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
        for board in self.boards:
            board.write(record)
        if "loss" not in record:  # a step whose batch was left out, with what hooks gave
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
        """Has all lines on the disk: a checkpoint must not outlive the lines before it."""
        os.fsync(self.file.fileno())


def _short(record: Record, bar: bool = False) -> str:
    """Format a line; that of a progress bar leaves it 25 of 120 columns."""
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
