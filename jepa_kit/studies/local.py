"""The queue of this machine: several workers, each with its own cores and GPU, and one progress line for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jepa_kit
from jepa_kit.distributed.signals import EX_TEMPFAIL, INTERRUPTED
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.errors import ConfigError
from jepa_kit.lock import LockedError, lock_file
from jepa_kit.machine import usable_cores
from jepa_kit.progress import duration
from jepa_kit.studies.cells import Job, Plan
from jepa_kit.studies.jobs import done_steps, job_file, log_file, state_of
from jepa_kit.studies.records import read_record
from jepa_kit.studies.worker import fail

POLL = 1.0
"""Seconds between two looks at the workers."""
QUIET = 60.0
"""Seconds between two progress lines if the output is no terminal."""
LOCK = ".study.lock"


@dataclass(eq=False)
class _Worker:
    """A process that works on a job."""

    job: Job
    place: int
    process: subprocess.Popen[bytes]


@dataclass(eq=False)
class Queue:
    """Runs the jobs of a plan.

    Args:
        plan: of the study.
        results, runs: folders.
        workers: number of processes.
        threads: cores of each.
        gpus: visible devices, which workers get in turn; none on a CPU.
    """

    plan: Plan
    results: Path
    runs: Path
    workers: int
    threads: int
    gpus: Sequence[str] = ()
    signal: int | None = field(default=None, init=False)
    started: float = field(default_factory=time.monotonic, init=False)
    shown: float = field(default=0.0, init=False)
    first: float = field(default=0.0, init=False)

    def run(self, jobs: Sequence[Job]) -> int:
        """Run jobs until all are done, or until a signal; return the exit status: 0, 75 or 130.

        Raises:
            ValueError: another process runs this study in the folder.
        """
        try:
            with lock_file(self.runs / LOCK), self._signals():
                return self._run(list(jobs))
        except LockedError as error:
            raise ValueError(f"the study already runs in {self.runs}: {error.holder}") from error

    def _run(self, waiting: list[Job]) -> int:
        running: list[_Worker] = []
        every, interrupted = self.plan.jobs, False
        self.first = self._fraction(every)
        while running or (waiting and self.signal is None):
            while waiting and len(running) < self.workers and self.signal is None:
                free = next(k for k in range(self.workers) if k not in [worker.place for worker in running])
                running.append(self._start(waiting.pop(0), free))
            time.sleep(POLL)
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                interrupted |= self._finish(worker)
            if self.signal is not None:
                for worker in running:
                    if worker.process.stdin is not None and not worker.process.stdin.closed:
                        worker.process.stdin.close()  # the worker stops, as after SIGTERM
            self._show(every, running)
        if self.signal is not None:
            self._say("stopped; the same command continues the study")
            return INTERRUPTED if self.signal == signal.SIGINT else EX_TEMPFAIL
        return EX_TEMPFAIL if interrupted else 0

    def _start(self, job: Job, place: int) -> _Worker:
        file = job_file(self.plan, job, self.results, self.runs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        clone = str(Path(jepa_kit.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [clone, environment.get("PYTHONPATH")]))
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        cores = self.cores_of(place) if self.workers > 1 else []
        with log_file(self.runs, job).open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jepa_kit.studies.worker", str(file), "--follow-stdin"),
                    *(["--cores", ",".join(map(str, cores))] if cores else []),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the workers
            )
        step = done_steps(job, self.runs)
        starts = f"resumes at step {step}" if step else "starts"
        self._say(f"{_name(job)}: {state_of(job, self.results, self.runs)}, {starts}; log {log_file(self.runs, job)}")
        return _Worker(job, place, process)

    def cores_of(self, place: int) -> list[int]:
        """Return the cores of a worker; none if this system cannot bind a process to cores."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return [cores[(place * self.threads + k) % len(cores)] for k in range(self.threads) if cores]

    def _finish(self, worker: _Worker) -> bool:
        """Report a worker's end; return whether its job was interrupted. A crash becomes a record."""
        job, status = worker.job, worker.process.returncode
        if worker.process.stdin is not None:
            worker.process.stdin.close()
        stopped = status in (EX_TEMPFAIL, INTERRUPTED) or (self.signal is not None and status != 0)
        if status and not stopped and state_of(job, self.results, self.runs) not in ("finished", "failed"):
            file = job_file(self.plan, job, self.results, self.runs)
            fail(_read(file), f"{_ending(status)}; {_last_line(log_file(self.runs, job))}")
        record = read_record(self.results, job.id)
        if stopped or record is None:
            self._say(f"{_name(job)}: interrupted")
            return True
        self._say(f"{_name(job)}: {record.state}{f': {record.reason}' if record.reason else ''}")
        return False

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is None:
                os.write(2, b"\nstopping: each worker writes a checkpoint\n")
            self.signal = number

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fraction(self, jobs: Sequence[Job]) -> float:
        """Return the fraction of the FLOP of all jobs that is done."""
        total = sum(job.length.flop for job in jobs if job.length is not None)
        done = sum(job.length.flop * self._progress(job) for job in jobs if job.length is not None)
        return done / total if total else 1.0

    def _progress(self, job: Job) -> float:
        if read_record(self.results, job.id) is not None:
            return 1.0
        return last_step(self.runs / job.id) / job.length.steps if job.length is not None else 0.0

    def _part(self, job: Job) -> str:
        return _name(job) if job.length is None else f"{_name(job)} {100 * self._progress(job):.0f} %"

    def _show(self, jobs: Sequence[Job], running: Sequence[_Worker]) -> None:
        """Print the progress line: each second on a terminal, else each minute."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.shown < (POLL if terminal else QUIET):
            return
        self.shown = now
        fraction = self._fraction(jobs)
        done = sum(read_record(self.results, job.id) is not None for job in jobs)
        parts = [f"{done} of {len(jobs)} done, {100 * fraction:.0f} % of the FLOP"]
        parts += [self._part(worker.job) for worker in running]
        if fraction > self.first:
            left = (now - self.started) * (1 - fraction) / (fraction - self.first)
            parts.append(f"{duration(left)} left")
        line = " | ".join(parts)
        print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        terminal = sys.stderr.isatty()
        print(f"\r\033[K{text}" if terminal else text, file=sys.stderr, flush=True)


def last_step(folder: Path) -> int:
    """Return the number of updates that the log of a run has, or 0."""
    try:
        lines = read_metrics(folder) if folder.is_dir() else []
    except (ValueError, OSError):  # the run replaces the file at this moment
        return 0
    return int(lines[-1]["step"]) + 1 if lines else 0


def _name(job: Job) -> str:
    return f"{job.title}, seed {job.seed}" if job.kind == "cell" else job.title


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:300]


def make_queue(plan: Plan, results: Path, runs: Path, workers: int) -> Queue:
    """Return the queue of this machine, which divides its cores and GPUs.

    Raises:
        ConfigError: there are more workers than cores.
    """
    cores = usable_cores()
    if not 1 <= workers <= cores:
        raise ConfigError([f"--workers (={workers}) must be from 1 to the cores of this machine (={cores})"])
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(cores // workers, int(given)) if given.isdigit() and int(given) else cores // workers
    return Queue(plan, results, runs, workers, threads, visible_gpus())


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return given.split(",") if given else [str(k) for k in range(torch.cuda.device_count())]
