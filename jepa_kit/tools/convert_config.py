"""Convert a YAML config of the released I-JEPA code into a config of jepa_kit.

examples:
  # the released ViT-H/14, which was trained by 16 processes; the result says which keys have no counterpart
  python tools/convert_config.py in1k_vith14_ep300.yaml --ranks 16 --output vith14.yaml

  # then
  python tools/train_net.py --config-file vith14.yaml data.shards=shards/in1k-train

  # the same without the quirks of the released masks
  python tools/train_net.py --config-file vith14.yaml data.shards=shards/in1k-train masker.edges=inclusive \\
      masker.coupled_scale_and_aspect=false masker.size_per=block masker.truncation=none

Numbers and masks are those of the released code (projects/ijepa/README.md): `truncation: released` cuts the contexts of
a process's batch to the shortest, so a run repeats the release only with the same number of processes. Weights and
checkpoints need no conversion: train.init_from=FILE, or --resume FILE (docs/checkpoints.md).
Exit status: 0, 2 for an unusable file or command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_kit.arguments import Show, add_json, run_tool, run_with_json, tool_parser

NAME = "convert_config.py"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser(NAME, __doc__)
    p.add_argument("config", metavar="FILE", help="YAML file of the released code, or of a fork with the same keys")
    p.add_argument(
        "--ranks",
        required=True,
        type=int,
        metavar="N",
        help="processes that it was meant for, one for each GPU; its batch size is that of one of them",
    )
    add_json(p)
    p.add_argument("--output", metavar="PATH", help="file to write (default: print the config)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool(NAME, lambda: run_with_json(run, parser().parse_args(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Write the config, and print the notes on stderr.

    Raises:
        ValueError: the file is not YAML, lacks keys, or has values that jepa_kit rejects.
        FileExistsError: the output exists.
    """
    # imported here, so that --help does not wait for torch
    from jepa_kit.config import config_from_dict
    from jepa_kit.config.load import dump_yaml, parse_yaml
    from jepa_kit.interop.released_config import convert_config

    source = Path(arguments.config)
    converted = convert_config(parse_yaml(source.read_text(encoding="utf-8"), str(source)), arguments.ranks)
    config_from_dict(converted.config, source=str(source))
    notes = [f"not carried over: {note}" for note in converted.notes]
    card = [f"{source.name} of the released I-JEPA code, for {arguments.ranks} processes.", "", *notes]
    text = "".join(f"# {line}".rstrip() + "\n" for line in card) + "\n" + dump_yaml(converted.config)
    if arguments.output:
        with open(arguments.output, "x", encoding="utf-8") as file:
            file.write(text)
    if arguments.json or not arguments.output:
        show(text.rstrip("\n"), {"config": converted.config, "notes": converted.notes})
    for note in notes:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
