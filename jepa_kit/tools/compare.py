"""Compare the results of any number of runs in one table (Markdown and CSV) and one figure.

examples:
  # run folders; runs that differ only in their seed share a line, with mean and deviation
  python tools/compare.py runs/seed0 runs/seed1 runs/seed2

  # runs of several recipes; write comparison.md, .csv and .png
  python tools/compare.py runs/multiblock runs/random output/quickstart --output comparison

  # only some protocols and networks
  python tools/compare.py runs/* --protocol linear,knn --network target,untrained

A run is a folder with results of tools/eval_net.py (evaluation/*.json) or of the quickstart (results.json), or such a
file. Each step of a run has its own line. Cells are percent: "mean ± deviation over seeds", or for one run "figure
(standard error)".
Exit status: 0, 2 for a mistake in the command or the files, 130 after an interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_kit.arguments import run_tool, tool_parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("compare.py", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders or files of results")
    p.add_argument("--protocol", metavar="NAMES", help="only these, separated by commas")
    p.add_argument("--network", metavar="NAMES", help="only these: target, context, untrained, pixels")
    p.add_argument("--label", metavar="NAMES", help="only these labels of the data (class, shape, ...)")
    p.add_argument("--output", metavar="PATH", help="write PATH.md, PATH.csv and PATH.png")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("compare.py", lambda: run(parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Print the table and write the files."""
    # imported here, so that --help does not wait for torch and scikit-learn
    from jepa_kit.engine.logging.curves import drawn
    from jepa_kit.evaluation.tables.compare import compare, figure, to_csv, to_markdown
    from jepa_kit.evaluation.tables.runs import load

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
    cells = compare(runs)
    table = to_markdown(cells)
    if arguments.output:
        base = Path(arguments.output)
        base.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{base}.md").write_text(table + "\n", encoding="utf-8")
        Path(f"{base}.csv").write_text(to_csv(cells), encoding="utf-8")
        drawn(f"{base}.png", lambda: figure(cells, f"{base}.png"))  # a warning if it fails: the table is printed anyway
    print(table)


if __name__ == "__main__":
    sys.exit(main())
