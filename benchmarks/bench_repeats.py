"""Measure whether a run is reproducible: compare weights and losses of two equal runs and one resumed from the middle.

    python benchmarks/bench_repeats.py --device cuda
    python benchmarks/bench_repeats.py --device cpu --size tiny --steps 4 --batch-size 4

On a CPU all are equal bit for bit. On CUDA some backward passes add up in an order of their own each time
(docs/faults.md); ``train.deterministic: true`` is measured beside the default. Images are scenes of 64 x 64 pixels,
masks multi-block.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch

from jepa_kit.config import Config, load_config
from jepa_kit.encoders import SIZES
from jepa_kit.engine.checkpoint.format import checkpoints, load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.tools import make_shards
from jepa_kit.training import train

CONFIG = ROOT / "projects" / "ijepa" / "configs" / "quickstart.yaml"


def config_of(args: argparse.Namespace, shards: Path, folder: Path, precision: str, deterministic: bool) -> Config:
    """Return the config of a run of ``args.steps`` steps with a checkpoint in its middle."""
    return load_config(
        CONFIG,
        [
            "masker={name: multiblock, min_keep: 6}",
            f"encoder={{name: vit, patch_size: 8, size: {args.size}}}",
            "predictor={name: vit, depth: 2, num_heads: 3}",
            f"data.shards={shards}",
            f"train.output_dir={folder}",
            f"train.batch_size={args.batch_size}",
            "train.epochs=1",
            f"train.steps_per_epoch={args.steps}",
            f"checkpoint.every={args.steps // 2}",
            "train.log_every=1",
            "train.tensorboard=false",
            f"train.device={args.device}",
            f"train.precision={precision}",
            *(["train.deterministic=true"] if deterministic else []),
        ],
    )


def apart(one: Path, other: Path) -> dict[str, Any]:
    """Return the differences of final weights and losses of two runs, relative to their largest values."""
    first, second = (load_checkpoint(folder).model for folder in (one, other))
    gaps = {
        name: float((value.double() - second[name].double()).abs().max() / value.double().abs().max().clamp(min=1e-30))
        for name, value in first.items()
    }
    losses = [{line["step"]: line["loss"] for line in read_metrics(folder)} for folder in (one, other)]
    loss_gaps = {step: abs(losses[0][step] - loss) / abs(loss) for step, loss in losses[1].items()}
    equal = all(torch.equal(value, second[name]) for name, value in first.items())
    worst = max(gaps, key=gaps.__getitem__)
    text = "equal bits"
    if not equal:
        unlike = [step for step, gap in loss_gaps.items() if gap]
        since = (
            f", losses from step {unlike[0]} on by up to {max(loss_gaps.values()):.1e}" if unlike else ", losses equal"
        )
        text = f"weights differ by up to {gaps[worst]:.1e} ({worst}){since}"
    return {"equal": equal, "weights": gaps[worst], "losses": loss_gaps, "text": text}


def measure(args: argparse.Namespace, work: Path, precision: str, deterministic: bool) -> dict[str, Any]:
    """Train twice, resume a copy of the first run's middle, and compare both with the first."""
    folders = [work / f"{precision}_{deterministic}_{name}" for name in ("first", "second", "resumed")]
    first, second, resumed = folders
    for folder in (first, second):
        train(config_of(args, work / "shards", folder, precision, deterministic))
    resumed.mkdir()
    shutil.copy(checkpoints(first)[0], resumed)
    train(config_of(args, work / "shards", resumed, precision, deterministic), resume=True)
    return {
        "precision": precision,
        "deterministic": deterministic,
        "second run": apart(first, second),
        "resumed run": apart(first, resumed),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure each precision, with and without ``train.deterministic``, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=20, help="an even number (default: 20)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "float32"], default=["bf16"])
    parser.add_argument("--output", type=Path, help="a file of JSON")
    args = parser.parse_args(argv)
    modes = [False, True] if args.device.startswith("cuda") else [False]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        count = max(256, 2 * args.batch_size)
        if make_shards.main(["synthetic:scenes", str(work / "shards"), "--num-scenes", str(count)]):
            raise SystemExit("bench_repeats: the scenes could not be made")
        for precision in args.precisions:
            for deterministic in modes:
                result = measure(args, work, precision, deterministic)
                results.append(result)
                for pair in ("second run", "resumed run"):
                    print(f"{precision}, deterministic {deterministic}, {pair}: {result[pair]['text']}", flush=True)
    if args.output:
        report = {"torch": torch.__version__, "device": args.device, "results": results}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
