#!/usr/bin/env python
"""Evaluates frozen features of a checkpoint: a linear probe, nearest neighbours, and baselines beside them.

examples:
  # a run of tools/train_net.py: its target encoder, the same network untrained, and raw pixels; every label of the
  # shards; training shards as in its config, test shards from the folder `val` (or `test`) beside them
  python tools/eval_net.py --checkpoint output/quickstart --protocol linear,knn

  # other shards, both encoders, the last four layers, results as JSON
  python tools/eval_net.py --checkpoint runs/first/checkpoint_00001250.pt --protocol linear --encoder both \\
      --layers last4 --train-shards shards/cifar10-train --test-shards shards/cifar10-test --output results.json

  # without baselines, on the CPU, in float32
  python tools/eval_net.py --checkpoint runs/first --protocol knn --baselines none train.device=cpu \\
      train.precision=float32

Settings of a probe (the penalty, the number of neighbours) are chosen inside the training shards, never on the test
shards. The paper evaluates the target encoder, mean over patch tokens, the better of --layers last and last4.
Exit status: 0, or 2 for a mistake in the command, the checkpoint or the shards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BESIDE = ("test", "val")
"""Folders that hold test shards, looked for beside the training shards."""


def parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\nexamples:")
    p = argparse.ArgumentParser(
        prog="eval_net.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint, or a run folder (its latest)")
    p.add_argument(
        "--protocol",
        action="append",
        required=True,
        metavar="NAME",
        help="linear or knn; several with commas, or the option again",
    )
    p.add_argument(
        "--encoder", choices=("target", "context", "both"), default="target", help="default: target, the paper's"
    )
    p.add_argument("--layers", default="last", metavar="LAYERS", help="last, or last4: the last 4 concatenated")
    p.add_argument("--train-shards", metavar="DIR", help="what probes learn from (default: data.shards of the run)")
    p.add_argument(
        "--test-shards", metavar="DIR", help="what they are asked about (default: test or val beside --train-shards)"
    )
    p.add_argument("--label", action="append", metavar="NAME", help="as --protocol; default: every label of the shards")
    p.add_argument(
        "--baselines", default="untrained,pixels", metavar="NAMES", help="untrained, pixels, both (default), or none"
    )
    p.add_argument("--seed", type=int, default=0, help="of the probes (default: 0)")
    p.add_argument("--untrained-seed", type=int, metavar="SEED", help="of the untrained network (default: the run's)")
    p.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    p.add_argument("--output", metavar="FILE", help="writes the results as JSON")
    p.add_argument(
        "overrides", nargs="*", metavar="key=value", help="what to change in the run's config, as train.device=cpu"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status: 0, or 2 for a mistake of the user's."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        print(run(arguments))
    except (ValueError, OSError) as error:
        print(f"eval_net.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval_net.py: interrupted", file=sys.stderr)
        return 130
    return 0


def run(arguments: argparse.Namespace) -> str:
    """The table of an evaluation; writes its file."""
    # here, so that --help does not wait for torch and scikit-learn
    from jepa_kit.data.shards import ShardDataset
    from jepa_kit.engine.distributed import World, choose_device
    from jepa_kit.evaluation.features import load_run
    from jepa_kit.evaluation.report import ENCODERS, evaluate, format_table, results, run_networks, write_results

    loaded = load_run(arguments.checkpoint, arguments.overrides)
    train = ShardDataset(find_train_shards(arguments.train_shards, loaded.config.data.shards))
    test = ShardDataset(find_test_shards(arguments.test_shards, train.path))
    networks = run_networks(
        loaded,
        encoders=ENCODERS if arguments.encoder == "both" else [arguments.encoder],
        layers=arguments.layers,
        baselines=[] if arguments.baselines == "none" else split([arguments.baselines]),
        untrained_seed=arguments.untrained_seed,
        device=choose_device(loaded.config.train.device, World()),
    )
    rows = evaluate(
        networks,
        train,
        test,
        image_size=loaded.config.data.image_size,
        protocols=split(arguments.protocol),
        labels=split(arguments.label) if arguments.label else None,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        num_workers=loaded.config.data.num_workers,
        progress=True,
    )
    if arguments.output:
        content = results(
            rows, run=loaded, checkpoint=arguments.checkpoint, train=train, test=test, seed=arguments.seed
        )
        write_results(content, arguments.output)
    return format_table(rows)


def split(names: Sequence[str]) -> list[str]:
    """["a,b", "c"] -> ["a", "b", "c"]."""
    return [name.strip() for entry in names for name in entry.split(",")]


def find_train_shards(given: str | None, of_run: str | None) -> str:
    """The folder that probes learn from.

    Raises:
        ValueError: there is none.
    """
    if given is None and of_run is None:
        raise ValueError("--train-shards must name a folder of shards: the run's config has none (data.shards is null)")
    return given or str(of_run)


def find_test_shards(given: str | None, train: str) -> str:
    """The folder that probes are asked about.

    Raises:
        ValueError: none is given, and none lies beside the training shards.
    """
    if given is not None:
        return given
    parent = Path(train).resolve().parent
    for name in BESIDE:
        if (parent / name).is_dir() and (parent / name) != Path(train).resolve():
            return str(parent / name)
    raise ValueError(f"--test-shards must name a folder of shards: there is no {' or '.join(BESIDE)} in {parent}")


if __name__ == "__main__":
    sys.exit(main())
