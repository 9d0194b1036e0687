"""Measure whether a run's predictions follow the action: the mean reciprocal rank (MRR) of the right target.

For each image, the target view's changes of colour make a bank of targets from one crop. The predictor sees the crop
unchanged and masked, and is given the action that leads to one of the targets. The rank is that of this target among
all by their distance from the prediction; 1 / rank is averaged over targets, then images. 1: the right target is always
the nearest. A predictor that ignores the action has the value by chance.

"explained" is the fraction of the targets' differences within a bank that the predictions follow (R^2): 1 at most, 0
for a predictor that ignores the action.

examples:
  # a run, and the same with a predictor that is given no action
  python projects/iwm/equivariance.py --checkpoint output/iwm_quick output/iwm_without --shards output/scenes/test

Exit status: 0, 2 for a mistake in the command, a checkpoint or the shards, 130 after an interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.iwm"  # for the relative import

from jepa_kit.arguments import add_trust, run_tool, tool_parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("equivariance.py", __doc__)
    p.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="FILE", help="checkpoints, or run folders (their latest)"
    )
    p.add_argument("--shards", metavar="DIR", help="images (default: test or val beside the run's shards, else those)")
    p.add_argument("--images", type=int, default=64, metavar="N", help="images, at random (default: 64)")
    p.add_argument("--bank", type=int, default=256, metavar="M", help="targets of an image (default: 256, the paper's)")
    p.add_argument("--seed", type=int, default=0, help="seed of images, crops, colours and masks (default: 0)")
    p.add_argument("--output", metavar="FILE", help="file for the figures as JSON")
    add_trust(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool("equivariance.py", lambda: run(parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each checkpoint, and write the file.

    Raises:
        ValueError: too few images or targets, or a run of another recipe.
    """
    # here, so that --help does not wait for torch
    from jepa_kit.distributed.collectives import World, choose_device
    from jepa_kit.engine.build import open_shards
    from jepa_kit.evaluation.features import load_run
    from jepa_kit.evaluation.images import random_samples
    from jepa_kit.evaluation.shard_choice import shown_shards
    from jepa_kit.evaluation.tables.results import check_output, write_results

    from .measure import equivariance, figures

    for name in ("images", "bank"):
        if getattr(arguments, name) < 2:
            raise ValueError(f"--{name} (={getattr(arguments, name)}) must be at least 2")
    if arguments.output:
        check_output("--output", arguments.output)
    entries = []
    for name in arguments.checkpoint:
        loaded = load_run(name, trust_imports=arguments.trust_imports)
        if (recipe := loaded.config.recipe.name) != "iwm":
            raise ValueError(f"{name} must be a run of the recipe 'iwm', which has two views, not of {recipe!r}")
        dataset = open_shards(loaded.config, shown_shards(arguments.shards, loaded.config.data.shards))
        samples = random_samples(dataset, arguments.images, seed=arguments.seed)
        device = choose_device(loaded.config.train.device, World())
        ranks = equivariance(loaded, dataset, samples, bank=arguments.bank, seed=arguments.seed, device=device)
        found = figures(ranks, arguments.bank)
        predictor = loaded.config.slots["predictor"].name
        print(
            f"{name}, step {loaded.step:,}, predictor {predictor}: MRR {found['mrr']:.3f} +- {found['error']:.3f} "
            f"(by chance {found['chance']:.3f}), explained {found['explained']:.2f} +- {found['explained_error']:.2f}; "
            f"{found['images']} images, {found['bank']} targets each"
        )
        entries.append({"checkpoint": name, "step": loaded.step, "predictor": predictor, **found})
    if arguments.output:
        write_results({"seed": arguments.seed, "equivariance": entries}, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
