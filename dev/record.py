#!/usr/bin/env python
"""Record what the code computes, so that two versions of it can be compared number by number.

A recording has losses and final weights of three short runs (one process; two processes with accumulated gradients;
two processes with FSDP), the differences from the released code's fixture, masks of every masker, the order of
samples with crops, and the figures of every evaluation protocol. All of it is float32 on one thread of a CPU with fixed
seeds, so that the same code gives the same bits on the same machine. It takes a few minutes.

examples:
  # before a change: a recording, and its runs to be resumed later
  python dev/record.py before.json --keep old_runs

  # after it: the recording again, what differs, and old checkpoints resumed with the new code
  python dev/record.py after.json
  python dev/record.py --compare before.json after.json
  python dev/record.py --read old_runs

Runs, weights, masks and order must be equal; figures of protocols may differ by 1e-12. Another machine, and other
options in the resolved configs of the runs, are printed as notes: they are no difference.

Exit status: 0 if nothing differs, 1 if something does, 2 for a command or a file that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from record_data import record_masks, record_order
from record_parts import (
    SAVED,
    STEPS,
    TRAININGS,
    features,
    machine,
    make_scenes,
    outcome,
    record_parity,
    record_protocols,
    record_tools,
    record_training,
    train,
)

RECORDING = "record.json"
"""In a folder of ``--keep``: what uninterrupted training gave."""
TOLERANCE = {"protocols": 1e-12}
"""Section -> largest absolute difference, or relative to numbers above 1; sections that are not here must be equal."""
NOTED = re.compile(r"(machine|training\.\w+\.config)\b.*")
"""Places that are shown and are no difference: options may get new names, and one that matters moves other numbers."""
NORM = re.compile(r"[0-9a-f]{64} norm (\S+)")
"""What ``fingerprint`` gives."""


def record(out: Path, data: Path | None, keep: Path | None) -> None:
    """Write a recording.

    Args:
        out: the file.
        data: a folder for the shards of scenes; those that are there are used.
        keep: a folder for shards, runs at step ``SAVED`` and the recording: what ``--read`` takes.
    """
    with tempfile.TemporaryDirectory(prefix="record_") as scratch:
        place = Path(scratch)
        runs = keep or place
        if keep is not None and any((keep / name).exists() for name in TRAININGS):
            raise FileExistsError(f"--keep (={keep}) holds runs already: give another folder")
        shards = data or runs / "shards"
        shards.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"machine": machine(), "shards": make_scenes(shards)}
        print("shards are made", flush=True)
        content |= {"parity": record_parity(), "masks": record_masks(), "order": record_order(place / "tiny")}
        print("parity, masks and order are done", flush=True)
        content["training"] = {}
        for name in TRAININGS:
            content["training"][name] = record_training(name, runs / name, shards)
            print(f"{name} is trained", flush=True)
        content["protocols"] = record_protocols(runs / "quickstart", shards, place)
        content["tools"] = record_tools(runs / "released", shards, place)
    text = written(content)
    out.write_text(text + "\n")
    if keep is not None:
        (keep / RECORDING).write_text(text + "\n")
        if data is not None:
            shutil.copytree(data, keep / "shards")
        for name in TRAININGS:
            (last,) = (keep / name).glob(f"checkpoint_{STEPS:08d}*")
            shutil.rmtree(last) if last.is_dir() else last.unlink()


def written(value: Any, depth: int = 4) -> str:
    """Return JSON with a line for each entry of the upper mappings, ``depth`` of them within one another."""
    if not depth or not isinstance(value, dict):
        return json.dumps(value, separators=(",", ":"))
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {written(part, depth - 1)}" for key, part in value.items()) + "\n}"


def read(kept: Path) -> list[str]:
    """Resume the runs of a ``--keep`` folder, in copies, and return what differs from uninterrupted training."""
    recorded, found = read_recording(kept / RECORDING)["training"], []
    with tempfile.TemporaryDirectory(prefix="record_") as scratch:
        for name in TRAININGS:
            folder = Path(scratch) / name
            shutil.copytree(kept / name, folder)
            now: dict[str, Any] = {}
            for step in (read_features, resume_copy):
                try:
                    now |= step(name, folder, kept / "shards")
                except (OSError, ValueError, RuntimeError) as error:  # noqa: PERF203 (the others are read all the same)
                    found.append(f"{name}: {step.__name__} failed: {error}")
            found += differences({key: recorded[name][key] for key in now}, now, name)
            print(f"{name} is read", flush=True)
    return found


def read_features(name: str, folder: Path, shards: Path) -> dict[str, Any]:
    """Return the features that the encoder of a run's checkpoint gives."""
    (saved,) = folder.glob(f"checkpoint_{SAVED:08d}*")
    return {f"features at {SAVED}": features(saved)}


def resume_copy(name: str, folder: Path, shards: Path) -> dict[str, Any]:
    """Resume a run and return what it came to."""
    train(name, folder, shards, config=folder)
    return outcome(folder)


def differences(one: Any, other: Any, place: str = "", tolerance: float = 0.0) -> Iterator[str]:
    """Yield a line for each difference between two parts of recordings: its place and its size.

    Args:
        one, other: mappings, lists, numbers, texts or None.
        place: where they stand, as ``training.fsdp.lines.3.loss``.
        tolerance: largest difference of two floats, relative to numbers above 1.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            inner = f"{place}.{key}".lstrip(".")
            if key in one and key in other:
                yield from differences(one[key], other[key], inner, tolerance)
            else:
                yield f"{inner}: only in the {'first' if key in one else 'second'}"
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            yield f"{place}: {len(one)} entries and {len(other)}"
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{place}.{number}", tolerance)
    elif type(one) is type(other) is float:
        gap = abs(one - other)
        same = one == other or (math.isnan(one) and math.isnan(other))
        if not same and not gap <= tolerance * max(1.0, abs(one)):
            yield f"{place}: {one!r} and {other!r} differ by {gap:.1e}"
    elif type(one) is not type(other) or one != other:
        norms = [NORM.fullmatch(value) if isinstance(value, str) else None for value in (one, other)]
        if norms[0] and norms[1]:
            a, b = (float(norm[1]) for norm in norms if norm)
            yield f"{place}: other bits, norms {a!r} and {b!r} differ by {abs(a - b):.1e}"
        else:
            yield f"{place}: {one!r:.70} and {other!r:.70}"


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return a line for each difference between two recordings, and for each of what is ``NOTED``."""
    lines: list[str] = []
    for name in {**one, **other}:
        parts = ({name: content[name]} if name in content else {} for content in (one, other))
        lines += differences(*parts, tolerance=TOLERANCE.get(name, 0.0))
    noted = [line for line in lines if NOTED.match(line)]
    return [line for line in lines if line not in noted], noted


def read_recording(file: Path) -> dict[str, Any]:
    """Return a recording.

    Raises:
        ValueError: the file is no recording.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no recording of record.py: {error}") from error
    if not isinstance(content, dict) or "machine" not in content:
        raise ValueError(f"{file} is no recording of record.py: it has no 'machine'")
    return content


def verdict(lines: Sequence[str], same: str) -> int:
    """Print the differences, or that there is none; return the exit status."""
    print("\n".join(lines) if lines else same)
    if lines:
        print(f"{len(lines)} differences")
    return 1 if lines else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Record, compare or read; return the exit status."""
    description, examples = (__doc__ or "").split("\n\nexamples:")
    p = argparse.ArgumentParser(
        "record.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("out", metavar="OUT.json", nargs="?", type=Path, help="the file to record into")
    what.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), type=Path, help="name what differs")
    what.add_argument("--read", metavar="DIR", type=Path, help="resume the runs of a --keep folder, and compare")
    p.add_argument("--data", metavar="DIR", type=Path, help="shards of scenes, made if missing (default: temporary)")
    p.add_argument("--keep", metavar="DIR", type=Path, help="keep shards and runs there, at step 30")
    options = p.parse_args(argv)
    if options.out is None and (options.data or options.keep):
        p.error("--data and --keep go with OUT.json")
    try:
        if options.compare:
            found, noted = compare(*map(read_recording, options.compare))
            print("".join(f"note: {line}\n" for line in noted), end="")
            return verdict(found, "no difference")
        if options.read:
            return verdict(read(options.read.resolve()), "every run resumes as if it had not stopped")
        paths = [None if path is None else path.resolve() for path in (options.out, options.data, options.keep)]
        record(*paths)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"record.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
