"""Measure the health of a checkpoint's representation: print a verdict and the figures that it is based on.

examples:
  # the latest checkpoint of a run, on the shards `test` or `val` beside its training shards, else on the latter
  python tools/health.py --checkpoint output/quickstart/run

  # an early and the latest checkpoint, the context encoder, more images, figures as JSON
  python tools/health.py --checkpoint runs/first/checkpoint_00000500.pt runs/first --encoder context \\
      --images 512 --shards shards/photos/val --output health.json

  # a run of another machine, whose config has a GPU
  python tools/health.py --checkpoint runs/first train.device=cpu

docs/evaluation.md, "Health", explains each figure. evaluate.every=N measures the same during a run.
Exit status: 0 whatever the verdict, 2 for a mistake in the command, a checkpoint or the shards, 130 after an
interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_kit.arguments import Show, add_json, add_trust, in_order, run_tool, run_with_json, tool_parser

if TYPE_CHECKING:
    from jepa_kit.evaluation.health.measure import Health

OVERRIDE = re.compile(r"[\w.]+=")
ROWS = (
    ("images", "images"),
    ("width", "width of a token"),
    ("varying", "fraction of tokens' mean square that varies"),
    ("of_images", "fraction of that which position does not explain"),
    ("within_images", "fraction of that between patches of one image"),
    ("token_rank", "directions that tokens fill, less position"),
    ("feature_varying", "fraction of features' mean square that varies"),
    ("feature_rank", "directions that features fill, less their mean"),
    ("loss", "loss"),
    ("relative_to_mean", "loss / that of the mean target"),
    ("relative_to_position", "loss / that of each position's mean target"),
    ("cross_sample_gap", "1 - loss / that against another image's target"),
    ("std", "deviation of features over images"),
    ("unit_std", "the same of unit features, times sqrt(width)"),
    ("cosine", "mean cosine between two images' features"),
    ("uniformity", "uniformity of features"),
    ("rankme", "RankMe of features"),
    ("effective_rank", "effective rank of features' covariance"),
    ("alpha", "alpha-ReQ of features"),
    ("lidar", "LiDAR of context features"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("health.py", __doc__)
    p.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="FILE", help="checkpoints, or run folders (their latest)"
    )
    p.add_argument("--shards", metavar="DIR", help="images (default: test or val beside the run's shards, else those)")
    p.add_argument(
        "--encoder", choices=("target", "context"), help="default: target, the paper's; context if none learns"
    )
    p.add_argument("--images", type=int, default=256, metavar="N", help="images to measure (default: 256)")
    p.add_argument("--masks", type=int, metavar="N", help="masks of each image (default: 4; none without a masker)")
    p.add_argument("--seed", type=int, default=0, help="seed of the choice of images and of the masks (default: 0)")
    p.add_argument("--output", metavar="FILE", help="file for the figures as JSON")
    add_json(p)
    add_trust(p)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in the runs' configs")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, in which ``--checkpoint A B train.device=cpu`` has two checkpoints and an override."""
    arguments = parser().parse_intermixed_args(argv)
    given = [name for name in arguments.checkpoint if OVERRIDE.match(name) and not Path(name).exists()]
    arguments.checkpoint = [name for name in arguments.checkpoint if name not in given]
    arguments.overrides = in_order([*arguments.overrides, *given], argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("health.py", lambda: run_with_json(run, parse(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Print the table and the verdicts, and write the file."""
    # here, so that --help does not wait for torch
    from jepa_kit.config import versions
    from jepa_kit.evaluation.health.verdict import judge
    from jepa_kit.evaluation.tables.results import check_output, write_results

    if not arguments.checkpoint:
        raise ValueError(f"--checkpoint must name a checkpoint besides {', '.join(arguments.overrides)}")
    if arguments.images < 16:
        raise ValueError(f"--images (={arguments.images}) must be at least 16 for meaningful figures")
    if arguments.output:
        check_output("--output", arguments.output)
    names = arguments.checkpoint
    found = [measure(name, arguments) for name in names]
    verdicts = [judge(health) for _, health in found]
    lines = [format_table([health for _, health in found], [f"step {step:,}" for step, _ in found])]
    for name, (step, health), verdict in zip(names, found, verdicts, strict=True):
        missing = [f"\n  not measured: {line}" for line in health.not_measured]
        lines.append(f"{name}, step {step:,}: {verdict}{''.join(missing)}")
    entries = [
        {"checkpoint": name, "step": step, "verdict": v.state, "reason": v.reason, "figures": health.to_dict()}
        for name, (step, health), v in zip(names, found, verdicts, strict=True)
    ]
    content = {"seed": arguments.seed, "health": entries, "versions": versions()}
    if arguments.output:
        write_results(content, arguments.output)
    show("\n\n".join(lines), content)


def measure(checkpoint: str, arguments: argparse.Namespace) -> tuple[int, Health]:
    """Return the step (number of updates) and the health of a checkpoint."""
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.distributed.collectives import World, choose_device
    from jepa_kit.engine.build import open_shards
    from jepa_kit.evaluation.feature_sources import encoder_named
    from jepa_kit.evaluation.features import load_run
    from jepa_kit.evaluation.health.measure import measure_health
    from jepa_kit.evaluation.images import random_samples, read_images
    from jepa_kit.evaluation.shard_choice import shown_shards
    from jepa_kit.from_config import masker_of

    loaded = load_run(checkpoint, arguments.overrides, trust_imports=arguments.trust_imports)
    config, data = loaded.config, loaded.config.data
    masker = masker_of(config)
    if masker is None and arguments.masks is not None:
        raise ValueError(
            f"--masks (={arguments.masks}) would do nothing: the recipe {config.recipe.name!r} of {checkpoint} has no "
            "masker"
        )
    dataset = open_shards(config, shown_shards(arguments.shards, data.shards))
    samples = random_samples(dataset, arguments.images, seed=arguments.seed)
    device = choose_device(config.train.device, World())
    health = measure_health(
        loaded.jepa.to(device),
        read_images(dataset, ImageOptions.from_config(data), samples),
        masker,
        encoder=encoder_named(loaded.jepa, arguments.encoder),
        masks=4 if arguments.masks is None else arguments.masks,
        seed=arguments.seed,
        mean=data.mean,
        std=data.std,
        device=device,
    )
    return loaded.step, health


def format_table(found: Sequence[Health], titles: Sequence[str]) -> str:
    """Return a table with a row for each figure and a column for each checkpoint."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}"

    masks = max(health.masks for health in found)
    heading = f"images{f' under {masks} masks' if masks else ''}, {found[0].encoder} encoder"
    label = max(len(text) for _, text in ROWS)
    width = max(12, *(len(title) for title in titles))
    lines = [heading, " " * label + "".join(f"  {title:>{width}}" for title in titles)]
    columns = [health.to_dict() for health in found]
    lines += [f"{text:{label}}" + "".join(f"  {cell(c[name]):>{width}}" for c in columns) for name, text in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
