"""Compare the results of any number of runs in one table (Markdown and CSV) and one figure.

examples:
  # run folders; runs that differ only in their seed share a line, with mean and deviation
  python tools/compare.py runs/seed0 runs/seed1 runs/seed2

  # runs of several recipes; write comparison.md, .csv and .png (or .pdf)
  python tools/compare.py runs/multiblock runs/random output/quickstart --output comparison
  python tools/compare.py runs/multiblock runs/random --output comparison --format pdf

  # what should my curve look like? loss, health and probes beside a run that ships with jepa_kit; no results needed
  python tools/compare.py runs/first reference:ijepa_scenes --curves curves.png

  # only some protocols and networks
  python tools/compare.py runs/* --protocol linear,knn --network target,untrained

A run is a folder with results of tools/eval_net.py (evaluation/*.json) or of the quickstart (results.json), such a
file, or a run that ships with jepa_kit, as reference:ijepa_scenes. A line is a recipe (each step of a run has its own)
and network, a column a protocol and label. Cells are percent: "mean ± deviation over seeds", or for one run "figure
(binomial standard error)". Baselines follow once, below the recipes: pixels and patches are the same for all, an
untrained network for all recipes with this encoder. The cost of training is at the right, if the run's metrics.jsonl is
beside the checkpoint or the results.
Exit status: 0, 2 for a mistake in the command or the files, 130 after an interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_kit.arguments import Show, add_json, run_tool, run_with_json, tool_parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("compare.py", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders, files of results, or reference:NAME")
    p.add_argument("--protocol", metavar="NAMES", help="only these, separated by commas")
    p.add_argument("--network", metavar="NAMES", help="only these: target, context, untrained, pixels, patches")
    p.add_argument("--label", metavar="NAMES", help="only these labels of the data (class, shape, ...)")
    p.add_argument("--output", metavar="PATH", help="write PATH.md, PATH.csv and the figure, PATH.png")
    p.add_argument("--format", choices=("png", "pdf", "svg"), help="of the figure (default: png)")
    p.add_argument("--curves", metavar="FILE", help="only draw the runs' curves into this file (.png, .pdf or .svg)")
    add_json(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("compare.py", lambda: run_with_json(run, parser().parse_args(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Print the table and write the files."""
    # imported here, so that --help does not wait for torch and scikit-learn
    from jepa_kit.engine.logging.curves import drawn
    from jepa_kit.evaluation.tables.compare import compare, to_csv, to_markdown, to_rows
    from jepa_kit.evaluation.tables.figure import figure
    from jepa_kit.evaluation.tables.runs import load

    if arguments.curves:
        file = str(draw_curves(arguments))
        show(file, {"curves": file})
        return
    if arguments.format and not arguments.output:
        raise ValueError(f"--format (={arguments.format!r}) would do nothing without --output: there is no figure")
    runs = load(*arguments.runs)
    for option in ("protocol", "network", "label"):  # each is also a field of a row
        names = getattr(arguments, option)
        if names is None:
            continue
        wanted = [name.strip() for name in names.split(",")]
        known = sorted({getattr(answer.row, option) for one in runs for answer in one.rows})
        for name in wanted:
            if name not in known:
                raise ValueError(f"--{option} (={name!r}) must be one of those in the results: {', '.join(known)}")
        runs = [one._replace(rows=[a for a in one.rows if getattr(a.row, option) in wanted]) for one in runs]
    found = compare(runs)
    table = to_markdown(found)
    if arguments.output:
        base, form = Path(arguments.output), arguments.format or "png"
        base.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{base}.md").write_text(table + "\n", encoding="utf-8")
        Path(f"{base}.csv").write_text(to_csv(found), encoding="utf-8")
        picture = f"{base}.{form}"
        drawn(picture, lambda: figure(found, picture, format=form))  # if it fails, a warning
    show(table, to_rows(found))


def draw_curves(arguments: argparse.Namespace) -> Path:
    """Draw the curves of the runs, which need no results, and return the file."""
    from jepa_kit.config.shipped import find_reference, is_reference
    from jepa_kit.engine.logging.curves import plot_runs
    from jepa_kit.evaluation.online import PANELS
    from jepa_kit.run_folder import METRICS

    for option in ("protocol", "network", "label", "output", "format"):
        if (value := getattr(arguments, option)) is not None:
            raise ValueError(f"--{option} (={value!r}) would do nothing with --curves, which draws no results")
    path = Path(arguments.curves)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--curves (={arguments.curves!r}) must end with .png, .pdf or .svg")
    runs = {}
    for name in arguments.runs:
        folder = find_reference(name) if is_reference(name) else Path(name)
        runs[name] = next((place for place in (folder, folder / "run") if (place / METRICS).is_file()), folder)
    return plot_runs(runs, path, PANELS)


if __name__ == "__main__":
    sys.exit(main())
