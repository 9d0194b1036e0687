#!/usr/bin/env python
"""Damage configs, checkpoints, weights, shards, indices and images at random, and open each of them.

Each case must succeed or raise an error of jepa_kit within a time limit. A case fails if

- an exception comes from another library, or is not documented, so that a user would see a traceback;
- it takes too long, or its process dies or allocates more memory than a small file can need;
- a damaged file with a checksum is accepted although its content has changed;
- non-finite weights are accepted.

examples:
  python dev/fuzz.py                                     # 2,000 cases, 2 processes; below five minutes
  python dev/fuzz.py --cases 100 --processes 1           # what `make test` runs
  python dev/fuzz.py --seed 7 --kinds weights,configs    # kinds with these prefixes
  python dev/fuzz.py --again weights.onnx:7:12           # repeat a case: kind, seed and number of a failure

A kind is a function ``cases(seed)`` that yields (name, call), deterministically. ``call`` returns if the opened content
equals the original, and raises ``Harmed`` if other content was accepted. Exit status: 0, or 1 after any failure.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import itertools
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: processes are forked

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "dev"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

Cases = Callable[[int], Iterator[tuple[str, Callable[[], object]]]]

MODULES = ("fuzz_configs", "fuzz_weights", "fuzz_data")
"""Files of dev/ with kinds: ``KINDS`` (name -> cases), or one ``cases`` for the kind of the file's name."""

CHUNK = 25
"""Cases that follow from one seed."""
LIMIT = 30.0
"""Seconds of a case: most take milliseconds, on a busy machine some take seconds."""
MEMORY = 6 << 30
"""Bytes of address space that a worker may add to what its imports take."""

ACCEPTED, REFUSED, FAILED = "accepted unharmed", "refused", "failures"


class Harmed(Exception):
    """Damaged content was accepted."""


class Failure(NamedTuple):
    """A case that failed: the argument of ``--again``, its name, and the failure."""

    case: str
    name: str
    text: str


@functools.cache
def temporary_folder(kind: str) -> Path:
    """Return a folder for damaged files of this process, which is removed at exit."""
    place = Path(tempfile.mkdtemp(prefix=f"jepa_kit_fuzz_{kind}_"))
    atexit.register(shutil.rmtree, place, True)
    return place


def kinds() -> dict[str, Cases]:
    """Return all kinds by name, without those of missing modules."""
    found: dict[str, Cases] = {}
    for name in MODULES:
        if not (ROOT / "dev" / f"{name}.py").exists():
            continue
        module = importlib.import_module(name)
        found |= getattr(module, "KINDS", None) or {name.removeprefix("fuzz_"): module.cases}
    return found


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """Run a case; return (outcome, message of a failure)."""
    try:
        call()
    except Harmed as error:
        return FAILED, f"accepted: {error}"
    except (ValueError, OSError) as error:
        return (REFUSED, "") if ours(error) else (FAILED, traceback.format_exc(limit=-6))
    except BaseException as error:  # whatever it is, it is a failure of the case
        if isinstance(error, KeyboardInterrupt):
            raise
        return FAILED, traceback.format_exc(limit=-6)
    return ACCEPTED, ""


def ours(error: BaseException) -> bool:
    """Return whether an error was raised by a line of jepa_kit, and not inside another library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = "" if trace is None else trace.tb_frame.f_code.co_filename
    return Path(file).is_relative_to(ROOT / "jepa_kit") or (isinstance(error, FileNotFoundError) and bool(str(error)))


def work(channel: Connection, known: Mapping[str, Cases]) -> None:
    """Run a worker: receives (kind, seed, first, last), and sends a message before and after each case."""
    limited = False
    while (task := channel.recv()) is not None:
        kind, seed, first, last = task
        number = first
        for number, (name, call) in enumerate(itertools.islice(known[kind](seed), first, last), first):
            if not limited:  # after the imports that the kind needs
                limit_memory()
                limited = True
            channel.send(("start", number, name))
            channel.send(("end", number, *outcome(call)))
        channel.send(("done", number, ""))


def limit_memory() -> None:
    """Limit the memory of this process to ``MEMORY`` bytes more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Worker:
    """A process, its case, and the time at which the case started."""

    def __init__(self, known: Mapping[str, Cases]) -> None:
        context = multiprocessing.get_context("fork")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, known), daemon=True)
        self.process.start()
        theirs.close()
        self.task: tuple[str, int, int, int] | None = None
        self.case: tuple[int, str] = (0, "its preparation")
        self.since = time.monotonic()

    def give(self, task: tuple[str, int, int, int]) -> None:
        self.task, self.case, self.since = task, (task[2] - 1, "its preparation"), time.monotonic()
        self.channel.send(task)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.channel.close()


class Run:
    """Run all cases of all kinds in several processes."""

    def __init__(self, known: Mapping[str, Cases], *, cases: int, seed: int, processes: int, limit: float) -> None:
        self.known, self.limit = known, limit
        self.quota = {kind: -(-cases // len(known)) for kind in known}
        self.next_seed = dict.fromkeys(known, 1000 * seed)
        self.given = Counter[str]()
        self.counts = {kind: Counter[str]() for kind in known}
        self.failures: list[Failure] = []
        self.waiting: deque[tuple[str, int, int, int]] = deque()
        self.workers = [Worker(known) for _ in range(processes)]

    def task(self) -> tuple[str, int, int, int] | None:
        """Return the next chunk of the kind with the least progress."""
        if self.waiting:
            return self.waiting.popleft()
        behind = [kind for kind in self.known if self.given[kind] < self.quota[kind]]
        if not behind:
            return None
        kind = min(behind, key=lambda k: self.given[k])
        count = min(CHUNK, self.quota[kind] - self.given[kind])
        self.given[kind] += count
        self.next_seed[kind] += 1
        return kind, self.next_seed[kind] - 1, 0, count

    def fail(self, worker: Worker, text: str) -> None:
        assert worker.task is not None
        kind, seed, _, _ = worker.task
        number, name = worker.case
        self.counts[kind][FAILED] += 1
        self.failures.append(Failure(f"{kind}:{seed}:{number}", name, text))

    def lost(self, place: int, text: str) -> None:
        """Record a failure for a worker that hangs or died; another worker does the rest of its chunk."""
        worker = self.workers[place]
        if worker.task is not None:
            self.fail(worker, text)
            kind, seed, _, last = worker.task
            if worker.case[0] + 1 < last and worker.case[0] >= 0:
                self.waiting.append((kind, seed, worker.case[0] + 1, last))
        worker.end()
        self.workers[place] = Worker(self.known)

    def hear(self, worker: Worker) -> None:
        """Process one message of a worker."""
        what, number, *rest = worker.channel.recv()
        assert worker.task is not None
        worker.since = time.monotonic()
        if what == "start":
            worker.case = (number, rest[0])
        elif what == "end":
            self.counts[worker.task[0]][rest[0]] += rest[0] != FAILED
            if rest[0] == FAILED:
                self.fail(worker, rest[1])
        else:
            worker.task = None

    def look(self, place: int, worker: Worker, ready: bool) -> None:
        """Process a message, or a worker that hangs or died."""
        try:
            if ready:
                self.hear(worker)
            elif worker.task is not None and time.monotonic() - worker.since > self.limit:
                self.lost(place, f"no answer for {self.limit:.0f} s")
        except (EOFError, ConnectionError):
            worker.process.join()
            self.lost(place, f"its process died with status {worker.process.exitcode}")

    def __call__(self) -> None:
        """Run all cases."""
        try:
            while True:
                for worker in self.workers:
                    if worker.task is None and (task := self.task()) is not None:
                        worker.give(task)
                if all(worker.task is None for worker in self.workers):
                    return
                ready = set(wait([w.channel for w in self.workers], timeout=0.2))
                for place, worker in enumerate(self.workers):
                    self.look(place, worker, worker.channel in ready)
        finally:
            for worker in self.workers:
                worker.end()

    def table(self) -> str:
        """Return a table with a row per kind, and their sum."""
        head = ("kind", "cases", REFUSED, ACCEPTED, FAILED)
        rows = [
            (kind, sum(counts.values()), *(counts[one] for one in head[2:])) for kind, counts in self.counts.items()
        ]
        rows.append(("all", *(sum(row[k] for row in rows) for k in range(1, 5))))  # type: ignore[arg-type]
        width = max(len(str(row[0])) for row in rows)
        return "\n".join(
            " | ".join(str(cell).ljust(width) if k == 0 else str(cell).rjust(17) for k, cell in enumerate(row))
            for row in (head, *rows)
        )


def parser() -> argparse.ArgumentParser:
    from jepa_kit.arguments import tool_parser

    p = tool_parser("fuzz.py", __doc__)
    p.add_argument("--cases", type=int, default=2000, metavar="N", help="of all kinds together, at least (2000)")
    p.add_argument("--seed", type=int, default=0, help="of the damages (0)")
    p.add_argument("--processes", type=int, default=2, metavar="N", help="(2)")
    p.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"of a case ({LIMIT:.0f})")
    p.add_argument("--kinds", metavar="NAMES", help="only kinds that begin with one of these")
    p.add_argument("--again", metavar="KIND:SEED:NUMBER", help="run one case here, and let its error through")
    return p


def main(argv: Sequence[str] | None = None, known: Mapping[str, Cases] | None = None) -> int:
    """Run the tool; return the exit status."""
    arguments = parser().parse_args(argv)
    known = kinds() if known is None else known
    if arguments.again:
        kind, seed, number = arguments.again.rsplit(":", 2)
        name, call = next(itertools.islice(known[kind](int(seed)), int(number), None))
        print(name)
        print(call())
        return 0
    if arguments.kinds:
        starts = tuple(arguments.kinds.split(","))
        known = {kind: cases for kind, cases in known.items() if kind.startswith(starts)}
    start = time.monotonic()
    run = Run(known, cases=arguments.cases, seed=arguments.seed, processes=arguments.processes, limit=arguments.limit)
    run()
    for failure in run.failures:
        print(f"--- {failure.case}  {failure.name}\n{failure.text}")
    print(run.table())
    print(f"seed {arguments.seed}, {time.monotonic() - start:.0f} s with {arguments.processes} processes")
    return 1 if run.failures or any(not sum(c.values()) for c in run.counts.values()) else 0


def damaged(data: bytes, random: Any) -> tuple[str, bytes]:
    """Return (description, bytes) of a file that is cut, changed or extended."""
    n = len(data)
    at, length = random.randrange(n), random.choice((1, 1, 4, 64, 512))
    way = random.choice(("bit", "bit", "byte", "zeros", "noise", "cut", "drop", "insert", "swap", "repeat"))
    changed = bytearray(data)
    if way == "bit":
        changed[at] ^= 1 << random.randrange(8)
    elif way == "byte":
        changed[at] = random.randrange(256)
    elif way == "zeros":
        changed[at : at + length] = bytes(min(length, n - at))
    elif way == "noise":
        changed[at : at + length] = random.randbytes(min(length, n - at))
    elif way == "cut":
        del changed[at:]
    elif way == "drop":
        del changed[at : at + length]
    elif way == "insert":
        changed[at:at] = random.randbytes(length)
    elif way == "swap":
        other = random.randrange(n)
        changed[at], changed[other] = changed[other], changed[at]
    else:
        changed[at:at] = changed[at : at + length]
    return f"{way} at {at} of {n} (length {length})", bytes(changed)


if __name__ == "__main__":
    import fuzz  # as the modules of kinds import it

    sys.exit(fuzz.main())
