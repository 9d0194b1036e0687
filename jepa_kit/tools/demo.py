"""Write a page that runs a trained network in the browser: one HTML file, which needs no network and no server.

Its reader hides parts of an image and sees what the predictor expects there: as features, as pixels, and as energy, the
loss between prediction and target. docs/demo.md describes it.

examples:
  # a run of tools/train_net.py, on the images of a folder, or of shards
  python tools/demo.py output/quickstart/run --images output/quickstart/shards/test --output demo.html

  # the shards `test` or `val` beside the run's; more images, and a decoder that is trained for longer
  python tools/demo.py output/quickstart/run --num-images 40 --decoder-steps 2000 --output demo.html

The images shown are the first in a random order (--seed); none is hand-picked.
Exit status: 0, 2 for a mistake in the command, the checkpoint or the images, or a network that is too large or that a
page cannot run, 130 after an interruption from the keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_kit.arguments import add_trust, run_tool, tool_parser

LEAST = {"num_images": 8, "decoder_images": 16, "decoder_steps": 1}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("demo.py", __doc__)
    p.add_argument("checkpoint", metavar="PATH", help="a checkpoint, or a run folder (its latest), of recipe jepa")
    p.add_argument("--images", metavar="DIR", help="images or shards (default: test or val beside the run's, or those)")
    p.add_argument("--output", metavar="FILE", help="the page (default: demo.html in the run folder)")
    p.add_argument("--title", metavar="TEXT", help="of the page (default: the name of the run folder)")
    p.add_argument("--num-images", type=int, default=24, metavar="N", help="images of the page (default: 24)")
    p.add_argument("--decoder-images", type=int, default=1024, metavar="N", help="to train it on (default: 1024)")
    p.add_argument("--decoder-steps", type=int, default=600, metavar="N", help="updates of the decoder (default: 600)")
    p.add_argument("--seed", type=int, default=0, help="seed of images and decoder (default: 0)")
    add_trust(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("demo.py", lambda: run(parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Write the page; print its name and size."""
    # here, so that --help does not wait for torch
    from jepa_kit.config.shipped import is_reference
    from jepa_kit.demo.page import build_page, prepare_network
    from jepa_kit.distributed.collectives import World, choose_device
    from jepa_kit.engine.build import open_shards
    from jepa_kit.engine.checkpoint.storage import is_url
    from jepa_kit.evaluation.features import load_run
    from jepa_kit.evaluation.pictures.material import gather
    from jepa_kit.evaluation.shard_choice import shown_shards
    from jepa_kit.evaluation.tables.results import check_output
    from jepa_kit.files import write_text

    for name, least in LEAST.items():
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} (={getattr(arguments, name)}) must be at least {least}")
    named = is_reference(arguments.checkpoint)
    if (is_url(arguments.checkpoint) or named) and not arguments.output:
        raise ValueError(f"--output must name a file: {arguments.checkpoint!r} is in no folder of yours")
    source = Path(arguments.checkpoint)
    folder = source if source.is_dir() else source.parent
    output = Path(arguments.output) if arguments.output else folder / "demo.html"
    check_output("--output", output)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    loaded = load_run(arguments.checkpoint, trust_imports=arguments.trust_imports)
    network = prepare_network(loaded, arguments.num_images)
    material = gather(
        loaded,
        open_shards(loaded.config, shown_shards(arguments.images, loaded.config.data.shards, "--images")),
        images=arguments.num_images,
        others=arguments.decoder_images,
        device=choose_device(loaded.config.train.device, World()),
        seed=arguments.seed,
        log=log,
    )
    title = arguments.title or (arguments.checkpoint if named else folder.resolve().name)
    page = build_page(network, material, title=title, steps=arguments.decoder_steps, log=log)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    print(f"{output}: {len(page.encode()) / 1e6:.1f} MB, {len(material.images)} images")


if __name__ == "__main__":
    sys.exit(main())
