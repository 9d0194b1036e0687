"""Measure whether the loader keeps up with a GPU: training on JPEG files, by number of workers and decoder.

    python benchmarks/bench_feed.py --size base --workers 2 14 --device cuda
    python benchmarks/bench_feed.py --size tiny --image-size 96 --images 24 --batch-size 4 --steps 4 --device cpu

Images are those of bench_data.py: 500 x 375 pixels, about as many bytes as ImageNet's. Each figure is a run of
``train()`` with the corrected ImageNet recipe: images a second, and the fraction of the time that a step waited for its
batch, over the second half of the steps, as the run's own log has them. The first half fills the workers' queues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from bench_data import picture

from jepa_kit.config import load_config
from jepa_kit.data.images import simplejpeg
from jepa_kit.encoders import SIZES
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.tools import make_shards
from jepa_kit.training import train

CONFIG = ROOT / "projects" / "ijepa" / "configs" / "corrected_in1k_vitb16.yaml"


def save_picture(folder: Path, number: int) -> None:
    """Write a picture of bench_data.py as a JPEG file."""
    picture(number).save(folder / f"{number:05d}.jpg", quality=90)


def measure(args: argparse.Namespace, shards: Path, folder: Path, workers: int, decoder: str) -> dict[str, Any]:
    """Train ``args.steps`` steps and return the medians of the logged values of the second half."""
    overrides = [
        f"encoder={{name: vit, size: {args.size}, patch_size: 16}}",
        f"predictor={{name: vit, depth: 6, num_heads: {SIZES[args.size].num_heads}}}",
        f"data.shards={shards}",
        f"data.image_size={args.image_size}",
        f"data.num_workers={workers}",
        f"data.decoder={decoder}",
        "optim.warmup_epochs=0",
        "train.epochs=1",
        f"train.steps_per_epoch={args.steps}",
        f"train.batch_size={args.batch_size}",
        "train.log_every=2",
        "train.precision=bf16",
        "train.tensorboard=false",
        f"train.device={args.device}",
        f"train.output_dir={folder}",
    ]
    lines = read_metrics(train(load_config(CONFIG, overrides)))
    late = [line for line in lines if line["step"] >= args.steps // 2]
    return {
        "workers": workers,
        "decoder": decoder,
        **{key: statistics.median(line[key] for line in late) for key in ("images_per_second", "data_wait")},
    }


def main(argv: list[str] | None = None, tell: Callable[[dict[str, Any]], None] = print) -> None:
    """Measure all pairs; ``tell`` gets each result immediately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--images", type=int, default=768, help="that are made; they come again and again")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 14])
    parser.add_argument("--decoders", nargs="+", choices=["pillow", "fast"], help="default: those that are installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a file of JSON")
    args = parser.parse_args(argv)
    decoders = args.decoders or ["pillow", *(["fast"] if simplejpeg else [])]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        files, shards = Path(folder) / "files", Path(folder) / "shards"
        files.mkdir()
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(save_picture, files), range(args.images)))
        if make_shards.main([str(files), str(shards), "--samples-per-shard", str(max(1, args.images // 4))]):
            raise SystemExit("bench_feed: the shards could not be made")
        for workers in sorted(args.workers, reverse=True):
            for decoder in reversed(decoders):
                result = measure(args, shards, Path(folder) / f"run_{workers}_{decoder}", workers, decoder)
                results.append(result)
                tell(result)
    if args.output:
        report = {"torch": torch.__version__, **vars(args) | {"output": None}, "results": results}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
