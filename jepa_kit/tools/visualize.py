"""Draw pictures of a run: patch features, predictions and their energy, attention, what is expected in a hidden block.

examples:
  # a run of tools/train_net.py, on the shards `test` or `val` beside its training shards, else on the latter
  python tools/visualize.py --checkpoint output/quickstart/run

  # other images, another folder, a decoder trained for longer
  python tools/visualize.py --checkpoint runs/first/checkpoint_00001250.pt --shards shards/photos/val \\
      --output output/first_pictures --decoder-steps 3000

Writes page.png (all pictures), patch_pca.png, predictor_guess.png, energy.png, attention.png, decoder.png and
visualize.json.
The images shown are the first in a random order (--seed); none is hand-picked.
Exit status: 0, 2 for a mistake in the command, the checkpoint or the shards, 130 after an interruption from the
keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa_kit.arguments import Show, add_json, add_trust, run_tool, run_with_json, tool_parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("visualize.py", __doc__)
    p.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint, or a run folder (its latest)")
    p.add_argument("--shards", metavar="DIR", help="images (default: test or val beside the run's shards, else those)")
    p.add_argument("--output", metavar="DIR", help="folder for the files (default: pictures in the run folder)")
    p.add_argument("--images", type=int, default=256, metavar="N", help="images to search (default: 256)")
    p.add_argument("--decoder-images", type=int, default=1024, metavar="N", help="to train it on (default: 1024)")
    p.add_argument("--decoder-steps", type=int, default=600, metavar="N", help="updates of the decoder (default: 600)")
    p.add_argument("--seed", type=int, default=0, help="seed of images, masks, decoder and noise (default: 0)")
    add_json(p)
    add_trust(p)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in the run's config")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("visualize.py", lambda: run_with_json(run, parser().parse_intermixed_args(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Write the pictures; print the verdict and the files."""
    # here, so that --help does not wait for torch and matplotlib
    from jepa_kit.config.shipped import is_reference
    from jepa_kit.distributed.collectives import World, choose_device
    from jepa_kit.engine.build import open_shards
    from jepa_kit.engine.checkpoint.storage import is_url
    from jepa_kit.evaluation.features import load_run
    from jepa_kit.evaluation.pictures.material import gather
    from jepa_kit.evaluation.pictures.run_page import draw_run
    from jepa_kit.evaluation.shard_choice import shown_shards
    from jepa_kit.evaluation.tables.results import check_output

    for name in ("images", "decoder_images", "decoder_steps"):
        least = {"images": 32, "decoder_images": 64, "decoder_steps": 1}[name]
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} (={getattr(arguments, name)}) must be at least {least}")
    if (is_url(arguments.checkpoint) or is_reference(arguments.checkpoint)) and not arguments.output:
        raise ValueError(
            f"--output must name a folder: --checkpoint (={arguments.checkpoint!r}) is not in a folder of yours"
        )
    loaded = load_run(arguments.checkpoint, arguments.overrides, trust_imports=arguments.trust_imports)
    dataset = open_shards(loaded.config, shown_shards(arguments.shards, loaded.config.data.shards))
    source = Path(arguments.checkpoint)
    folder = source if source.is_dir() else source.parent
    output = Path(arguments.output) if arguments.output else folder / "pictures"
    check_output("--output", output / "page.png")

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    material = gather(
        loaded,
        dataset,
        images=arguments.images,
        others=arguments.decoder_images,
        device=choose_device(loaded.config.train.device, World()),
        seed=arguments.seed,
        log=log,
    )
    content = draw_run(
        material,
        output,
        name=arguments.checkpoint if is_reference(arguments.checkpoint) else "/".join(folder.resolve().parts[-2:]),
        steps=arguments.decoder_steps,
        log=log,
    )
    files = [str(output / name) for name in content["files"]]
    show("\n".join([f"{content['verdict']}: {content['reason']}", *files]), {**content, "files": files})


if __name__ == "__main__":
    sys.exit(main())
