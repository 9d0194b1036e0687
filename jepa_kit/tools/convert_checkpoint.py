"""Convert weights from one format to another.

formats:
  official      the released I-JEPA .pth.tar: encoder, predictor, target encoder, optimizer
  jepa_kit      a checkpoint of a run: the same, with its config
  hf            a folder that transformers' from_pretrained loads, of IJepaModel, ViTModel (DINO, iBOT), ViTMAEModel,
                ViTMSNModel, BeitModel or Data2VecVisionModel: one encoder
  timm          one encoder with timm's key names
  safetensors   one encoder with our key names
  onnx          one encoder as a graph: its outputs are the tokens and their mean

examples:
  # the target encoder of released weights, for transformers
  python tools/convert_checkpoint.py --from official --to hf IN1K-vit.h.14-300e.pth.tar ijepa_vith14_target

  # the context encoder of a run, for timm
  python tools/convert_checkpoint.py --from jepa_kit --to timm --encoder context runs/first first_context.safetensors

  # an ONNX graph
  python tools/convert_checkpoint.py --to onnx runs/first encoder.onnx

  # a whole run in the released layout, with predictor and optimizer, and back
  python tools/convert_checkpoint.py --to official runs/first first.pth.tar
  python tools/convert_checkpoint.py --to jepa_kit first.pth.tar first.pt

No `imports` of a run are executed, so --trust-imports is not needed: a masker, target, loss or predictor of your own is
no obstacle. An encoder of your own stays in the format jepa_kit, as other formats have no names for it.

Without --from, the format is recognised by the content. Exit status: 0, 2 for an unusable file or command, 130 for
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from jepa_kit.arguments import Show, add_json, run_tool, run_with_json, tool_parser  # first: sets what torch reads
from jepa_kit.interop.files import Format
from jepa_kit.interop.formats import convert
from jepa_kit.interop.hf_models import MODELS
from jepa_kit.interop.weights import Positions, Which


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("convert_checkpoint.py", __doc__)
    p.add_argument("--from", dest="from_", choices=get_args(Format), help="format of IN (default: recognised)")
    p.add_argument("--to", required=True, choices=get_args(Format), help="format of OUT")
    p.add_argument(
        "--encoder",
        choices=get_args(Which),
        help="encoder to write, for formats with one (default: target if IN has both)",
    )
    p.add_argument("--image-size", type=int, metavar="PIXELS", help="for onnx, if it differs from training")
    p.add_argument(
        "--model-type",
        choices=list(MODELS),
        help="for hf, the model of transformers (default: the first of these that has what the encoder has)",
    )
    p.add_argument("--num-heads", type=int, metavar="N", help="if neither IN nor the encoder's size determines it")
    p.add_argument(
        "--positions",
        choices=get_args(Positions),
        default="formula",
        help="file: keep a position table that differs from the sine-cosine formula (default: reject it)",
    )
    p.add_argument(
        "--prefix",
        metavar="NAME.",
        help="read only the weights whose names begin with this, such as teacher., and remove it (prefixes of "
        "torch.compile, DDP, FSDP and probes, such as module. and backbone., are always removed)",
    )
    p.add_argument("--sha256", metavar="HEX", help="required checksum of IN")
    p.add_argument("--allow-unchecked", action="store_true", help="read IN even if its checksum is missing or wrong")
    add_json(p)
    p.add_argument("source", metavar="IN", help="a file, a folder, or the http(s) URL of a file")
    p.add_argument("target", metavar="OUT", help="a file, or a folder for hf; must not exist")
    return p


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Convert, and print what was written."""
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    source, target, size = options.pop("source"), options.pop("target"), options.pop("image_size")
    written = convert(source, target, image_size=None if size is None else (size, size), **options)
    content = {"source": source, "target": target, "format": arguments.to, "written": written}
    show(f"{target} ({arguments.to}): {written}", content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("convert_checkpoint.py", lambda: run_with_json(run, parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
