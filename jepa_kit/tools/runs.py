"""List the runs below a folder: state, step, last figures, verdict and age.

examples:
  # all runs in ./output, the latest first
  python tools/runs.py

  # other folders; only what runs or failed; the lowest loss first
  python tools/runs.py /scratch/runs output --state running,failed --sort loss

  # for a program: the folders of the runs that can be resumed
  python tools/runs.py output --json | jq -r '.[] | select(.state == "stopped") | .run'

States: running (a process has the lock of the folder), finished, stopped (by a signal, after a checkpoint), failed (an
error or a killed process; the steps after its last checkpoint are lost), unreadable (a damaged file). Runs that were
stopped or failed continue with train_net.py --resume. The verdict is that of the last evaluation inside the run
(evaluate.every=N). A run on a file system without locks is shown as stopped or failed while it runs.
Exit status: 0, 2 for a mistake in the command, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jepa_kit.arguments import Show, add_json, run_tool, run_with_json, tool_parser
from jepa_kit.evaluation.tables.run_list import RUN_STATES, RunEntry, describe_runs, entry_of, find_runs

SORTS: dict[str, Callable[[RunEntry], Any]] = {
    "age": lambda e: -datetime.fromisoformat(e.changed).timestamp(),
    "name": lambda e: e.run,
    "state": lambda e: RUN_STATES.index(e.state),
    "step": lambda e: -e.step,
    "loss": lambda e: float("inf") if e.loss is None else e.loss,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("runs.py", __doc__)
    p.add_argument("folders", nargs="*", default=["output"], metavar="DIR", help="default: output")
    p.add_argument("--state", metavar="STATES", help=f"only these, separated by commas: {', '.join(RUN_STATES)}")
    p.add_argument("--sort", choices=SORTS, default="age", help="default: age, the latest first")
    add_json(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("runs.py", lambda: run_with_json(run, parser().parse_args(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Print the table, or JSON."""
    states = [name.strip() for name in arguments.state.split(",")] if arguments.state else list(RUN_STATES)
    if unknown := [name for name in states if name not in RUN_STATES]:
        raise ValueError(f"--state (={unknown[0]!r}) must be one of {', '.join(RUN_STATES)}")
    folders = [Path(name).expanduser() for name in arguments.folders]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"DIR (={str(folder)!r}) must be a folder with runs in it or below, but is none")
    places = dict.fromkeys(place for folder in folders for place in find_runs(folder))
    entries = [entry for place in places if (entry := entry_of(place)).state in states]
    entries.sort(key=lambda entry: (SORTS[arguments.sort](entry), entry.run))
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    text = describe_runs(
        entries, root=root, width=shutil.get_terminal_size((100, 24)).columns, now=datetime.now(timezone.utc)
    )
    named = ", ".join(map(str, folders))
    show(text if entries else f"no such run below {named}", [asdict(entry) for entry in entries])


if __name__ == "__main__":
    sys.exit(main())
