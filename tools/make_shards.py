#!/usr/bin/env python
"""Makes WebDataset shards from a folder of images, an archive of one, or synthetic scenes.

examples:
  # a folder with one sub-folder for each class; a tenth of it for validation, in OUT/train and OUT/val
  python tools/make_shards.py photos/ shards/photos --split-val 0.1

  # an archive with train/<class>/NNNN.jpg inside
  python tools/make_shards.py cifar10_train.tar.gz shards/cifar10-train

  # images without labels
  python tools/make_shards.py scans.zip shards/scans --label-from none

  # rendered scenes with three labels (count, distance, shape)
  python tools/make_shards.py synthetic:scenes shards/scenes --num-scenes 12000 --image-size 64 --split-val 0.17

JPEG and PNG files keep their bytes; other formats become PNG. Files that are not images are refused and listed, here
and in OUT/index.json. The format is described in jepa_kit/data/shard_writing.py; any reader of WebDataset reads it.
"""

from __future__ import annotations

import argparse
import glob
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jepa_kit import __version__
from jepa_kit.data.order import permutation
from jepa_kit.data.shard_writing import (
    INDEX,
    KEYS,
    LABELS,
    OFFSETS,
    UNFINISHED,
    Rows,
    Sample,
    Shard,
    write_index,
    write_shard,
)
from jepa_kit.data.sources import LABEL_FROM, Refused, Scenes, Source, open_files
from jepa_kit.registry import did_you_mean
from jepa_kit.rng import IntArray, Stream, generator

SYNTHETIC = ("scenes",)
SPLITS = ("", "train", "val")
"""Folders of OUT_DIR that may hold shards: itself, where there is no validation split, or its two parts."""
LISTED = 10
"""So many refused files are named on the terminal; index.json names all."""

Refusals = list[dict[str, str]]
Written = tuple[Shard, Rows, Refusals]
Tasks = dict[tuple[str, int], tuple[str, IntArray]]
"""(split, number of the shard) -> its path and the numbers of its samples."""

_source: Source
_done: Any
"""A counter of samples that all workers share."""


def parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").split("\n\nexamples:")
    p = argparse.ArgumentParser(
        prog="make_shards.py",
        description=text[0],
        epilog="examples:" + text[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", help="folder of images, .tar, .tar.gz, .tgz or .zip of one, or synthetic:scenes")
    p.add_argument("out", metavar="OUT_DIR", help="folder for the shards; made if missing")
    p.add_argument("--samples-per-shard", type=int, default=1024, metavar="N", help="default: 1024")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle, the split and the scenes (default: 0)")
    p.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mix the samples before they are put into shards (default), or keep them sorted by path; scenes are mixed",
    )
    p.add_argument("--split-val", type=float, default=0.0, metavar="SHARE", help="share for OUT_DIR/val (default: 0)")
    p.add_argument(
        "--label-from",
        choices=LABEL_FROM,
        default="auto",
        help="a file's class: its own folder (parent), the first folder of its path (top), or none; "
        "auto: parent where files lie in more than one folder (default)",
    )
    p.add_argument("--num-scenes", type=int, metavar="N", help="synthetic:scenes only (default: 10000)")
    p.add_argument(
        "--image-size", metavar="PIXELS", help="synthetic:scenes only: a side, or HEIGHTxWIDTH (default: 64)"
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    p.add_argument("--overwrite", action="store_true", help="replace shards that OUT_DIR already holds")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status: 0, 2 for what the user can put right, 130 where stopped by hand."""
    args = parser().parse_args(argv)
    scratch = os.path.join(args.out, f".unpacked.{os.getpid()}.tar")
    try:
        _check_values(args)
        _check_out(args)
        os.makedirs(args.out, exist_ok=True)
        source = _open_source(args, scratch)
        return _make(args, source)
    except BrokenProcessPool:
        print("make_shards: error: a worker died; often memory ran out: try fewer --workers", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"make_shards: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"make_shards: stopped; {args.out} is unfinished: run it again with --overwrite", file=sys.stderr)
        return 130
    finally:
        if os.path.exists(scratch):
            os.remove(scratch)


def _check_values(args: argparse.Namespace) -> None:
    if args.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard (={args.samples_per_shard}) must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed (={args.seed}) must be at least 0")
    if not 0.0 <= args.split_val < 1.0:
        raise ValueError(f"--split-val (={args.split_val}) must be at least 0 and below 1: it is a share")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers (={args.workers}) must be at least 1")
    if not args.source.startswith("synthetic:"):
        for option, value in (("--num-scenes", args.num_scenes), ("--image-size", args.image_size)):
            if value is not None:
                raise ValueError(f"{option} (={value}) is for synthetic:scenes alone; images keep their size")
    elif args.label_from != "auto":
        raise ValueError(f"--label-from (={args.label_from}) is for image files alone; scenes know their labels")


def _check_out(args: argparse.Namespace) -> None:
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f"OUT_DIR (={args.out!r}) must be a folder, but is a file")
    source, out = os.path.realpath(args.source), os.path.realpath(args.out)
    if os.path.isdir(source) and os.path.commonpath([source, out]) == source:
        raise ValueError(f"OUT_DIR (={args.out!r}) must lie outside the source (={args.source!r})")
    for split in SPLITS:
        held = _existing(_folder(out, split))
        if source in held:
            raise ValueError(f"source (={args.source!r}) must not be a shard in OUT_DIR, which would be replaced")
        if held and not args.overwrite:
            raise ValueError(f"OUT_DIR (={args.out!r}) already holds shards ({held[0]}): name another, or --overwrite")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder(out: str, split: str) -> str:
    return os.path.join(out, split) if split else out


def _existing(folder: str) -> list[str]:
    names = ("shard-*.tar", ".*.partial", INDEX, OFFSETS, LABELS, KEYS, UNFINISHED)
    return sorted(path for name in names for path in glob.glob(os.path.join(glob.escape(folder), name)))


def _open_source(args: argparse.Namespace, scratch: str) -> Source:
    kind, _, name = args.source.partition(":")
    if kind != "synthetic":
        if args.source.endswith(("gz", "zip")):
            print(f"opening {args.source}", flush=True)
        return open_files(args.source, label_from=args.label_from, scratch=scratch)
    if name not in SYNTHETIC:
        hint = did_you_mean(name, SYNTHETIC)
        raise ValueError(f"source (={args.source!r}) is not known{hint} Synthetic sources: synthetic:scenes")
    sides = str(args.image_size or 64).lower().split("x")
    if len(sides) > 2 or not all(s.isdigit() for s in sides):
        raise ValueError(f"--image-size (={args.image_size}) must be a side in pixels, or HEIGHTxWIDTH such as 64x96")
    size = (int(sides[0]), int(sides[-1]))
    return Scenes(num_scenes=10000 if args.num_scenes is None else args.num_scenes, size=size, seed=args.seed)


def _orders(args: argparse.Namespace, source: Source) -> dict[str, IntArray]:
    """Folder of each split -> numbers of its samples, in the order of its shards."""
    n = len(source)
    num_val = round(n * args.split_val)
    if args.split_val and not 0 < num_val < n:
        raise ValueError(f"--split-val (={args.split_val}) must leave samples on both sides, but there are {n}")
    order = np.arange(n)
    if not isinstance(source, Scenes):  # scenes come mixed and balanced: any range of them is as good
        order = permutation(generator(Stream.ORDER, seed=args.seed), n)
    train, val = order[: n - num_val], order[n - num_val :]
    if not args.shuffle:
        train, val = np.sort(train), np.sort(val)
    return {"train": train, "val": val} if num_val else {"": train}


def _make(args: argparse.Namespace, source: Source) -> int:
    orders = _orders(args, source)
    _clear(args.out)
    tasks: Tasks = {}
    for split, order in orders.items():
        folder = _folder(args.out, split)
        os.makedirs(folder, exist_ok=True)
        Path(folder, UNFINISHED).write_text("make_shards is writing here, or was stopped while it did\n")
        for k, start in enumerate(range(0, len(order), args.samples_per_shard)):
            path = os.path.join(folder, f"shard-{k:06d}.tar")
            tasks[split, k] = path, order[start : start + args.samples_per_shard]
    written = _run(source, tasks, args.workers or _cores())
    made_by = {"tool": "make_shards", "jepa_kit": __version__, "source": args.source}
    made_by |= {k: v for k, v in vars(args).items() if k not in ("source", "out", "workers", "overwrite")}
    refused = [
        _finish(_folder(args.out, split), [written[key] for key in tasks if key[0] == split], source, made_by)
        for split in orders
    ]
    if any(refused):
        entries = [entry for part in refused for entry in part]
        print(f"refused {len(entries)} of {len(source)} files: {_listed(entries)}")
    return 0


def _finish(folder: str, parts: list[Written], source: Source, made_by: dict[str, Any]) -> Refusals:
    """Writes a split's index; returns what was refused. Shards of which nothing is left are passed over."""
    kept = [(shard, rows) for shard, rows, _ in parts if shard.samples]
    refused = sorted((entry for _, _, bad in parts for entry in bad), key=lambda entry: entry["name"])
    if not kept:
        _clear(folder)
        raise ValueError(f"source (={made_by['source']!r}) holds no image for {folder}: {_listed(refused)}")
    shards, rows = [shard for shard, _ in kept], [rows for _, rows in kept]
    write_index(folder, shards, rows, classes=source.classes, refused=refused, made_by=made_by)
    labels = ", ".join(f"{name} ({len(names)} classes)" for name, names in source.classes.items()) or "none"
    samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards) / 1e6
    print(f"{folder}: {samples} samples in {len(shards)} shards, {size:.1f} MB; labels: {labels}")
    return refused


def _clear(out: str) -> None:
    """Removes what an earlier run wrote. The mark goes last: shards without their index pass for foreign ones."""
    for folder in (_folder(out, split) for split in SPLITS):
        held = _existing(folder)
        mark = Path(folder, UNFINISHED)
        if held:
            mark.touch()
        for path in held:
            if path != str(mark):
                os.remove(path)
        mark.unlink(missing_ok=True)


def _listed(refused: Refusals) -> str:
    more = f"; and {len(refused) - LISTED} more, in {INDEX}" if len(refused) > LISTED else ""
    return "; ".join(f"{entry['name']} ({entry['reason']})" for entry in refused[:LISTED]) + more


def _start_worker(source: Source, done: Any) -> None:
    global _source, _done
    _source, _done = source, done
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and silently; the parent reports


def _write(path: str, numbers: IntArray) -> Written:
    """One shard, in a worker process. A shard of which nothing is left is removed again."""
    refused: Refusals = []

    def samples() -> Iterator[Sample]:
        for i in numbers.tolist():
            try:
                yield _source.sample(i)
            except Refused as reason:
                refused.append({"name": _source.name(i), "reason": str(reason)})
            with _done.get_lock():
                _done.value += 1

    shard, rows = write_shard(path, samples())
    if not shard.samples:
        os.remove(path)
    return shard, rows, refused


def _run(source: Source, tasks: Tasks, workers: int) -> dict[tuple[str, int], Written]:
    """Writes every shard, and shows how far it is."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    done = context.Value("q", 0)
    progress = _Progress(len(source))
    with ProcessPoolExecutor(workers, context, _start_worker, (source, done)) as pool:
        futures: dict[tuple[str, int], Future[Written]] = {
            key: pool.submit(_write, path, numbers) for key, (path, numbers) in tasks.items()
        }
        remaining = set(futures.values())
        try:
            while remaining:
                finished, remaining = wait(remaining, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress.show(done.value)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            progress.close()
    return {key: future.result() for key, future in futures.items()}


class _Progress:
    """A bar on a terminal; otherwise a line for each tenth."""

    def __init__(self, total: int) -> None:
        self.total, self.tenth = total, 0
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" samples", desc="shards")

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif done * 10 // self.total > self.tenth:
            self.tenth = done * 10 // self.total
            print(f"{done} of {self.total} samples", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
