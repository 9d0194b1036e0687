"""Report the statistics of a config's masker: a table, JSON, and a page of pictures.

examples:
  # print a table; write mask_report.json, mask_report.png and mask_gallery.png in output/mask_report
  python tools/mask_report.py --config-file projects/ijepa/configs/in1k_vitb16.yaml

  # two configs side by side: released and corrected
  python tools/mask_report.py --config-file projects/ijepa/configs/in1k_vitb16.yaml \\
      --compare projects/ijepa/configs/corrected_in1k_vitb16.yaml --output-dir output/released_corrected

  # another masker, other numbers of images, a gallery of your own images
  python tools/mask_report.py --config-file projects/ijepa/configs/in1k_vitb16.yaml --images-per-batch 32 \\
      --draws 4096 masker='{name: multigroup}' data.shards=shards/photos/train

Overrides (key=value) change --config-file, not --compare. Warnings describe biases of a masker. If images of a batch
share random numbers (as their sizes), ± is the standard error of a mean over batches.
Exit status: 0, or 2 for a mistake in the command, a config or the data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_kit.arguments import Show, add_config, add_json, run_tool, run_with_json, tool_parser

if TYPE_CHECKING:
    from jepa_kit.evaluation.masks.report import MaskReport


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("mask_report.py", __doc__)
    add_config(p)
    p.add_argument("--compare", metavar="OTHER", help="another config, for a second column")
    p.add_argument("--draws", type=int, default=2048, metavar="N", help="images to draw masks for (default: 2048)")
    p.add_argument("--images-per-batch", type=int, default=128, metavar="N", help="of a process (default: 128)")
    p.add_argument("--output-dir", default="output/mask_report", metavar="DIR", help="default: output/mask_report")
    add_json(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("mask_report.py", lambda: run_with_json(run, parser().parse_intermixed_args(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Write the files and print the table."""
    # here, so that --help does not wait for torch and matplotlib
    from jepa_kit.config import load_config, versions
    from jepa_kit.evaluation.masks.page import first_masks, mask_page, samples_of, shows_data
    from jepa_kit.evaluation.masks.statistics import mask_report
    from jepa_kit.evaluation.pictures.draw import mask_gallery
    from jepa_kit.evaluation.tables.results import write_results

    for option in ("draws", "images_per_batch"):
        if (value := getattr(arguments, option)) < 1:
            raise ValueError(f"--{option.replace('_', '-')} (={value}) must be at least 1")
    files = [arguments.config_file] + ([arguments.compare] if arguments.compare else [])
    trust = arguments.trust_imports
    configs = [
        load_config(file, overrides, trust_imports=trust)
        for file, overrides in zip(files, (arguments.overrides, []), strict=False)
    ]
    reports = [
        mask_report(config, images=arguments.draws, images_per_batch=arguments.images_per_batch) for config in configs
    ]
    names = [Path(file).stem for file in files]
    folder = Path(arguments.output_dir)
    content = {
        "overrides": arguments.overrides,
        "reports": [{"config": f, **r.to_dict()} for f, r in zip(files, reports, strict=True)],
        "versions": versions(),
    }
    file = write_results(content, folder / "mask_report.json")
    picture = mask_page(reports, configs, names, folder / "mask_report.png")
    few = 4
    gallery = mask_gallery(
        samples_of(configs[0], few),
        first_masks(configs[0], arguments.images_per_batch, few),
        folder / "mask_gallery.png",
        columns=few,
        heading=f"masker: {configs[0].slots['masker'].name}",
    )
    shards = configs[0].data.shards
    note = ""
    if shards is not None and not shows_data(configs[0]):
        note = (
            f"\n\nnote: the pictures show synthetic scenes: data.shards (={shards!r}) has no index.json on this "
            "machine, and a report reads no other data"
        )
    show(f"{format_table(names, reports)}{note}\n\nwrote {file}, {picture} and {gallery}", content)


def format_table(names: Sequence[str], reports: Sequence[MaskReport]) -> str:
    """Return a table with a column for each report, and the warnings of each below."""
    from jepa_kit.evaluation.masks.report import warnings

    rows = [dict(_figures(report)) for report in reports]
    label = max(len(key) for key in rows[0])
    width = max(24, *(len(name) for name in names))
    lines = [" " * label + "".join(f"  {name:>{width}}" for name in names)]
    lines += [f"{key:{label}}" + "".join(f"  {row[key]:>{width}}" for row in rows) for key in rows[0]]
    for name, report in zip(names, reports, strict=True):
        found = warnings(report)
        lines += ["", f"{name}: {len(found) or 'no'} warning{'' if len(found) == 1 else 's'}"]
        lines += [f"  - {line}" for line in found]
    return "\n".join(lines)


def _figures(report: MaskReport) -> list[tuple[str, str]]:
    """Return the rows of a report's column: (label, text)."""

    def spread(name: str) -> str:
        lengths, error = getattr(report, name), report.standard_errors.get(name)
        of_mean = "" if error is None else f" ± {error:.1f}"
        return f"{lengths.mean():.1f}{of_mean} ({lengths.min()} to {lengths.max()})"

    def forward(cost: Any) -> str:
        return f"{cost.tokens:.1f}, " + ("no formula" if cost.gflop is None else f"{cost.gflop:.2f} GFLOP")

    probability, cost = report.probability, report.cost
    ends = [f"{probability.context.mean(axis)[k]:.2f}" for axis in (1, 0) for k in (0, -1)]
    total = cost.training_gflop
    return [
        ("masker", report.masker["name"]),
        (
            "grid, images, images per batch",
            f"{report.grid[0]}x{report.grid[1]}, {report.images}, {report.images_per_batch}",
        ),
        ("context sets, target sets per image", "{:.3g}, {:.3g}".format(*report.sets_per_image)),
        ("patches in a context before truncation", spread("context_before")),
        ("patches in a context", spread("context")),
        ("patches in a target before truncation", spread("targets_before")),
        ("patches in a target", spread("targets")),
        ("P(context), first and last row", " ".join(ends[:2])),
        ("P(context), first and last column", " ".join(ends[2:])),
        ("shapes of rectangular targets", str(len(report.shapes))),
        ("target patches in more than one target", f"{report.overlap:.1%}"),
        ("patches neither context nor target", f"{probability.unused.mean():.1%}"),
        ("context encoder: tokens, forward", forward(cost.encoder)),
        ("target encoder: tokens, forward", forward(cost.target_encoder)),
        ("predictor: tokens, forward", forward(cost.predictor)),
        ("training step per image", "no formula" if total is None else f"{total:.2f} GFLOP"),
    ]


if __name__ == "__main__":
    sys.exit(main())
