"""Compare decoders of a JPEG to a random crop of 224 x 224 pixels: CPU time, and difference from Pillow.

    python benchmarks/bench_decoders.py

``pillow`` and ``fast`` are the values of ``data.decoder``; the others are alternatives. ``scaled`` has
libjpeg decode at 1/2, 1/4 or 1/8 (from fewer coefficients) as far as the crop stays at least as large as the result;
``draft`` is the same by Pillow. Differences are in levels of 255. All take turns; times are medians over rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import PIL
import simplejpeg
import torch
from bench_data import SIDE, picture
from numpy.typing import NDArray
from PIL import Image

from jepa_kit.data.transforms import Window, crop_box
from jepa_kit.data.transforms.crops import resample_array

cv2: Any = import_module("cv2") if find_spec("cv2") else None

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
BILINEAR = Image.Resampling.BILINEAR


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pillow(data: bytes, box: Box) -> Pixels:
    return np.asarray(opened(data).crop(box).resize((SIDE, SIDE), BILINEAR))


def reducing_gap(data: bytes, box: Box) -> Pixels:
    return np.asarray(opened(data).crop(box).resize((SIDE, SIDE), BILINEAR, reducing_gap=2.0))


def resize_of_a_box(data: bytes, box: Box) -> Pixels:
    return np.asarray(opened(data).resize((SIDE, SIDE), BILINEAR, box=box))


def pillow_and_torch(data: bytes, box: Box) -> Pixels:
    return resample_array(np.array(opened(data)), Window(box, (SIDE, SIDE)))


def draft(data: bytes, box: Box) -> Pixels:
    image = opened(data)
    width, height = image.size
    image.draft("RGB", (width // reduction(box), height // reduction(box)))
    k = (image.width / width, image.height / height) * 2
    scaled = tuple(v * f for v, f in zip(box, k, strict=True))
    return np.asarray(image.resize((SIDE, SIDE), BILINEAR, box=scaled))  # type: ignore[arg-type]


def simplejpeg_and_pillow(data: bytes, box: Box) -> Pixels:
    left, top, right, bottom = box
    part = Image.fromarray(simplejpeg.decode_jpeg(data)[top:bottom, left:right])
    return np.asarray(part.resize((SIDE, SIDE), BILINEAR))


def fast(data: bytes, box: Box) -> Pixels:
    return resample_array(simplejpeg.decode_jpeg(data), Window(box, (SIDE, SIDE)))


def fast_and_rough(data: bytes, box: Box) -> Pixels:
    return resample_array(simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True), Window(box, (SIDE, SIDE)))


def scaled(data: bytes, box: Box) -> Pixels:
    k = reduction(box)
    if k == 1:
        return fast(data, box)
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // k), min_width=-(-width // k))
    part = tuple(v / k for v in box)
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), BILINEAR, box=part))  # type: ignore[arg-type]


def opencv_area(data: bytes, box: Box) -> Pixels:
    left, top, right, bottom = box
    return cv2.resize(simplejpeg.decode_jpeg(data)[top:bottom, left:right], (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def opencv_linear(data: bytes, box: Box) -> Pixels:
    left, top, right, bottom = box
    return cv2.resize(simplejpeg.decode_jpeg(data)[top:bottom, left:right], (SIDE, SIDE))


def reduction(box: Box) -> int:
    """Return 1, 2, 4 or 8: the largest reduction that leaves a crop at least as large as the result."""
    most = min(box[2] - box[0], box[3] - box[1]) / SIDE
    return max(k for k in (1, 2, 4, 8) if k <= max(most, 1))


WAYS: list[Callable[[bytes, Box], Pixels]] = [
    pillow,
    reducing_gap,
    resize_of_a_box,
    draft,
    pillow_and_torch,
    simplejpeg_and_pillow,
    fast,
    fast_and_rough,
    scaled,
    *([opencv_area, opencv_linear] if cv2 else []),
]


def measure(size: tuple[int, int], count: int, rounds: int) -> list[dict[str, Any]]:
    """Time every decoder on the same crops of images of one size."""
    cases = []
    for k, draws in enumerate(np.random.default_rng(0).random((count, 22)).tolist()):
        image, out = picture(k, size), io.BytesIO()
        image.save(out, format="JPEG", quality=90)
        cases.append(
            (out.getvalue(), crop_box((image.height, image.width), draws, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)))
        )
    exact = [pillow(*case).astype(int) for case in cases]
    times: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            start = time.process_time()
            for case in cases:
                way(*case)
            times[way.__name__].append(1000 * (time.process_time() - start) / count)
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        off = [np.abs(way(*case).astype(int) - e) for case, e in zip(cases, exact, strict=True)]
        ms, mean, most = statistics.median(times[way.__name__]), np.mean([d.mean() for d in off]), max(map(np.max, off))
        print(f"{way.__name__:24s}{size!s:14s}{ms:8.3f} ms, {mean:.3f} mean, {most} most", flush=True)
        row = {"way": way.__name__, "image": list(size), "cpu_ms": round(ms, 3)}
        rows.append(row | {"mean_difference": round(float(mean), 3), "largest_difference": int(most)})
    return rows


def main(argv: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="of 500 x 375; fewer of larger ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_decoders.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if cv2:
        cv2.setNumThreads(1)
    machine = f"cpu_{platform.machine()}"
    name = f"{machine}_torch{torch.__version__.split('+')[0]}_decoders.json"
    output = args.output or Path(__file__).parent / "results" / name
    results = []
    for factor in (1, 2, 4):
        results += measure((375 * factor, 500 * factor), max(args.images // factor**2, 2), args.rounds)
    report = {
        "machine": machine,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "opencv": cv2.__version__ if cv2 else None,
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
