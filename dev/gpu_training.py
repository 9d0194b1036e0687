"""The last stage of gpu_check.py: pretraining, probes and health, in the remaining time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "projects" / "ijepa" / "configs" / "cifar10_vit4.yaml"
TRIAL = 40
"""Steps of a first run, whose speed decides how many fit."""
SHARE = 0.5
"""Of the time left after it that training takes; the rest is for probes and health."""
MARGIN = 10.0
"""Seconds at the end that nothing is planned for."""


def make_shards(r: Any) -> tuple[Path, Path]:
    """Return training and test shards: of ``--images`` (its train and test or val, or a split), or of scenes."""
    from jepa_kit.tools import make_shards as tool

    def make(*arguments: object) -> None:
        if tool.main([str(argument) for argument in arguments]):
            sys.exit(f"make_shards {arguments[0]} failed")

    train, test = r.folder / "shards" / "train", r.folder / "shards" / "val"
    if r.images is None:
        scenes = (96, 48) if r.small else (20000, 2000)
        for folder, count, seed in ((train, scenes[0], 0), (test, scenes[1], 1_000_003)):
            make("synthetic:scenes", folder, "--num-scenes", count, "--image-size", 32, "--seed", seed, "--overwrite")
        return train, test
    parts = {name: r.images / name for name in ("train", "test", "val") if (r.images / name).is_dir()}
    if "train" in parts and len(parts) > 1:
        make(parts["train"], train, "--overwrite")
        make(parts.get("test") or parts["val"], test, "--classes-from", train, "--overwrite")
        return train, test
    make(r.images, r.folder / "shards", "--split-val", 0.1, "--overwrite")
    return train, test


def pretrain_and_probe(r: Any) -> None:
    """Train cifar10_vit4.yaml as long as the time allows; then logistic and k-NN probes, and a verdict on health.

    Args:
        r: the stage's record (gpu_stages.py).
    """
    from jepa_kit.tools import health

    r.folder.mkdir(exist_ok=True)
    train_shards, test_shards = make_shards(r)
    steps = 6
    if not r.small:
        begin = time.monotonic()
        train_run(r, train_shards, "trial", TRIAL)
        spent = time.monotonic() - begin
        # The trial's time includes a run's start; the rate is that of its end.
        rate = steady_rate(r.folder / "trial")
        seconds = SHARE * (r.left - MARGIN) - spent + TRIAL / rate
        steps = max(TRIAL, int(seconds * rate))
    begin = time.monotonic()
    run = train_run(r, train_shards, "run", steps)
    from jepa_kit.engine.logging.telemetry import read_metrics

    lines = read_metrics(run)
    spent, last = time.monotonic() - begin, lines[-1]
    speed = f"{last['images_per_second']:.0f} img/s, {last['data_wait']:.0%} waiting for data"
    source = "scenes" if r.images is None else str(r.images)
    r.row(
        source,
        f"{steps} steps in {spent:.0f} s, loss {lines[0]['loss']:.3f} to {last['loss']:.3f}; {speed}",
        metrics=lines,
    )
    probe(r, run, "knn", train_shards, test_shards)
    found = r.file.with_name("health.json")
    images = ["--images", "32" if r.small else "256"]
    if health.main(
        [
            "--checkpoint",
            str(run),
            "--shards",
            str(test_shards),
            *images,
            "--output",
            str(found),
            f"train.device={r.device}",
        ]
    ):
        sys.exit("health failed")
    report = json.loads(found.read_text())["health"][0]
    r.row("health", f"{report['verdict']}: {report['reason']}", health=report)
    probe(r, run, "logistic", train_shards, test_shards)  # last, as it takes longest


def probe(r: Any, run: Path, protocol: str, train_shards: Path, test_shards: Path) -> None:
    """Evaluate a run, the untrained network and pixels by one protocol, and add a row."""
    from jepa_kit.tools import eval_net

    found = r.file.with_name(f"{protocol}.json")
    arguments = ["--checkpoint", str(run), "--protocol", protocol, "--layers", "last4", "--output", str(found)]
    arguments += ["--train-shards", str(train_shards), "--test-shards", str(test_shards), f"train.device={r.device}"]
    if eval_net.main(arguments):
        sys.exit(f"eval_net failed with {protocol}")
    rows = [row for row in json.loads(found.read_text())["rows"] if not row["variant"]]  # of all images, not of some
    texts = []
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [f"{row['network']} {100 * row['accuracy']:.1f}" for row in rows if row["label"] == label]
        texts.append(f"{label}: {', '.join(of_label)}")
    r.row(f"{protocol}, accuracy in %", "; ".join(texts), **{protocol: rows})


def train_run(r: Any, shards: Path, name: str, steps: int) -> Path:
    """Train ``steps`` steps and return the run folder."""
    from jepa_kit.config import load_config
    from jepa_kit.training import train

    small = (
        ["train.batch_size=16", "data.num_workers=0"] if r.small else ["train.batch_size=512", "data.num_workers=12"]
    )
    overrides = [f"data.shards={shards}", f"train.device={r.device}", f"train.output_dir={r.folder / name}"]
    overrides += [
        "train.epochs=1",
        f"train.steps_per_epoch={steps}",
        "optim.warmup_epochs=0.1",
        "train.tensorboard=false",
    ]
    overrides += [f"train.log_every={1 if r.small else 10}", f"checkpoint.every={steps}"]
    return train(load_config(CONFIG, [*overrides, *small]))


def steady_rate(run: Path) -> float:
    """Return the steps per second at the end of a run."""
    from jepa_kit.config import load_config
    from jepa_kit.engine.logging.telemetry import read_metrics

    return float(read_metrics(run)[-1]["images_per_second"] / load_config(run).train.batch_size)
