"""From nothing to an I-JEPA that has learned: scenes, pretraining, evaluation and pictures in one command.

1. renders synthetic scenes into shards (training and test);
2. pretrains the small ViT of configs/quickstart.yaml on them, without labels;
3. evaluates frozen features of its target encoder, of the same network untrained, and of raw pixels, with a
   linear probe and nearest neighbours, on three labels: how many objects, how far the nearest, of which shape;
4. prints one table and saves it as JSON, beside pictures of masks, training curves and patch features.

What is there already is kept: stopped by Ctrl-C or SIGTERM, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jepa_kit.arguments  # noqa: F401 (first: it sets what torch reads when it is imported)

if __name__ == "__main__" and not {"-h", "--help"} & {*sys.argv}:
    print("importing torch and scikit-learn", flush=True)

import torch

from jepa_kit.arguments import fail, run_tool
from jepa_kit.build import build_masker, build_recipe
from jepa_kit.config import Config, load_config
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.index import read_index
from jepa_kit.data.shards.writing import INDEX
from jepa_kit.distributed.collectives import choose_device, read_environment
from jepa_kit.distributed.signals import Preempted
from jepa_kit.engine.build import open_shards, training_view
from jepa_kit.engine.logging.curves import drawn
from jepa_kit.evaluation.evaluate import evaluate
from jepa_kit.evaluation.feature_sources import encoder_named, run_networks
from jepa_kit.evaluation.features import LoadedRun, layer_numbers, load_run, untrained_encoder
from jepa_kit.evaluation.pictures.draw import mask_gallery, patch_pca
from jepa_kit.evaluation.tables.results import results, write_results
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.evaluation.tables.table import format_table
from jepa_kit.interfaces import Encoder
from jepa_kit.tools import make_shards
from jepa_kit.training import train

CONFIG = Path(__file__).with_name("configs") / "quickstart.yaml"
TEST_SEED = 1_000_003
"""Test scenes are a series of their own: no training scene is among them."""

LAYERS = "last4"
"""The paper reports the better of the last layer and the last four; four are all that this network has."""

EXAMPLE = """examples:
  python projects/ijepa/quickstart.py
  python projects/ijepa/quickstart.py --output-dir output/random_masks masker='{name: random}'
"""


class UnmadeError(Exception):
    """make_shards has ended with a status that is not 0, and has said why."""

    def __init__(self, status: int) -> None:
        self.status = status


def make_data(folder: Path, *, train_scenes: int, test_scenes: int, image_size: tuple[int, int]) -> tuple[Path, Path]:
    """Shards of training and of test scenes of (height, width); those that are complete are kept.

    Raises:
        ValueError: complete shards of other scenes are there.
        UnmadeError: make_shards refused, or was stopped.
    """
    size = "x".join(map(str, image_size))
    parts = {"train": (train_scenes, 0), "test": (test_scenes, TEST_SEED)}
    for name, (count, seed) in parts.items():
        if (folder / name / INDEX).exists():
            check_scenes(folder / name, f"{count} scenes of {size}, seed {seed}")
            print(f"shards: {folder / name} is there already")
    for name, (count, seed) in parts.items():
        if not (folder / name / INDEX).exists():
            arguments = ["--num-scenes", count, "--image-size", size, "--seed", seed, "--overwrite"]
            if status := make_shards.main(["synthetic:scenes", str(folder / name), *map(str, arguments)]):
                raise UnmadeError(status)
    return folder / "train", folder / "test"


def check_scenes(folder: Path, asked: str) -> None:
    """Raises ValueError where complete shards hold other scenes than those asked for."""
    index = read_index(str(folder / INDEX))
    made = index.get("made_by", {})
    sides = str(made.get("image_size")).split("x")  # a side, or HEIGHTxWIDTH
    held = f"{index['samples']} scenes of {sides[0]}x{sides[-1]}, seed {made.get('seed')}"
    if held != asked:
        raise ValueError(f"{folder} holds {held}, but {asked} are asked for: remove it, or take another --output-dir")


def probe(run: LoadedRun, shards: Sequence[Path], file: Path, device: torch.device) -> list[Row]:
    """Every network under every protocol on every label; the rows are also written as JSON."""
    data, seed = run.config.data, run.config.train.seed
    training, test = (open_shards(run.config, str(path)) for path in shards)
    rows = evaluate(
        run_networks(run, device=device),
        training,
        test,
        ImageOptions(image_size=data.image_size, decoder=data.decoder, max_pixels=data.max_pixels),
        layers=LAYERS,
        seed=seed,
        progress=True,
    )
    content = results(rows, run=run, checkpoint=run.config.train.output_dir, train=training, test=test, seed=seed)
    write_results(content, file)
    return rows


def draw(config: Config, run: LoadedRun, shards: Path, folder: Path) -> list[Path]:
    """A mask gallery over training samples, and a PCA of patch features beside them."""
    data = config.data
    loader = TrainLoader(
        dataset=open_shards(config, str(shards)),
        masker=build_masker(config),
        batch_size=8,
        view=training_view(config),
        seed=config.train.seed,
    )
    _, batch = next(loader.batches(0))
    assert batch.masks is not None
    which = encoder_named(run.jepa)
    encoders: dict[str, Any] = {
        f"{which} encoder": run.jepa.encoder_for(which),
        "untrained": untrained_encoder(config, config.train.seed),
    }
    return [
        mask_gallery(batch.images, batch.masks, folder / "masks.png"),
        patch_pca(batch.images, encoders, folder / "patch_pca.png", mean=data.mean, std=data.std),
    ]


def margins(rows: Sequence[Row]) -> list[str]:
    """In words: how far the target encoder is ahead of the better baseline, for each protocol and label."""
    lines = []
    for row in rows:
        if row.network == "target":
            others = [r for r in rows if (r.protocol, r.label) == (row.protocol, row.label) and r.network != "target"]
            best = max(others, key=lambda r: r.accuracy)
            gap = 100 * (row.accuracy - best.accuracy)
            noise = 100 * (row.standard_error**2 + best.standard_error**2) ** 0.5
            lines.append(f"{row.protocol}, {row.label}: {gap:+.1f} points against {best.network} (noise {noise:.1f})")
    return lines


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, in this process; its workers end with it. Training listens to SIGTERM itself."""
    here = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() == here:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(folder: Path, train_scenes: int, test_scenes: int, overrides: Sequence[str]) -> None:
    """The four things that the text of this file names, in ``folder``."""
    start = time.perf_counter()
    own = [f"train.output_dir={folder / 'run'}", f"data.shards={folder / 'shards/train'}"]
    config = load_config(CONFIG, [*own, *overrides])
    encoder = cast(Encoder, build_recipe(config).encoder)
    layer_numbers(LAYERS, encoder.depth)  # what cannot be evaluated is not trained either
    size = config.data.image_size
    shards = make_data(folder / "shards", train_scenes=train_scenes, test_scenes=test_scenes, image_size=size)
    made = time.perf_counter()
    train(config, resume=True)
    trained = time.perf_counter()
    run = load_run(config.train.output_dir, trust_imports=True)
    rows = probe(run, shards, folder / "results.json", choose_device(config.train.device, read_environment()))
    pictures = drawn("a picture", lambda: draw(config, run, shards[0], folder)) or []
    done = time.perf_counter()
    print(f"\nfrozen features on {len(open_shards(config, str(shards[1]))):,} test scenes, accuracy in %\n")
    print(format_table(rows))
    print("\ntarget encoder against the better of untrained and pixels:")
    print("\n".join(f"  {line}" for line in margins(rows)))
    print(f"\nscenes {made - start:.0f} s, training {trained - made:.0f} s, evaluation {done - trained:.0f} s")
    for path in (folder / "results.json", *pictures, Path(config.train.output_dir) / "curves.png"):
        print(f"  {path}")


def run(argv: Sequence[str] | None) -> int:
    """Run all four; return 0, or the status of make_shards, or 130 for Ctrl-C or SIGTERM."""
    text = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=text[0], epilog=text[1] + "\n" + EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("output/quickstart"), help="default: %(default)s")
    parser.add_argument("--train-scenes", type=int, default=8064, help="default: %(default)s")
    parser.add_argument("--test-scenes", type=int, default=1920, help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to configs/quickstart.yaml")
    args = parser.parse_intermixed_args(argv)
    try:
        with sigterm_as_interrupt():
            run_all(args.output_dir, args.train_scenes, args.test_scenes, args.overrides)
    except (FloatingPointError, RuntimeError) as error:
        return fail("quickstart", str(error), status=2)
    except UnmadeError as unmade:
        return unmade.status
    except (KeyboardInterrupt, Preempted) as stopped:
        after = f" after {stopped.step:,} steps" if isinstance(stopped, Preempted) else ""
        return fail("quickstart", f"stopped{after}; the same command continues from here", status=130)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; return its exit status: 2 if something was refused, 130 if it was stopped."""
    return run_tool("quickstart", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
