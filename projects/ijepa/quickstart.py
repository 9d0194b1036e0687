"""Train and evaluate a small I-JEPA on synthetic scenes with one command.

1. Render synthetic scenes into shards for training and testing.
2. Pretrain the small ViT of configs/quickstart.yaml on them, without labels.
3. Evaluate frozen features of its target encoder, of the untrained network, of raw pixels, and of k-means on
   patches, on three labels: number of objects, distance of the nearest, and its shape. Features are means over
   the whole image, and over its quarters side by side; probes are logistic regression and nearest neighbours.
4. Print a table and save it as JSON, with pictures: masks, training curves, patch features, and a page of what
   the network knows. Curves and features of a longer run that ships with jepa_kit are beside those of this one.

With --validation, the last quarter of the training shards (of 8,064 scenes: 1,920) takes the place of the test
scenes and is left out of training, so that settings can be chosen without the test scenes.

Complete steps are not repeated: after Ctrl-C or SIGTERM, the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
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
from jepa_kit.config import Config, DataConfig, load_config
from jepa_kit.config.shipped import PREFIX, find_reference, reference_names
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.index import read_index
from jepa_kit.data.shards.writing import INDEX
from jepa_kit.distributed.collectives import choose_device, read_environment
from jepa_kit.distributed.signals import Preempted
from jepa_kit.engine.build import open_shards, training_views
from jepa_kit.engine.logging.curves import Beside, drawn, plot_curves
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.evaluation.evaluate import evaluate
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import Network, encoder_named, patch_network, run_networks
from jepa_kit.evaluation.features import LoadedRun, layer_numbers, load_run, untrained_encoder
from jepa_kit.evaluation.online import PANELS
from jepa_kit.evaluation.pictures.draw import mask_gallery, patch_pca
from jepa_kit.evaluation.pictures.material import gather
from jepa_kit.evaluation.pictures.run_page import draw_run
from jepa_kit.evaluation.protocols import Spec
from jepa_kit.evaluation.tables.results import about_checkpoint, results, write_results
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.evaluation.tables.table import format_table
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Encoder
from jepa_kit.interop import FrozenEncoder, load_encoder
from jepa_kit.tools import make_shards
from jepa_kit.training import train

CONFIG = Path(__file__).with_name("configs") / "quickstart.yaml"
TEST_SEED = 1_000_003
"""Seed of the test scenes, which differs from that of training scenes so that the two sets are disjoint."""

LAYERS = "last4"
"""The paper reports the better of the last layer and the last four; this network has four."""

PROTOCOLS: tuple[Spec, ...] = (
    {"name": "logistic", "subsets": ["all"]},
    {"name": "logistic", "subsets": ["all"], "pooling": "quarters"},
    "knn",
)

REFERENCE = "ijepa_scenes"
"""The run that ships with jepa_kit whose curve and features are shown beside those of this run, if it is there."""

PAGE_IMAGES, DECODER_IMAGES, DECODER_STEPS = 96, 256, 100
"""For the page, of tools/visualize.py, which has more by default: its decoder takes most of the time."""

READ = {
    "masks.png": "The context encoder sees what is not grey; from that, the predictor predicts what the target "
    "encoder computes at the patches of each outlined block.",
    "run/curves.png": "A falling loss alone proves nothing, because targets can become constant: the verdict on the "
    "page says whether they did. A grey line is the longer reference run at the same update.",
    "patch_pca.png": "Patches of one colour have similar features: in a network that knows objects, each stands out "
    "from the room; in one that knows positions only, all images look the same.",
    "page.png": "What the network knows, from its patch features to what it expects in a hidden block; each section "
    "says how to read it.",
}
"""Picture -> one sentence on how to read it."""

EXAMPLE = """examples:
  python projects/ijepa/quickstart.py
  python projects/ijepa/quickstart.py --output-dir output/random_masks masker='{name: random}'
  python projects/ijepa/quickstart.py --validation optim.lr=5e-4
"""


Parts = tuple[str | list[str], str | list[str]]
"""Shards to train on, and to test on."""


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


def validation_parts(train: Path) -> tuple[list[str], list[str]]:
    """Return the shards of a folder but for the last quarter, and these.

    Raises:
        ValueError: there is one shard only.
    """
    names = [str(train / shard["file"]) for shard in read_index(str(train / INDEX))["shards"]]
    if len(names) < 2:
        raise ValueError(
            f"--validation needs at least 2 shards, and {train} has {len(names)}: a shard has 1,024 scenes, so "
            "--train-scenes must be above that"
        )
    first = len(names) - max(1, len(names) // 4)
    return names[:first], names[first:]


def probe(run: LoadedRun, networks: Sequence[Network], shards: Parts, store: FeatureStore) -> list[Row]:
    """Return the rows of networks by every protocol on every label."""
    data, seed = run.config.data, run.config.train.seed
    training, test = (open_shards(run.config, part) for part in shards)
    images = ImageOptions(image_size=data.image_size, decoder=data.decoder, max_pixels=data.max_pixels)
    options: dict[str, Any] = {"protocols": PROTOCOLS, "layers": LAYERS, "seed": seed, "store": store, "progress": True}
    return evaluate(networks, training, test, images, **options)


def save(rows: Sequence[Row], run: LoadedRun, shards: Parts, file: Path) -> None:
    """Write rows as JSON."""
    training, test = (open_shards(run.config, part) for part in shards)
    checkpoint, seed = about_checkpoint(run.config.train.output_dir, run), run.config.train.seed
    write_results(results(rows, config=run.config, checkpoint=checkpoint, train=training, test=test, seed=seed), file)


def reference(data: DataConfig) -> FrozenEncoder | None:
    """Return the encoder of the reference run, if it ships with jepa_kit and was trained on such images."""
    if REFERENCE not in reference_names():
        return None
    encoder = load_encoder(PREFIX + REFERENCE)
    about = encoder.provenance
    return encoder if (encoder.image_size, about.mean, about.std) == (data.image_size, data.mean, data.std) else None


def draw(config: Config, run: LoadedRun, shards: Parts, folder: Path) -> None:
    """Draw the pictures of ``READ``: masks and patch features of training samples, and the page of test samples."""
    data = config.data
    loader = TrainLoader(
        dataset=open_shards(config, shards[0]),
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
    if (other := reference(data)) is not None:
        encoders[f"reference run,\n{other.provenance.step:,} updates"] = other.vit
        lines = read_metrics(find_reference(PREFIX + REFERENCE))
        beside = Beside(f"{PREFIX}{REFERENCE}, of {lines[-1]['step'] + 1:,} updates", lines)
        plot_curves(Path(config.train.output_dir), PANELS, beside)
    mask_gallery(batch.images, batch.masks, folder / "masks.png")
    patch_pca(batch.images, encoders, folder / "patch_pca.png", mean=data.mean, std=data.std)
    device = choose_device(config.train.device, read_environment())
    held_out = open_shards(config, shards[1])
    material = gather(run, held_out, images=PAGE_IMAGES, others=DECODER_IMAGES, device=device, seed=config.train.seed)
    draw_run(material, folder, name="quickstart", steps=DECODER_STEPS, singles=False)


def margins(rows: Sequence[Row]) -> list[str]:
    """Return lines with the margins of the target encoder in points, per protocol and label.

    One is over the better of the untrained network and pixels, which learn nothing, and one over patches. The error is
    that of the difference, due to the size of the test set.
    """
    lines = []
    for row in rows:
        if row.network == "target":
            others = {r.network: r for r in rows if (r.title, r.label) == (row.title, row.label) and r is not row}
            patches = others.pop("patches")
            texts = []
            for one in (max(others.values(), key=lambda r: r.accuracy), patches):
                error = 100 * (row.standard_error**2 + one.standard_error**2) ** 0.5
                texts.append(f"{100 * (row.accuracy - one.accuracy):+.1f} ± {error:.1f} against {one.network}")
            lines.append(f"{row.title}, {row.label}: {', '.join(texts)}")
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


def run_all(folder: Path, train_scenes: int, test_scenes: int, overrides: Sequence[str], *, validation: bool) -> None:
    """Run the four steps in the docstring of this file; all files go to ``folder``."""
    start = time.perf_counter()
    results_in = folder / "validation" if validation else folder
    own = [f"train.output_dir={results_in / 'run'}", f"data.shards={folder / 'shards/train'}"]
    config = load_config(CONFIG, [*own, *overrides])
    encoder = cast(Encoder, build_recipe(config).encoder)
    layer_numbers(LAYERS, encoder.depth)  # fail before training if the evaluation would
    size = config.data.image_size
    made = make_data(folder / "shards", train_scenes=train_scenes, test_scenes=test_scenes, image_size=size)
    shards: Parts = (str(made[0]), str(made[1]))
    if validation:
        shards = validation_parts(made[0])
        config = load_config(CONFIG, [*own, f"data.shards={json.dumps(shards[0])}", *overrides])
    rendered = time.perf_counter()
    train(config, resume=True)
    trained = time.perf_counter()
    run = load_run(config.train.output_dir, trust_imports=True)
    networks = run_networks(run, device=choose_device(config.train.device, read_environment()))
    rows = probe(run, networks, shards, FeatureStore())
    evaluated = time.perf_counter()
    drawn("a picture", lambda: draw(config, run, shards, results_in))
    done = time.perf_counter()
    rows += probe(run, [patch_network()], shards, FeatureStore(folder / "features"))
    titles = [row.title for row in rows]
    rows.sort(key=lambda row: titles.index(row.title))
    save(rows, run, shards, results_in / "results.json")
    compared = time.perf_counter()
    held_out = "validation" if validation else "test"
    print(f"\nfrozen features on {len(open_shards(config, shards[1])):,} {held_out} scenes, accuracy in %\n")
    print(format_table(rows))
    print("\nmargins of the target encoder in points, over the better of untrained and pixels, and over patches:")
    print("\n".join(f"  {line}" for line in margins(rows)))
    print(
        f"\nscenes {rendered - start:.0f} s, training {trained - rendered:.0f} s, evaluation "
        f"{evaluated - trained:.0f} s, pictures {done - evaluated:.0f} s"
    )
    print(f"patches (learned once for these scenes, cached in {folder / 'features'}) {compared - done:.0f} s")
    print(f"\n  {results_in / 'results.json'}")
    for name, sentence in READ.items():
        if (picture := results_in / name).exists():
            print(f"  {picture}\n{textwrap.fill(sentence, 100, initial_indent='      ', subsequent_indent='      ')}")


def run(argv: Sequence[str] | None) -> int:
    """Run the four steps; return 0, the status of make_shards, 2 for an error, or 130 for Ctrl-C or SIGTERM."""
    text = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=text[0], epilog=text[1] + "\n" + EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("output/quickstart"), help="default: %(default)s")
    parser.add_argument("--train-scenes", type=int, default=8064, help="default: %(default)s")
    parser.add_argument("--test-scenes", type=int, default=1920, help="default: %(default)s")
    parser.add_argument(
        "--validation", action="store_true", help="hold out training scenes, and leave the test scenes alone"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to configs/quickstart.yaml")
    args = parser.parse_intermixed_args(argv)
    try:
        with sigterm_as_interrupt():
            run_all(args.output_dir, args.train_scenes, args.test_scenes, args.overrides, validation=args.validation)
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
