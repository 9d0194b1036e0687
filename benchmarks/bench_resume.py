"""Measure the cost of resuming in the middle of an epoch on small shards, extrapolated to ImageNet.

    python benchmarks/bench_resume.py --images 2000 --repeats 5

Measured in turns:

order     the order of an epoch of ImageNet itself (1,281,167 samples in 1,282 shards of 1,000)
local     the first batch from step 0, and from the last step of an epoch, of shards on this machine
forward   reading shards to their end and decoding nothing, as a stream of tar files must: WebDataset's reader of the
          members, bare reading, a fetch over HTTP from this machine, and a fetch through a pipe
decoding  200 of the images decoded and cropped, for comparison

The files are in the page cache of this machine, so rates are those of the programs; a network or disk may be slower.
Extrapolated to ImageNet: reading a whole epoch forward, and fetching the shards of one shuffle window, which a resume
must fetch again if shards are remote.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import webdataset
from PIL import Image

from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.remote.fetch import Access, copy
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import Sample, write_index, write_shard
from jepa_kit.data.transforms import train_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.rng import epoch_order

IMAGES, PER_SHARD, WINDOW, IMAGE_BYTES = 1_281_167, 1000, 16384, 110_000
"""ImageNet's images, ours of a shard, the default window, and about the mean size of ImageNet's files."""


def photo(seed: int) -> bytes:
    """Return a JPEG of 500 x 375 pixels of smooth noise, with a quality that gives about ImageNet's mean size."""
    noise = np.random.default_rng(seed).integers(0, 256, (94, 125, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
    for quality in range(98, 60, -2):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if out.tell() < IMAGE_BYTES * 1.1:
            break
    return out.getvalue()


def make_shards(folder: Path, count: int) -> ShardDataset:
    """Write shards of 500 images."""
    photos = [photo(seed) for seed in range(20)]
    parts = []
    for shard, start in enumerate(range(0, count, 500)):
        samples = [Sample(f"{k:06d}", "jpg", photos[k % 20]) for k in range(start, min(start + 500, count))]
        parts.append(write_shard(str(folder / f"shard-{shard:06d}.tar"), samples))
    write_index(str(folder), [p[0] for p in parts], [p[1] for p in parts], classes={}, refused=[], made_by={})
    return ShardDataset(folder)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A silent HTTP server of a folder."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(folder: str, port: Any) -> None:
    """Serve a folder, in a process of its own."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        port.put(server.server_port)
        server.serve_forever()


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds by clock, and CPU seconds of this process and its commands."""

    def cpu() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(used.ru_utime + used.ru_stime for used in both)

    start, used = time.perf_counter(), cpu()
    action()
    return time.perf_counter() - start, cpu() - used


def imagenet_order() -> None:
    """Compute the order of an epoch."""
    sizes = np.full(-(-IMAGES // PER_SHARD), PER_SHARD)
    sizes[-1] = IMAGES - sizes[:-1].sum()
    epoch_order(sizes, seed=0, epoch=3, window=WINDOW)


def first_batch(dataset: ShardDataset, step: int) -> None:
    """Make the batch of a step with a new loader."""
    pipeline = train_pipeline(image_size=(224, 224))
    loader = TrainLoader(dataset=dataset, views=[ViewMaker(pipeline=pipeline)], batch_size=32, shuffle_window=1024)
    next(loader.batches(step if step >= 0 else loader.steps_per_epoch + step))


def members(paths: list[str]) -> None:
    """Read all samples of shards with WebDataset, as bytes."""
    for _ in webdataset.WebDataset(paths, shardshuffle=False):
        pass


def bare(paths: list[str]) -> None:
    """Read all bytes of shards."""
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 18):
                pass


def fetch(addresses: list[str]) -> None:
    """Copy each shard to a file."""
    for address in addresses:
        with tempfile.TemporaryFile() as out:
            copy(address, out, Access())


def decode(dataset: ShardDataset, count: int) -> None:
    """Decode, crop and resize images."""
    pipeline = train_pipeline(image_size=(224, 224))
    draws = pipeline.draws(np.arange(count), seed=0, epoch=0)
    for i in range(count):
        pipeline(dataset.image_bytes(i), draws[i])


def measure(dataset: ShardDataset, port: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure all in turns; return medians in seconds by clock and CPU."""
    paths = [place for part in dataset.parts for place in part.places]
    addresses = [f"http://127.0.0.1:{port}/{os.path.basename(path)}" for path in paths]
    actions: dict[str, Callable[[], Any]] = {
        "order": imagenet_order,
        "first batch from step 0": lambda: first_batch(dataset, 0),
        "first batch from the last step": lambda: first_batch(dataset, -1),
        "members": lambda: members(paths),
        "bare": lambda: bare(paths),
        "http": lambda: fetch(addresses),
        "pipe": lambda: fetch([f"pipe:cat '{path}'" for path in paths]),
        "decode 200": lambda: decode(dataset, 200),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            found[name].append(timed(action))
    return {
        name: {kind: statistics.median(v[k] for v in values) for k, kind in enumerate(("clock", "cpu"))}
        for name, values in found.items()
    }


def summary(seconds: dict[str, dict[str, float]], dataset: ShardDataset) -> dict[str, Any]:
    """Return rates, and times extrapolated to ImageNet."""
    count, size = len(dataset), sum(shard["bytes"] for shard in dataset.shards)
    window = -(-WINDOW // PER_SHARD) + 1
    report: dict[str, Any] = {
        "images": count,
        "bytes_per_image": size / count,
        "seconds": seconds,
        "imagenet_gb": IMAGES * size / count / 1e9,
        "imagenet_epoch_decoded_cpu_hours": IMAGES * seconds["decode 200"]["cpu"] / 200 / 3600,
        "shards_of_a_window": window,
        "forward": {},
    }
    for name in ("members", "bare", "http", "pipe"):
        report["forward"][name] = {
            "mb_per_second": size / seconds[name]["clock"] / 1e6,
            "imagenet_epoch_minutes": IMAGES * seconds[name]["clock"] / count / 60,
            "imagenet_epoch_cpu_minutes": IMAGES * seconds[name]["cpu"] / count / 60,
            "imagenet_window_seconds": window * PER_SHARD * seconds[name]["clock"] / count,
        }
    return report


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<machine>_torch<version>_resume.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_shards(Path(folder), args.images)
        port: Any = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve, args=(folder, port), daemon=True)
        server.start()
        report = summary(measure(dataset, port.get(), args.repeats), dataset)
        server.terminate()
        server.join()
    machine, version = f"cpu_{platform.machine()}", torch.__version__.split("+")[0]
    report = {"machine": machine, "torch": torch.__version__, "load_average": os.getloadavg()[0], **report}
    output = args.output or Path(__file__).parent / "results" / f"{machine}_torch{version}_resume.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    for name, value in report["seconds"].items():
        print(f"{name:32s} {value['clock']:8.3f} s, of CPU {value['cpu']:8.3f}")
    for name, rates in report["forward"].items():
        print(
            f"forward, {name:8s} {rates['mb_per_second']:7.0f} MB/s: an epoch of ImageNet "
            f"{rates['imagenet_epoch_minutes']:.1f} minutes, the {report['shards_of_a_window']} shards of a window "
            f"{rates['imagenet_window_seconds']:.1f} s; CPU alone {rates['imagenet_epoch_cpu_minutes']:.1f} minutes"
        )
    print(f"decoded, an epoch of ImageNet takes {report['imagenet_epoch_decoded_cpu_hours']:.1f} hours of one core")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
