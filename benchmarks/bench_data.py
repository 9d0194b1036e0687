"""Measure images per second from JPEG shards to batches of 224 x 224 pixels, and compare with two other loaders.

    python benchmarks/bench_data.py                       ratios on one core and on two
    python benchmarks/bench_data.py --memory 200000       memory of a loader worker over so many images

The images are noise of 500 x 375 pixels with the spectrum of photographs, JPEG quality 90, about as large as those of
ImageNet. They are in the page cache, so no disk is measured. All contenders take turns in rounds, in one order and then
in the opposite one; a ratio is the median of the ratios of rounds. One core: everything in one process, bound to that
core. Two cores: two loader workers, or two processes. Before the clock starts, workers are running and have made some
batches.

    bare      decoding and resizing alone, in a loop over bytes in memory, into an array: (a)
    folder    files, Pillow, a torch DataLoader, float tensors normalised one by one: plain_images.py, (b)
    engine    TrainLoader on shards: batches of uint8, which are normalised on the device
    floats    the same, and each batch normalised here, on the CPU

``bare``, ``engine`` and ``floats`` are measured for each decoder; a ratio to ``bare`` is to that of the same decoder.
On a shared machine, use the CPU time (of this process and its workers) instead of wall times. The result has the spread
of the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import PIL
import torch
from PIL import Image
from plain_images import MEAN, STD, folder_batches

from jepa_kit.data.images import simplejpeg
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import normalize, train_pipeline
from jepa_kit.data.views import ViewMaker

SIDE, BATCH = 224, 64
SIZE = (375, 500)
"""Rows and columns of the images that are made; one in four is upright."""
SMALL = (96, 128)
"""The same for the measurement of memory, which is about the number of images."""
DECODERS = ("pillow", "fast")
Times = tuple[float, float]
"""Seconds of the wall's clock, and of CPU."""


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return noise with the spectrum f ** -power of the frequency f, stronger in brightness than in colour."""
    rng = np.random.default_rng(seed)
    h, w = size if seed % 4 else size[::-1]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w))
    frequency[0, 0] = np.inf

    def field(power: float) -> Any:
        x = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(h, w))) * frequency**-power, s=(h, w))
        return x / x.std()

    y, cb, cr = 120 + 55 * field(0.9 + 0.1 * (seed % 5)), 18 * field(1.6), 18 * field(1.6)
    rgb = np.stack([y + 1.402 * cr, y - 0.344 * cb - 0.714 * cr, y + 1.772 * cb], axis=2)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def make_folder(folder: Path, count: int, size: tuple[int, int] = SIZE) -> float:
    """Write ``count`` files in folders of 32; return their mean size in bytes."""
    sizes = []
    for k in range(count):
        path = folder / f"class_{k // 32:03d}" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        out = io.BytesIO()
        picture(k, size).save(out, format="JPEG", quality=90)
        path.write_bytes(out.getvalue())
        sizes.append(len(out.getvalue()))
    return statistics.mean(sizes)


def make_shards(folder: Path, shards: Path) -> None:
    """Make shards with the tool, which keeps the bytes of the files."""
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(folder), str(shards)]
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)


def bare(paths: list[Path], images: int, decoder: str) -> Times:
    """Decode and resize only, with crops that were drawn before."""
    files, pipeline = [path.read_bytes() for path in paths], train_pipeline(image_size=(SIDE, SIDE))
    draws = pipeline.draws(np.arange(images), seed=0, epoch=0)
    boxes = []
    for k in range(images):
        with Image.open(io.BytesIO(files[k % len(files)])) as image:
            boxes.append(pipeline.transforms[0].window((image.height, image.width), draws[k].tolist()).box)  # type: ignore
    begin = clock()
    for k, (left, top, right, bottom) in enumerate(boxes):
        data = files[k % len(files)]
        if decoder == "pillow":
            image = Image.open(io.BytesIO(data)).crop((left, top, right, bottom))
            np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        else:
            part = torch.from_numpy(simplejpeg.decode_jpeg(data)[None, top:bottom, left:right]).permute(0, 3, 1, 2)
            torch.nn.functional.interpolate(part, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return since(begin)


def folder(root: Path, images: int, num_workers: int) -> Times:
    endless = 1000 * images
    batches = folder_batches(root, side=SIDE, batch_size=BATCH, images=endless, num_workers=num_workers)
    return stream(batches, images, num_workers)


def engine(shards: Path, images: int, num_workers: int, decoder: str, floats: bool = False) -> Times:
    pipeline = train_pipeline(image_size=(SIDE, SIDE), decoder=decoder)  # type: ignore[arg-type]
    loader = TrainLoader(
        dataset=ShardDataset(shards), views=[ViewMaker(pipeline=pipeline)], batch_size=BATCH, num_workers=num_workers
    )
    use = (lambda item: normalize(item[1].images, MEAN, STD)) if floats else (lambda item: item)
    return stream(map(use, loader.batches(0)), images, num_workers)


def stream(batches: Iterable[Any], images: int, num_workers: int) -> Times:
    """Return the seconds that a running loader takes for a number of images."""
    iterator = iter(batches)
    for _ in range(1 + 2 * num_workers):  # torch's loaders have two batches of each worker under way
        next(iterator)
    begin = clock()
    for _ in range(images // BATCH):
        next(iterator)
    return since(begin)


def clock() -> Times:
    """Return wall seconds, and CPU seconds of this process and its living children."""
    cpu = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system ticks
    return time.perf_counter(), cpu


def since(begin: Times) -> Times:
    end = clock()
    return end[0] - begin[0], end[1] - begin[1]


def in_process(side: Callable[[], Times], queue: Any) -> None:
    queue.put(side())


def together(side: Callable[[], Times], count: int) -> Times:
    """Return (longest wall, total CPU) seconds of ``count`` processes that do the same in parallel."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=in_process, args=(side, queue)) for _ in range(count)]
    for process in processes:
        process.start()
    times = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return max(t[0] for t in times), sum(t[1] for t in times)


@contextmanager
def bound_to(cores: int) -> Iterator[None]:
    """Run on the first ``count`` cores that this process may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def ratios(rounds: list[dict[str, Times]], side: str, other: str) -> dict[str, list[float]]:
    """Return the speed of a contender relative to another, by wall and CPU time: median, least, most over rounds."""
    found = {}
    for k, clock in enumerate(("wall", "cpu")):
        each = [r[other][k] / r[side][k] for r in rounds]
        found[clock] = [round(v, 3) for v in (statistics.median(each), min(each), max(each))]
    return found


def compare(files: Path, shards: Path, cores: int, images: int, rounds: int) -> dict[str, Any]:
    """Time all contenders in turns on a number of cores."""
    workers = 0 if cores == 1 else cores
    paths = sorted(files.glob("*/*.jpg"))
    sides: dict[str, Callable[[], Times]] = {"folder": partial(folder, files, images, workers)}
    for decoder in DECODERS:
        alone = partial(bare, paths, images // cores, decoder)
        sides[f"bare {decoder}"] = alone if cores == 1 else partial(together, alone, cores)
        for name, floats in (("engine", False), ("floats", True)):
            sides[f"{name} {decoder}"] = partial(engine, shards, images, workers, decoder, floats)
    seen: list[dict[str, Times]] = []
    with bound_to(cores):
        for k in range(rounds + 1):  # the first warms up
            order = list(sides) if k % 2 else list(sides)[::-1]
            times = {name: sides[name]() for name in order}
            seen += [times] if k else []
    result: dict[str, Any] = {"cores": cores, "images_a_round": images, "rounds": rounds, "sides": {}, "ratios": {}}
    for name in sides:
        wall, cpu = (statistics.median(r[name][k] for r in seen) for k in range(2))
        spread = max(r[name][0] for r in seen) / min(r[name][0] for r in seen)
        result["sides"][name] = {
            "images_per_second": round(images / wall, 1),
            "cpu_ms_per_image": round(1000 * cpu / images, 3),
            "slowest_round_over_fastest": round(spread, 2),
        }
    for decoder in DECODERS:
        for name, other in (
            (f"engine {decoder}", f"bare {decoder}"),
            (f"engine {decoder}", "folder"),
            (f"floats {decoder}", "folder"),
        ):
            result["ratios"][f"{name} / {other}"] = ratios(seen, name, other)
    return result


def memory(shards: Path, images: int, decoder: str) -> dict[str, Any]:
    """Return the private memory of a loader worker (no files, nothing shared) in MB, at ten times in a long run."""
    pipeline = train_pipeline(image_size=SMALL, decoder=decoder)  # type: ignore[arg-type]
    loader = TrainLoader(
        dataset=ShardDataset(shards), views=[ViewMaker(pipeline=pipeline)], batch_size=BATCH, num_workers=1
    )
    steps, places = images // BATCH, []
    for step, _ in islice(loader.batches(0), steps + 1):
        if step and step % (steps // 10) == 0:
            (worker,) = multiprocessing.active_children()
            status = Path(f"/proc/{worker.pid}/status").read_text()
            kilobytes = int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
            places.append({"images": step * BATCH, "mb": round(kilobytes / 1024, 1)})
            print(f"{decoder:8s}{step * BATCH:8,} images: {kilobytes / 1024:.1f} MB", flush=True)
    return {"decoder": decoder, "images": images, "image_size": list(SMALL), "worker": places}


def main(argv: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--files", type=int, default=256, help="distinct images that are made")
    parser.add_argument("--images", type=int, default=512, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", type=int, metavar="IMAGES", help="measure memory over so many images instead")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_data.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine = f"cpu_{platform.machine()}"
    kind = "data_memory" if args.memory else "data"
    name = f"{machine}_torch{torch.__version__.split('+')[0]}_{kind}.json"
    output = args.output or Path(__file__).parent / "results" / name
    if args.images % (BATCH * max(args.cores)):
        parser.error(f"--images (={args.images}) must be a multiple of {BATCH * max(args.cores)}")
    with tempfile.TemporaryDirectory() as temporary:
        files, shards = Path(temporary) / "files", Path(temporary) / "shards"
        sides = SMALL if args.memory else SIZE
        size = make_folder(files, args.files, sides)
        make_shards(files, shards)
        report = {
            "machine": machine,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
            "images": {"size": list(sides), "distinct": args.files, "mean_bytes": round(size)},
            "batch_size": BATCH,
        }
        if args.memory:
            report["results"] = [memory(shards, args.memory, decoder) for decoder in DECODERS]
        else:
            report["results"] = []
            for cores in args.cores:
                load = os.getloadavg()[0]
                found = compare(files, shards, cores, args.images, args.rounds) | {"load_before": round(load, 1)}
                report["results"].append(found)
                show(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")


def show(found: dict[str, Any]) -> None:
    print(f"{found['cores']} core(s), load before {found['load_before']}")
    for name, side in found["sides"].items():
        print(
            f"  {name:14s}{side['images_per_second']:9.1f} images/s {side['cpu_ms_per_image']:8.3f} ms of CPU each, "
            f"slowest round over fastest {side['slowest_round_over_fastest']}"
        )
    for name, each in found["ratios"].items():
        wall, cpu = (f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (each["wall"], each["cpu"]))
        print(f"  {name:32s} CPU {cpu}, wall {wall}", flush=True)


if __name__ == "__main__":
    main()
