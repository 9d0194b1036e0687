"""Replay a step whose loss or gradient was not finite, and find the first operation with a non-finite result.

examples:
  # the dump that the run's message named, with weights from the run's last checkpoint before the step
  python tools/replay_step.py runs/first/bad_step_00001234/rank_0000.pt

  # without repeating the steps since that checkpoint
  python tools/replay_step.py runs/first/bad_step_00001234/rank_0000.pt --at-once

  # if the dump has been moved out of the run folder; on a GPU
  python tools/replay_step.py rank_0000.pt --run runs/first --device cuda

  # if no earlier checkpoint is left and the initial weights of the run have been moved
  python tools/replay_step.py runs/first/bad_step_00000012/rank_0000.pt --start weights/IN1K-vit.h.14-300e.pth.tar

The findings are printed, and written beside the dump as <dump>.replay.json. Exit status: 0 if a non-finite number was
found, 3 if all numbers are finite this time, 2 for a mistake in the command or its files, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jepa_kit.arguments import Show, add_json, add_trust, run_tool, run_with_json, tool_parser
from jepa_kit.distributed.collectives import World, choose_device
from jepa_kit.engine.replay import as_in_run, read_dump, replay, weights_before
from jepa_kit.interop import start


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("replay_step.py", __doc__)
    p.add_argument("dump", type=Path, metavar="DUMP", help="bad_step_<step>/rank_<rank>.pt of a run folder")
    p.add_argument("--run", type=Path, metavar="DIR", help="the run folder (default: that of the dump)")
    p.add_argument(
        "--start",
        metavar="FILE",
        help="initial weights of the run, if they have been moved; read if no checkpoint before the step is left",
    )
    add_json(p)
    add_trust(p)
    p.add_argument("--at-once", action="store_true", help="use the last checkpoint's weights without repeating steps")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return p


def run(arguments: argparse.Namespace, show: Show) -> int:
    """Replay the step; print and write the findings. Return 0, or 3 if all numbers are finite."""
    dump = read_dump(arguments.dump, trust_imports=arguments.trust_imports)
    device = choose_device(arguments.device, World())
    bad, step = dump["bad"], dump["step"]
    numbers = ", ".join(f"{name} {value:g}" for name, value in dump["numbers"].items())
    print(f"step {step}, rank {dump['rank']} of {dump['world_size']}, as it was: {numbers}")
    print(f"losses of all ranks: {', '.join(bad['losses'])}")
    print(f"{len(dump['keys'])} images: {', '.join(map(str, dump['keys'][:8]))}{', ...' * (len(dump['keys']) > 8)}")
    folder = arguments.run or arguments.dump.resolve().parent.parent
    with as_in_run(dump, device):
        jepa = weights_before(
            dump, folder, device, again=not arguments.at_once, say=print, foreign=start, start_file=arguments.start
        )
        found = replay(dump, jepa, device)
    nothing = "all numbers are finite this time: the run had other weights, another device, or a hardware fault"
    facts = {"dump": arguments.dump.name, "step": step, "device": str(device), "at_once": arguments.at_once}
    result = arguments.dump.with_name(arguments.dump.name + ".replay.json")
    content = {**facts, "found": [asdict(finding) for finding in found]}
    result.write_text(json.dumps(content, indent=1) + "\n")
    show("\n".join(map(str, found)) or nothing, content)
    return 0 if found else 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("replay_step.py", lambda: run_with_json(run, parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
