"""Turns weights from one format into another, and says what was written.

formats:
  official      the released I-JEPA .pth.tar: encoder, predictor, target encoder, optimiser
  jepa_kit      a checkpoint of a run: the same, and its config
  hf            a folder that transformers.IJepaModel.from_pretrained loads: one encoder
  timm          timm's key names: one encoder
  safetensors   one encoder under our names
  onnx          one encoder as a graph: tokens, and their mean

examples:
  # the target encoder of released weights, for transformers
  python tools/convert_checkpoint.py --from official --to hf IN1K-vit.h.14-300e.pth.tar ijepa_vith14_target

  # the context encoder of a run, for timm
  python tools/convert_checkpoint.py --from jepa_kit --to timm --encoder context runs/first first_context.safetensors

  # a graph for onnxruntime
  python tools/convert_checkpoint.py --to onnx runs/first encoder.onnx

  # a whole run in the released layout, and back, with config, predictor and optimiser
  python tools/convert_checkpoint.py --to official runs/first first.pth.tar
  python tools/convert_checkpoint.py --to jepa_kit first.pth.tar first.pt

Without --from, the format is recognised by the content. Exit status: 0, or 2 for a file or command that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from jepa_kit.arguments import run_tool, tool_parser  # first: it sets what torch reads when it is imported
from jepa_kit.interop.files import Format
from jepa_kit.interop.formats import convert
from jepa_kit.interop.weights import Positions, Which


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("convert_checkpoint.py", __doc__)
    p.add_argument("--from", dest="from_", choices=get_args(Format), help="what IN must be (default: what it is)")
    p.add_argument("--to", required=True, choices=get_args(Format), help="what OUT is to be")
    p.add_argument(
        "--encoder",
        choices=get_args(Which),
        help="which encoder, for formats of one (default: target where IN holds both, else the one it holds)",
    )
    p.add_argument("--image-size", type=int, metavar="PIXELS", help="for onnx: another size than in training")
    p.add_argument("--num-heads", type=int, metavar="N", help="where neither IN nor the encoder's size tells it")
    p.add_argument(
        "--positions",
        choices=get_args(Positions),
        default="formula",
        help="keep the file's position table where it is not the sine-cosine formula's (default: refuse it)",
    )
    p.add_argument(
        "--prefix",
        metavar="NAME.",
        help="take the names of weights that begin with it, without it, as teacher. (what torch.compile, DDP, FSDP and "
        "probes add, as module. and backbone., comes off anyway)",
    )
    p.add_argument("--sha256", metavar="HEX", help="what IN must have")
    p.add_argument("--allow-unchecked", action="store_true", help="read IN even if its checksum is missing or wrong")
    p.add_argument("source", metavar="IN", help="a file, a folder, or an http address of a file")
    p.add_argument("target", metavar="OUT", help="a file, for hf a folder; must not be there yet")
    return p


def run(arguments: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    options = vars(arguments)
    source, target, size = options.pop("source"), options.pop("target"), options.pop("image_size")
    written = convert(source, target, image_size=None if size is None else (size, size), **options)
    print(f"{target} ({arguments.to}): {written}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("convert_checkpoint.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
