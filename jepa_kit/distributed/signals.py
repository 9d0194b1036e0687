"""SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1: the run stops after a step that all ranks agree on, and can be resumed.

The first signal, on any rank, requests the stop: the run finishes its step, writes a checkpoint and exits with status
``EX_TEMPFAIL`` (75), on which a scheduler can requeue it, or 130 after SIGINT. A second signal ends the process at
once, as if there were no handler. Signals within ``SAME`` seconds count as one: Slurm signals every process of a step,
and torchrun forwards its own signals. (In a single process a second SIGINT counts at any time.)
SIGINT before the first step ends the process at once, as there is nothing to save. A signal that is ignored when the
process starts (nohup) stays ignored.

How ranks agree: every ``EVERY`` steps they begin an all-reduce (max, over gloo, in the background) of one number: 0
continue, 1 stop, 2 failed. They read the result ``EVERY`` steps later. So all ranks see the same result at the same
step, at most ``2 * EVERY`` steps after the signal, and no step waits for it.

torchrun itself ends at SIGUSR1 unless it is started with ``--signals-to-handle
SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1`` (torch 2.13 has it); it kills its processes 30 seconds after it has forwarded a
signal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from jepa_kit.distributed.collectives import all_gather_object, is_main, joined

EX_TEMPFAIL = 75
"""sysexits.h: a temporary failure; the command may be run again."""

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""If ranks got different ones, the first of these counts: SIGTERM may come from ``scancel``, whose job must not be
requeued."""
SAME = 2.0
"""Seconds."""
EVERY = 4
"""Steps."""


class Decision(IntEnum):
    """What all ranks do next: the largest of their values."""

    CONTINUE = 0
    STOP = 1
    FAILED = 2


class Preempted(Exception):
    """A run was stopped by a signal; its checkpoint is written.

    Args:
        number: the signal, the same on all ranks.
        step: updates that the checkpoint has had.
        here: whether this rank got the signal.
    """

    def __init__(self, number: int, step: int, *, here: bool = True) -> None:
        self.number, self.step = number, step
        by = signal.Signals(number).name + ("" if here else " to another rank")
        super().__init__(f"stopped by {by} after {step:,} steps; the checkpoint is written, and --resume continues it")

    @property
    def status(self) -> int:
        """The exit status of a tool."""
        return INTERRUPTED if self.number == signal.SIGINT else EX_TEMPFAIL


def preempted(own: int | None, step: int) -> Preempted:
    """Return the exception for a stopped run; all ranks must call it.

    Args:
        own: the signal that this rank got, or None.
        step: updates that the checkpoint has had.
    """
    number = min((number for number in all_gather_object(own) if number is not None), key=SIGNALS.index)
    return Preempted(number, step, here=own == number)


class Signals:
    """Handles ``SIGNALS`` inside its ``with``, in the main thread.

    Attributes:
        number: the first signal, or None so far.
        step: updates that the checkpoint has had, once the run is stopped.
        stepping: set when the first step begins: from then on SIGINT saves.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.step = 0
        self.stepping = False
        self.time = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        interrupt = number == signal.SIGINT
        if interrupt and not self.stepping:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self.time = number, time.monotonic()
            if interrupt and is_main():  # not by print: it may be what was interrupted
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again aborts without one\n")
        elif time.monotonic() - self.time > (0.0 if interrupt and not joined() else SAME):
            if interrupt:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class StopConsensus:
    """All-reduce of stop and failure flags, whose result is read some steps later.

    Args:
        every: steps between two reductions; the same on all ranks. One process decides at once.
    """

    def __init__(self, every: int = EVERY) -> None:
        self.every = every
        self.group: Any = dist.new_group(backend="gloo") if joined() else None
        self.work: Any = None
        self.numbers = torch.zeros(1, dtype=torch.int64)

    def poll(self, step: int, failed: bool, stop: bool) -> Decision:
        """Return what all ranks do after this step; all ranks must call it after each step.

        Args:
            step: the same on all ranks.
            failed: this rank has an error, which it raises as soon as all ranks know.
            stop: this rank got a signal.

        Returns:
            the same on all ranks; CONTINUE as long as there is no result.
        """
        own = Decision.FAILED if failed else Decision.STOP if stop else Decision.CONTINUE
        if self.group is None:
            return own
        if step % self.every:
            return Decision.CONTINUE
        decision = self.wait()
        if decision is Decision.CONTINUE:
            self.numbers.fill_(own)
            self.work = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return decision

    def wait(self) -> Decision:
        """Wait for the reduction under way and return its result, on all ranks; CONTINUE if there is none."""
        if self.work is None:
            return Decision.CONTINUE
        self.work.wait()
        self.work = None
        return Decision(int(self.numbers))


def requeue(environ: Mapping[str, str] = os.environ) -> str | None:
    """Requeue this Slurm job; to be called on one rank, after the checkpoint is written.

    Returns:
        a message; None outside of Slurm.

    Raises:
        RuntimeError: ``scontrol`` failed, or is not installed.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"job {job} was not requeued: there is no scontrol here") from error
    if done.returncode:
        raise RuntimeError(f"job {job} was not requeued: {done.stderr.strip() or done.returncode}")
    return f"job {job} is requeued"
