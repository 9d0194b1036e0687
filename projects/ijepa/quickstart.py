"""Train and evaluate a small I-JEPA on synthetic scenes with one command.

1. Render synthetic scenes into shards for training and testing.
2. Pretrain the small ViT of configs/quickstart.yaml on them, without labels.
3. Evaluate frozen features of its target encoder, of the untrained network, of raw pixels, and of k-means on
   patches, with a linear probe and nearest neighbours, on three labels: number of objects, distance of the
   nearest, and its shape.
4. Print a table and save it as JSON, with pictures of masks, training curves and patch features.

Complete steps are not repeated: after Ctrl-C or SIGTERM, the same command resumes.
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


from jepa_kit.arguments import fail, run_tool
from jepa_kit.config import Config, load_config
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.index import read_index
from jepa_kit.data.shards.writing import INDEX
from jepa_kit.distributed.collectives import choose_device, read_environment
from jepa_kit.distributed.signals import Preempted
from jepa_kit.engine.build import open_shards, training_views
from jepa_kit.engine.logging.curves import drawn
from jepa_kit.evaluation.evaluate import evaluate
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import Network, encoder_named, patch_network, run_networks
from jepa_kit.evaluation.features import LoadedRun, layer_numbers, load_run, untrained_encoder
from jepa_kit.evaluation.pictures.draw import mask_gallery, patch_pca
from jepa_kit.evaluation.tables.results import about_checkpoint, results, write_results
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.evaluation.tables.table import format_table
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Encoder
from jepa_kit.tools import make_shards
from jepa_kit.training import train

CONFIG = Path(__file__).with_name("configs") / "quickstart.yaml"
TEST_SEED = 1_000_003
"""Seed of the test scenes, which differs from that of training scenes so that the two sets are disjoint."""

LAYERS = "last4"
"""The paper reports the better of the last layer and the last four; this network has four."""

EXAMPLE = """examples:
  python projects/ijepa/quickstart.py
  python projects/ijepa/quickstart.py --output-dir output/random_masks masker='{name: random}'
"""


class UnmadeError(Exception):
    """make_shards failed with this status, after it printed the reason."""

    def __init__(self, status: int) -> None:
        self.status = status


def make_data(folder: Path, *, train_scenes: int, test_scenes: int, image_size: tuple[int, int]) -> tuple[Path, Path]:
    """Make shards of training and test scenes, unless they are complete; return their folders.

    Args:
        folder: gets the folders ``train`` and ``test``.
        train_scenes, test_scenes: number of scenes.
        image_size: (height, width).

    Raises:
        ValueError: the folder has complete shards of other scenes.
        UnmadeError: make_shards failed or was stopped.
    """
    size = "x".join(map(str, image_size))
    parts = {"train": (train_scenes, 0), "test": (test_scenes, TEST_SEED)}
    for name, (count, seed) in parts.items():
        if (folder / name / INDEX).exists():
            check_scenes(folder / name, f"{count} scenes of {size}, seed {seed}")
            print(f"shards: {folder / name} is complete")
    for name, (count, seed) in parts.items():
        if not (folder / name / INDEX).exists():
            arguments = ["--num-scenes", count, "--image-size", size, "--seed", seed, "--overwrite"]
            if status := make_shards.main(["synthetic:scenes", str(folder / name), *map(str, arguments)]):
                raise UnmadeError(status)
    return folder / "train", folder / "test"


def check_scenes(folder: Path, wanted: str) -> None:
    """Raise ValueError if complete shards have other scenes than ``wanted``."""
    index = read_index(str(folder / INDEX))
    made = index.get("made_by", {})
    sides = str(made.get("image_size")).split("x")  # a side, or HEIGHTxWIDTH
    found = f"{index['samples']} scenes of {sides[0]}x{sides[-1]}, seed {made.get('seed')}"
    if found != wanted:
        raise ValueError(f"{folder} has {found}, not {wanted}: remove it, or give another --output-dir")


def probe(run: LoadedRun, networks: Sequence[Network], shards: Sequence[Path], store: FeatureStore) -> list[Row]:
    """Return the rows of networks by every protocol on every label."""
    data = run.config.data
    training, test = (open_shards(run.config, str(path)) for path in shards)
    images = ImageOptions(image_size=data.image_size, decoder=data.decoder, max_pixels=data.max_pixels)
    seed = run.config.train.seed
    return evaluate(networks, training, test, images, layers=LAYERS, seed=seed, store=store, progress=True)


def save(rows: Sequence[Row], run: LoadedRun, shards: Sequence[Path], file: Path) -> None:
    """Write rows as JSON."""
    training, test = (open_shards(run.config, str(path)) for path in shards)
    checkpoint, seed = about_checkpoint(run.config.train.output_dir, run), run.config.train.seed
    write_results(results(rows, config=run.config, checkpoint=checkpoint, train=training, test=test, seed=seed), file)


def draw(config: Config, run: LoadedRun, shards: Path, folder: Path) -> list[Path]:
    """Draw a mask gallery of training samples and a PCA of their patch features; return the files."""
    data = config.data
    loader = TrainLoader(
        dataset=open_shards(config, str(shards)),
        views=training_views(config),
        batch_size=8,
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
    """Return lines with the margin of the target encoder over the best baseline, per protocol and label."""
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
    """Raise KeyboardInterrupt on SIGTERM in this process, not in its workers; training handles SIGTERM itself."""
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
    """Run the four steps in the docstring of this file; all files go to ``folder``."""
    start = time.perf_counter()
    own = [f"train.output_dir={folder / 'run'}", f"data.shards={folder / 'shards/train'}"]
    config = load_config(CONFIG, [*own, *overrides])
    encoder = cast(Encoder, build_recipe(config).encoder)
    layer_numbers(LAYERS, encoder.depth)  # fail before training if the evaluation would
    size = config.data.image_size
    shards = make_data(folder / "shards", train_scenes=train_scenes, test_scenes=test_scenes, image_size=size)
    made = time.perf_counter()
    train(config, resume=True)
    trained = time.perf_counter()
    run = load_run(config.train.output_dir, trust_imports=True)
    networks = run_networks(run, device=choose_device(config.train.device, read_environment()))
    rows = probe(run, networks, shards, FeatureStore())
    pictures = drawn("a picture", lambda: draw(config, run, shards[0], folder)) or []
    done = time.perf_counter()
    rows += probe(run, [patch_network()], shards, FeatureStore(folder / "features"))
    titles = [row.title for row in rows]
    rows.sort(key=lambda row: titles.index(row.title))
    save(rows, run, shards, folder / "results.json")
    compared = time.perf_counter()
    print(f"\nfrozen features on {len(open_shards(config, str(shards[1]))):,} test scenes, accuracy in %\n")
    print(format_table(rows))
    print("\ntarget encoder against the best of untrained, pixels and patches:")
    print("\n".join(f"  {line}" for line in margins(rows)))
    print(f"\nscenes {made - start:.0f} s, training {trained - made:.0f} s, evaluation {done - trained:.0f} s")
    print(f"patches (learned once for these scenes, cached in {folder / 'features'}) {compared - done:.0f} s")
    for path in (folder / "results.json", *pictures, Path(config.train.output_dir) / "curves.png"):
        print(f"  {path}")


def run(argv: Sequence[str] | None) -> int:
    """Run the four steps; return 0, the status of make_shards, 2 for an error, or 130 for Ctrl-C or SIGTERM."""
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
        return fail("quickstart", f"stopped{after}; the same command resumes", status=130)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; return its exit status."""
    return run_tool("quickstart", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
