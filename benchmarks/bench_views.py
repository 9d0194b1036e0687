"""Measure what several augmented views of an image cost in the loader, relative to one.

    python benchmarks/bench_views.py

On one core, without workers, from shards with the images of bench_data.py, in the page cache; views have 224 x 224
pixels if nothing else is said. All contenders take turns in rounds, in one order and then in the opposite one; a ratio
is the median of the ratios of rounds, of CPU time per image.

    crop       one view: a random resized crop, as I-JEPA
    one        one augmented view: crop, flip, colour jitter (0.8), grey (0.2) and blur (0.5), as SimCLR
    two        two such views, for which a file is read and decoded once
    multicrop  two such views and six of 96 x 96 pixels, as DINO

A loader that decodes for each view takes 2 times ``one`` for two views.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import PIL
import torch
from bench_data import BATCH, DECODERS, SIDE, SIZE, Times, bound_to, make_folder, make_shards, ratios, stream
from steps import machine_name

from jepa_kit.data.images import simplejpeg
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import build_pipeline
from jepa_kit.data.views import ViewMaker

CROP: list[dict[str, Any]] = [{"name": "random_resized_crop", "scale": (0.2, 1.0)}]
LOCAL: list[dict[str, Any]] = [{"name": "random_resized_crop", "scale": (0.05, 0.2)}]
AUGMENTED: list[dict[str, Any]] = [
    {"name": "horizontal_flip"},
    {"name": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8},
    {"name": "grayscale", "p": 0.2},
    {"name": "gaussian_blur", "p": 0.5},
]
VIEWS: dict[str, list[tuple[Sequence[Mapping[str, Any]], int]]] = {
    "crop": [(CROP, SIDE)],
    "one": [(CROP + AUGMENTED, SIDE)],
    "two": [(CROP + AUGMENTED, SIDE)] * 2,
    "multicrop": [(CROP + AUGMENTED, SIDE)] * 2 + [(LOCAL + AUGMENTED, 96)] * 6,
}


def load(shards: Path, images: int, name: str, decoder: Any) -> Times:
    """Return the time that the views of so many images take."""
    makers = [
        ViewMaker(pipeline=build_pipeline(parts, image_size=(side, side), decoder=decoder))
        for parts, side in VIEWS[name]
    ]
    return stream(TrainLoader(dataset=ShardDataset(shards), views=makers, batch_size=BATCH).batches(0), images, 0)


def compare(shards: Path, images: int, rounds: int, decoder: str) -> dict[str, Any]:
    """Time all contenders in turns."""
    sides = {name: partial(load, shards, images, name, decoder) for name in VIEWS}
    seen: list[dict[str, Times]] = []
    with bound_to(1):
        for k in range(rounds + 1):  # the first warms up
            order = list(sides) if k % 2 else list(sides)[::-1]
            times = {name: sides[name]() for name in order}
            seen += [times] if k else []
    result: dict[str, Any] = {"decoder": decoder, "images_a_round": images, "rounds": rounds, "sides": {}, "cpu": {}}
    for name in sides:
        cpu = statistics.median(r[name][1] for r in seen)
        result["sides"][name] = {
            "views": len(VIEWS[name]),
            "images_per_cpu_second": round(images / cpu, 1),
            "cpu_ms_per_image": round(1000 * cpu / images, 3),
        }
    for name, other in (("one", "crop"), ("two", "one"), ("multicrop", "one")):
        result["cpu"][f"{name} / {other}"] = ratios(seen, other, name)["cpu"]  # median, least, most
    return result


def main(argv: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=128, help="distinct images that are made")
    parser.add_argument("--images", type=int, default=256, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_views.json")
    args = parser.parse_args(argv)
    if args.images % BATCH:
        parser.error(f"--images (={args.images}) must be a multiple of {BATCH}")
    torch.set_num_threads(1)
    machine = machine_name("cpu")
    name = f"{machine}_torch{torch.__version__.split('+')[0]}_views.json"
    output = args.output or Path(__file__).parent / "results" / name
    with tempfile.TemporaryDirectory() as temporary:
        files, shards = Path(temporary) / "files", Path(temporary) / "shards"
        size = make_folder(files, args.files)
        make_shards(files, shards)
        report: dict[str, Any] = {
            "machine": machine,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
            "images": {"size": list(SIZE), "distinct": args.files, "mean_bytes": round(size)},
            "batch_size": BATCH,
            "load_before": round(os.getloadavg()[0], 1),
            "results": [],
        }
        for decoder in DECODERS:
            found = compare(shards, args.images, args.rounds, decoder)
            report["results"].append(found)
            print(decoder)
            for side, each in found["sides"].items():
                print(f"  {side:10s}{each['cpu_ms_per_image']:8.2f} ms of CPU an image, {each['views']} views")
            for ratio, (median, least, most) in found["cpu"].items():
                print(f"  {ratio:16s} {median:.2f} ({least:.2f} to {most:.2f})", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
