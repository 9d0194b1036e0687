"""Make WebDataset shards of images, and verify them.

SOURCE is one of these:

  a folder                 with a sub-folder for each class; or without sub-folders and labels
  .tar .tar.gz .tgz .zip   the same as an archive; also CIFAR-10's and CIFAR-100's python archives, and a tar with one
                           tar for each class, such as ImageNet's train archive
  .csv .tsv                a row for each image: a column `path`, relative to the table, and a column `label`
  wds:SHARDS               WebDataset shards: a folder, or a pattern such as wds:old/{000000..000012}.tar
  hf:NAME[:CONFIG]         a Hugging Face data set, a folder written by save_to_disk, or a .parquet file
  synthetic:scenes         rendered scenes with three labels (count, distance, shape) and masks

examples:
  # a folder with one sub-folder for each class, split into OUT/train and OUT/val (a tenth)
  python tools/make_shards.py photos/ shards/photos --split-val 0.1

  # CIFAR-10; its batches become shards/cifar10/train and shards/cifar10/test
  python tools/make_shards.py cifar-10-python.tar.gz shards/cifar10

  # ImageNet-1k; the validation labels come from the development kit, the class numbers from the train shards
  python tools/make_shards.py ILSVRC2012_img_train.tar shards/in1k-train --shorter-side 256 --bytes-per-shard 256M
  python tools/make_shards.py ILSVRC2012_img_val.tar shards/in1k-val --labels ILSVRC2012_devkit_t12.tar.gz \\
      --classes-from shards/in1k-train

  # scenes, rendered at 64 x 64
  python tools/make_shards.py synthetic:scenes shards/scenes --num-scenes 12000 --image-size 64 --split-val 0.17

  # compare shards with their index
  python tools/make_shards.py --verify shards/photos

JPEG and PNG files keep their bytes, unless --shorter-side or --quality is given; other formats become PNG. Files that
are no images are refused and listed, on the terminal and in OUT/index.json. To resume an interrupted run, run the same
command again: the shards get the same bytes. docs/data.md describes the format; every WebDataset reader can read it.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any

from jepa_kit import __version__
from jepa_kit.arguments import Show, add_json, run_tool, run_with_json, tool_parser
from jepa_kit.data.making.make_shards import Limits, check_apart, listed, make, orders, split_folder
from jepa_kit.data.making.verify import verify
from jepa_kit.data.making.write_log import WriteLog, lock_output, prepare_folders, unfinished
from jepa_kit.data.sources.labels import LABEL_FROM
from jepa_kit.data.sources.opening import SourceOptions, open_source
from jepa_kit.progress import Progress, number_of

NOT_IN_THE_BYTES = ("out", "verify", "workers", "overwrite", "max_refused", "json")
"""Options that do not change the shards."""
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("make_shards.py", __doc__)
    p.usage = "make_shards.py SOURCE OUT_DIR [options]\n       make_shards.py --verify DIR [--workers N] [--json]"
    p.add_argument("source", metavar="SOURCE", nargs="?", help="see above")
    p.add_argument("out", metavar="OUT_DIR", nargs="?", help="folder for the shards; created if missing")
    p.add_argument("--verify", metavar="DIR", help="compare shards with their index; status 1 if they differ")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    add_json(p)
    p.add_argument("--overwrite", action="store_true", help="replace shards in OUT_DIR")
    p.add_argument("--max-refused", type=float, default=0.1, metavar="P", help="fraction of bad images (default: 0.1)")
    g = p.add_argument_group("shards")
    g.add_argument("--samples-per-shard", type=int, metavar="N", help="default: 1024 without --bytes-per-shard")
    g.add_argument("--bytes-per-shard", metavar="N", help="largest size of a shard, such as 256M")
    g.add_argument("--seed", type=int, default=0, help="of the shuffle, the split and the scenes (default: 0)")
    g.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shuffle the samples (default) or keep their order; scenes are in random order already",
    )
    g.add_argument("--split-val", type=float, default=0.0, metavar="P", help="fraction for OUT_DIR/val (default: 0)")
    g = p.add_argument_group("images")
    g.add_argument("--shorter-side", type=int, metavar="PIXELS", help="shrink larger images to this shorter side")
    g.add_argument("--quality", type=int, metavar="Q", help="encode every image as JPEG of this quality, 1 to 100")
    g = p.add_argument_group("labels")
    g.add_argument(
        "--label-from",
        choices=LABEL_FROM,
        help="a file's class: its own folder (parent), the first folder of its path (top), or none; "
        "auto: parent if files are in more than one folder, else none (default)",
    )
    g.add_argument("--labels", metavar="FILE", help="classes of the files: a table, a text or ImageNet's devkit")
    g.add_argument("--label-column", metavar="NAME[,NAME]", help="of a table (default: label) or of hf:NAME")
    g.add_argument("--path-column", metavar="NAME", help="of a table (default: path)")
    g.add_argument("--image-column", metavar="NAME", help="of hf:NAME (default: its only column of images)")
    g.add_argument("--classes-from", metavar="FROM", help="shards, or a text of classes, that define class numbers")
    g = p.add_argument_group("synthetic:scenes")
    g.add_argument("--num-scenes", type=int, metavar="N", help="default: 10000")
    g.add_argument("--image-size", metavar="PIXELS", help="a side, or HEIGHTxWIDTH (default: 64)")
    g.add_argument("--masks", action=argparse.BooleanOptionalAction, help="store the shape of each pixel (default)")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line; exits with status 2 if SOURCE is missing, or for an option that --verify ignores."""
    p = parser()
    args = p.parse_args(argv)
    if args.verify is None and args.out is None:
        p.error("SOURCE and OUT_DIR must be given, or --verify DIR")
    if args.verify is not None:
        defaults = {**vars(p.parse_args(["--verify", args.verify])), "workers": args.workers, "json": args.json}
        for name in (name for name, value in vars(args).items() if value != defaults[name]):
            p.error(f"--verify (={args.verify}) takes only --workers and --json, not {name}: it only reads")
    return args


def run(args: argparse.Namespace, show: Show) -> int:
    """Make or verify shards; return 0, 1 if --verify finds a difference, or 130 for Ctrl-C."""
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers (={args.workers}) must be at least 1")
    try:
        if args.verify is not None:
            return _verify(args.verify, args.workers or _cores(), show)
        limits, options = _limits(args), _source_options(args)
        check_apart(args.source, args.out)
        os.makedirs(args.out, exist_ok=True)
        with lock_output(args.out):
            return _make(args, limits, options, show)
    except BrokenProcessPool as error:
        raise ValueError("a worker died, often for lack of memory: try fewer --workers") from error
    except KeyboardInterrupt:
        print("make_shards: stopped; run the same command to resume", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("make_shards: error", lambda: run_with_json(run, parse(argv)))


def _limits(args: argparse.Namespace) -> Limits:
    """Return the limits of shards; set the default of --samples-per-shard, which the index records."""
    if args.samples_per_shard is not None and args.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard (={args.samples_per_shard}) must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed (={args.seed}) must be from 0 to 2**63 - 1")
    if not 0.0 <= args.split_val < 1.0:
        raise ValueError(f"--split-val (={args.split_val}) must be at least 0 and below 1: it is a fraction")
    if not 0.0 <= args.max_refused <= 1.0:
        raise ValueError(f"--max-refused (={args.max_refused}) must be 0 to 1: it is a fraction")
    size = None
    if args.bytes_per_shard is not None:
        found = re.fullmatch(r"(\d+)([KMG]?)", args.bytes_per_shard.upper())
        size = int(found[1]) * UNITS[found[2]] if found else 0
        if size < 10240:
            raise ValueError(f"--bytes-per-shard (={args.bytes_per_shard}) must be at least 10240, such as 256M or 1G")
    elif args.samples_per_shard is None:
        args.samples_per_shard = Limits.samples
    return Limits(args.samples_per_shard, size, args.max_refused)


def _source_options(args: argparse.Namespace) -> SourceOptions:
    given = {name: getattr(args, name) for name in SourceOptions.__dataclass_fields__}
    if given["label_column"] is not None:
        given["label_column"] = tuple(given["label_column"].split(","))
    return SourceOptions(**given)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make(args: argparse.Namespace, limits: Limits, options: SourceOptions, show: Show) -> int:
    print(f"opening {args.source}", flush=True)
    try:
        source = open_source(args.source, options, seed=args.seed, scratch=args.out)
        for note in source.notes:
            print(note)
        plan = orders(source, seed=args.seed, shuffle=args.shuffle, split_val=args.split_val)
        made_by: dict[str, Any] = {"tool": "make_shards", "jepa_kit": __version__}
        made_by |= {k: v for k, v in vars(args).items() if k not in NOT_IN_THE_BYTES and v is not None}
        made_by |= {"samples": len(source), "fingerprint": source.fingerprint()}
        logs = [WriteLog(split_folder(args.out, split), numbers, made_by) for split, numbers in plan.items()]
        prepare_folders(args.out, logs, overwrite=args.overwrite)
        with closing(Progress(len(source), "samples")) as progress:
            made = make(source, logs, limits=limits, workers=args.workers or _cores(), show=progress.show)
    finally:
        if not unfinished(args.out):
            for path in glob.glob(os.path.join(glob.escape(args.out), ".unpacked.*")):
                os.remove(path)
    labels = ", ".join(f"{name} ({len(names)} classes)" for name, names in source.classes.items()) or "none"
    masks = "; with masks" if source.mask_classes else ""
    folders: list[dict[str, Any]] = [
        {
            "folder": log.folder,
            "samples": sum(shard.samples for shard in log.shards),
            "shards": len(log.shards),
            "bytes": sum(shard.bytes for shard in log.shards),
        }
        for log in made
    ]
    lines = [
        f"{f['folder']}: {f['samples']} samples in {number_of('shard', f['shards'])}, {f['bytes'] / 1e6:.1f} MB; "
        f"labels: {labels}{masks}"
        for f in folders
    ] or [f"{args.out} is complete: nothing to do"]
    notes = sum((log.notes for log in made), Counter())
    lines += [f"note: {count} of {len(source)} images have {note}" for note, count in notes.items()]
    refused = [entry for log in made for entry in log.refused]
    if refused:
        lines.append(f"refused {len(refused)} of {len(source)} files: {listed(refused)}")
    classes = {name: list(names) for name, names in source.classes.items()}
    content = {"folders": folders, "labels": classes, "notes": notes, "refused": [r._asdict() for r in refused]}
    show("\n".join(lines), content)
    return 0


def _verify(folder: str, workers: int, show: Show) -> int:
    """Compare shards with their index, and return the exit status."""
    with closing(Progress(1, "MB", scale=10**6)) as progress:
        shards, problems = verify(folder, workers=workers, show=progress.show)
    summary = f"{folder}: {number_of('shard', shards)}, {number_of('problem', len(problems))}"
    show("\n".join([*problems, summary]), {"folder": folder, "shards": shards, "problems": problems})
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
