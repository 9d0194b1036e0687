"""Train the tokenizer of a config, by k-means on patches of its images; its target `codes` names file and vocabulary.

Images are random centre crops of data.shards, normalised as in training. Prints how much of the patches' variance the
codes explain, and their perplexity: the number of codes if all were equally frequent.

examples:
  python projects/beit/train_tokenizer.py --config-file projects/beit/configs/quick.yaml data.shards=shards/scenes/train

  # more images, fewer patches of each
  python projects/beit/train_tokenizer.py --config-file projects/beit/configs/in1k_vitb16.yaml \\
      --images 20000 --patches 16 data.shards=/data/imagenet-train
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.beit"  # for the relative import

from jepa_kit.arguments import add_config, run_tool, tool_parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("train_tokenizer.py", __doc__)
    add_config(p)
    p.add_argument("--images", type=int, default=2000, metavar="N", help="images, at random (default: %(default)s)")
    p.add_argument("--patches", type=int, default=64, metavar="N", help="patches of each (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool("train_tokenizer.py", lambda: run(parser().parse_intermixed_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Train the tokenizer and write it.

    Raises:
        ValueError: the config has no target `codes` or no shards, or there are fewer patches than codes.
    """
    # here, so that --help does not wait for torch and scikit-learn
    import torch
    from sklearn.cluster import MiniBatchKMeans

    from jepa_kit.config import load_config
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.data.loader import eval_batches
    from jepa_kit.data.transforms import normalize
    from jepa_kit.engine.build import open_shards
    from jepa_kit.evaluation.images import random_samples
    from jepa_kit.files import atomic_write
    from jepa_kit.from_config import patch_grid_of
    from jepa_kit.interop.tensor_files import write_file
    from jepa_kit.structures import PatchSets

    from .codes import pixels_of

    config = load_config(arguments.config_file, arguments.overrides, trust_imports=arguments.trust_imports)
    options = next((part.options for part in config.slots.values() if part.name == "codes"), None)
    if options is None or config.data.shards is None:
        raise ValueError("the config must have a target 'codes', and data.shards must name images")
    data, k, file = config.data, options["vocabulary"], Path(options["tokenizer"]).expanduser()
    grid = patch_grid_of(config)
    pixels, patches = pixels_of(data.image_size[0] // grid[0]), grid[0] * grid[1]
    dataset = open_shards(config)
    samples = random_samples(dataset, arguments.images, seed=config.train.seed)
    torch.manual_seed(config.train.seed)
    chosen = []
    for batch in eval_batches(dataset, ImageOptions.from_config(data), samples=samples):
        images = normalize(batch.images, data.mean, data.std)
        every = pixels(images, PatchSets.full(len(images), patches), None).unflatten(0, (len(images), patches))
        chosen.append(every[:, torch.randperm(patches)[: arguments.patches]].flatten(0, 1))
    x = torch.cat(chosen).numpy()
    if len(x) < k:
        raise ValueError(f"--images times --patches (={len(x)}) must be at least the vocabulary (={k})")
    kmeans = MiniBatchKMeans(k, batch_size=4096, n_init=1, random_state=config.train.seed).fit(x)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as part:
        write_file(part, {"centroids": torch.from_numpy(kmeans.cluster_centers_).float()}, {})
    share = torch.bincount(torch.from_numpy(kmeans.labels_), minlength=k).double() / len(x)
    explained = 1 - kmeans.inertia_ / ((x - x.mean(0)) ** 2).sum()
    perplexity = torch.special.entr(share).sum().exp()
    print(f"{file}: {k} codes explain {explained:.0%} of the variance of {len(x)} patches; perplexity {perplexity:.0f}")


if __name__ == "__main__":
    sys.exit(main())
