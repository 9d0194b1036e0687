#!/usr/bin/env python
"""Pretrains an encoder: from a config to a run folder with checkpoints, metrics and curves.

examples:
  # shards first (tools/make_shards.py), then a config of projects/ijepa with the shards given on the command line
  python tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml --output-dir runs/first \\
      data.shards=shards/photos/train

  # on 8 GPUs of this machine: the same global batch, the same masks and crops
  torchrun --nproc-per-node 8 tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml

  # go on after a stop, exactly
  python tools/train_net.py --config-file runs/first --resume

  # go on with a run of the released code: its weights, the moments of its optimiser and its epoch
  python tools/train_net.py --config-file projects/ijepa/configs/NAME.yaml --resume jepa-ep100.pth.tar

  # a new run from weights of any format (docs/checkpoints.md)
  python tools/train_net.py --config-file ... train.init_from=IN1K-vit.h.14-300e.pth.tar

  # another masker, other values: YAML after key=
  python tools/train_net.py --config-file ... masker='{name: random, ratio: 0.6}' optim.lr=5e-4 train.epochs=100

A config file is a YAML file, a run folder or a checkpoint. Exit status: 0 when the run is complete, 2 for a mistake in
the config, the data or the command, 1 where the run failed, 130 after an interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jepa_kit.config import load_config
from jepa_kit.engine.distributed import StartError
from jepa_kit.engine.loop import train

OVERRIDE = re.compile(r"[\w.\[\]]+=")
"""How ``key=value`` begins; neither an address nor a path with a folder does."""


def parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\nexamples:")
    p = argparse.ArgumentParser(
        prog="train_net.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config-file", required=True, metavar="FILE", help="a YAML file, a run folder or a checkpoint")
    p.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from the latest checkpoint of the run folder; where it has none, from FILE, a released checkpoint",
    )
    p.add_argument("--output-dir", metavar="DIR", help="the run folder; the same as train.output_dir=DIR")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in the config; values in YAML")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    resume, resume_from = arguments.resume is not None, arguments.resume or None
    if resume_from is not None and OVERRIDE.match(resume_from):  # `--resume key=value` names no file
        overrides, resume_from = [resume_from, *overrides], None
    output_dir = arguments.output_dir
    if output_dir is None and resume and os.path.isdir(arguments.config_file):
        # The config in a run folder names the folder as it was seen from where the run was started.
        output_dir = arguments.config_file
    if output_dir is not None:
        overrides.append(f"train.output_dir={json.dumps(output_dir)}")
    try:
        train(load_config(arguments.config_file, overrides), resume=resume, resume_from=resume_from)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return fail(2, str(error))
    except (FloatingPointError, StartError) as error:
        return fail(1, str(error))
    except KeyboardInterrupt:
        return fail(130, "interrupted; --resume goes on from the latest checkpoint")
    return 0


def fail(status: int, message: str) -> int:
    """Says why, and in which process where there are several."""
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    print(f"train_net.py{rank}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
