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

  # another masker, other values: YAML after key=
  python tools/train_net.py --config-file ... masker='{name: random, ratio: 0.6}' optim.lr=5e-4 train.epochs=100

A config file is a YAML file, a run folder or a checkpoint. Exit status: 0 when the run is complete, 2 for a mistake in
the config, the data or the command, 1 where the run failed, 130 after an interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jepa_kit.config import load_config
from jepa_kit.engine.distributed import StartError
from jepa_kit.engine.loop import train


def parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\nexamples:")
    p = argparse.ArgumentParser(
        prog="train_net.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config-file", required=True, metavar="FILE", help="a YAML file, a run folder or a checkpoint")
    p.add_argument("--resume", action="store_true", help="go on from the latest checkpoint of the run folder")
    p.add_argument("--output-dir", metavar="DIR", help="the run folder; the same as train.output_dir=DIR")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in the config; values in YAML")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    output_dir = arguments.output_dir
    if output_dir is None and arguments.resume and os.path.isdir(arguments.config_file):
        # The config in a run folder names the folder as it was seen from where the run was started.
        output_dir = arguments.config_file
    if output_dir is not None:
        overrides.append(f"train.output_dir={json.dumps(output_dir)}")
    try:
        train(load_config(arguments.config_file, overrides), resume=arguments.resume)
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
