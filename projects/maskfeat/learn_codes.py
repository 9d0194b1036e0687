"""Learn the codes of a config's target `patch_codes`, which names their file, by k-means on whitened windows of images.

Images are random centre crops of data.shards. Prints how many codes are 0, and their mean and spread.

examples:
  python projects/maskfeat/learn_codes.py --config-file projects/maskfeat/configs/cifar10_small.yaml \\
      data.shards=data/cifar10/train

  # more images, larger windows
  python projects/maskfeat/learn_codes.py --config-file projects/maskfeat/configs/cifar10_small.yaml \\
      --images 10000 --side 8 data.shards=data/cifar10/train
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.maskfeat"  # for the relative import

from jepa_kit.arguments import add_config, run_tool, tool_parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("learn_codes.py", __doc__)
    add_config(p)
    p.add_argument("--images", type=int, default=4000, metavar="N", help="images, at random (default: %(default)s)")
    p.add_argument("--side", type=int, default=6, metavar="N", help="side of a window in pixels (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool("learn_codes.py", lambda: run(parser().parse_intermixed_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Learn the codes and write them.

    Raises:
        ValueError: the config has no target `patch_codes` or no shards, a value is outside its range, or there are
            fewer different windows than codes.
    """
    # here, so that --help does not wait for torch and scikit-learn
    import torch

    from jepa_kit.config import load_config
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.data.loader import eval_batches
    from jepa_kit.data.transforms import normalize
    from jepa_kit.engine.build import open_shards
    from jepa_kit.evaluation.images import random_samples
    from jepa_kit.evaluation.patch_codes import PatchOptions, learn_patches
    from jepa_kit.files import atomic_write
    from jepa_kit.from_config import patch_grid_of
    from jepa_kit.interop.tensor_files import write_file

    from .targets import Codes

    config = load_config(arguments.config_file, arguments.overrides, trust_imports=arguments.trust_imports)
    options = next((part.options for part in config.slots.values() if part.name == "patch_codes"), None)
    if options is None or config.data.shards is None:
        raise ValueError("the config must have a target 'patch_codes', and data.shards must name images")
    data, k, seed, side = config.data, options["number"], config.train.seed, arguments.side
    file, size, stride = Path(options["codes"]).expanduser(), data.image_size, options.get("stride", 2)
    if not stride <= side <= min(size):
        raise ValueError(f"--side (={side}) must be from the stride (={stride}) to the image's side (={min(size)})")
    if arguments.images < 1:
        raise ValueError(f"--images (={arguments.images}) must be at least 1")
    dataset, of_images = open_shards(config), ImageOptions.from_config(data)
    windows = PatchOptions(side, 1, size, centroids=k, images=arguments.images, seed=seed)
    arrays = learn_patches(windows, dataset, of_images)
    if len(arrays["centroids"]) < k:
        raise ValueError(
            f"number (={k}) of codes must be at most that of different windows (={len(arrays['centroids'])})"
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors |= {"code_mean": torch.zeros(k), "code_std": torch.ones(k)}
    patch_size = size[0] // patch_grid_of(config)[0]
    raw = Codes(tensors, patch_size=patch_size, stride=stride, mean=data.mean, std=data.std)
    samples = random_samples(dataset, arguments.images, seed=seed)
    total = torch.zeros(3, k, dtype=torch.float64)  # of codes, of their squares, and of how many are 0
    patches = 0
    with torch.inference_mode():
        for batch in eval_batches(dataset, of_images, samples=samples):
            codes = raw(normalize(batch.images, data.mean, data.std)).flatten(0, 1).double()  # [B * N, K]
            total += torch.stack([codes, codes.square(), (codes == 0).double()]).sum(1)
            patches += len(codes)
    mean, square, zero = total / patches
    deviation = (square - mean.square()).clamp(min=1e-12).sqrt()
    tensors |= {"code_mean": mean.float(), "code_std": deviation.float()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as part:
        write_file(part, tensors, {"number": str(k), "patch_size": str(patch_size), "stride": str(stride)})
    print(
        f"{file}: {k} codes of windows of {side} x {side} pixels; over {patches:,} patches, a code is 0 in "
        f"{zero.mean():.0%}, and has mean {mean.mean():.2f} and standard deviation {deviation.mean():.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
