"""Time the masks of a batch, for every registered masker and the released multi-block masks.

Each is compared with a plain loop over the images (below) that draws the same kind of masks block by block with
Python's random generator and packs them the same way. Before timing, their contexts are checked to have the same mean
length. Times are the CPU time of one thread, the best of the repeats, so that other programs have little influence.

    python benchmarks/bench_masks.py
    python benchmarks/bench_masks.py --batch-sizes 128 --grids 14x14
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from jepa_kit.maskers import RELEASED
from jepa_kit.registry import MASKERS
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import Grid, MaskBatch, PatchSets

Patches = set[int]
Masks = tuple[Patches, list[Patches]]
"""Context and targets of one image."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MASKERS.names()}
CASES["multiblock, released"] = ("multiblock", RELEASED)


# --- the plain loop ---


def block_size(grid: Grid, scale: float, ratio: float, released: bool) -> tuple[int, int]:
    """Return (height, width); see jepa_kit/maskers/blocks.py."""
    rows, columns = grid
    area = int(rows * columns * scale) if released else rows * columns * scale
    height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if released:
        return min(round(height), rows - 1), min(round(width), columns - 1)
    height, width = max(height, area / columns), max(width, area / rows)
    return min(round(height), rows), min(round(width), columns)


def place(grid: Grid, size: tuple[int, int], released: bool) -> Patches:
    rows, columns = grid
    top = random.randrange(rows - size[0] + (not released))
    left = random.randrange(columns - size[1] + (not released))
    return {r * columns + c for r in range(top, top + size[0]) for c in range(left, left + size[1])}


def multiblock(grid: Grid, sizes: list[tuple[int, int]] | None = None) -> Masks:
    """Draw multi-block masks; ``sizes`` are those of the targets and the context, as released."""
    released = sizes is not None
    if sizes is None:
        draws = [(random.uniform(0.15, 0.2), random.uniform(0.75, 1.5)) for _ in range(4)]
        sizes = [block_size(grid, *draw, False) for draw in [*draws, (random.uniform(0.85, 1), 1.0)]]
    while True:
        *targets, context = (place(grid, size, released) for size in sizes)
        context.difference_update(*targets)
        if len(context) >= 4:
            return context, targets


def block(grid: Grid) -> Masks:
    target = place(grid, block_size(grid, 0.6, random.uniform(0.75, 1.5), False), False)
    return set(range(grid[0] * grid[1])) - target, [target]


def one_by_one(grid: Grid) -> Masks:
    patches = range(grid[0] * grid[1])
    target = set(random.sample(patches, round(0.6 * len(patches))))
    return set(patches) - target, [target]


def rasterized(grid: Grid) -> Masks:
    quadrants: list[Patches] = [set() for _ in range(4)]
    for r in range(grid[0]):
        for c in range(grid[1]):
            quadrants[2 * (r >= grid[0] // 2) + (c >= grid[1] // 2)].add(r * grid[1] + c)
    return quadrants.pop(random.randrange(4)), quadrants


def released_batch(grid: Grid, images: int) -> list[Masks]:
    u, v = random.random(), random.random()
    sizes = [block_size(grid, 0.15 + 0.05 * u, 0.75 + 0.75 * u, True)] * 4
    sizes.append(block_size(grid, 0.85 + 0.15 * v, 1.0, True))
    masks = [multiblock(grid, sizes) for _ in range(images)]
    shortest = min(len(context) for context, _ in masks)
    return [(set(sorted(context)[:shortest]), targets) for context, targets in masks]


def causal(grid: Grid) -> Masks:
    patches = grid[0] * grid[1]
    length = random.randint(1, patches - 1)
    return set(range(length)), [set(range(length, patches))]


def inverse_block(grid: Grid) -> Masks:
    rows, columns = grid
    patches = rows * columns
    keep = patches - round(0.8 * patches)
    kept: Patches = set()
    for _ in range(int(patches * 0.27 / 9)):
        row, column = random.randrange(rows), random.randrange(columns)
        kept |= {
            r * columns + c
            for r in range(max(row - 1, 0), min(row + 2, rows))
            for c in range(max(column - 1, 0), min(column + 2, columns))
        }
    rest = set(range(patches)) - kept
    if len(kept) > keep:
        kept = set(random.sample(sorted(kept), keep))
    else:
        kept |= set(random.sample(sorted(rest), keep - len(kept)))
    return kept, [set(range(patches)) - kept]


def kept_block(grid: Grid) -> Masks:
    rows, columns = grid
    patches = rows * columns
    keep = patches - round(0.65 * patches)
    root = math.exp(random.uniform(math.log(max(0.5, keep / columns**2)), math.log(min(2, rows**2 / keep))) / 2)
    size = math.ceil(math.sqrt(keep) * root), math.ceil(math.sqrt(keep) / root)
    down, right = random.randrange(rows), random.randrange(columns)
    cells = [divmod(p, columns) for p in sorted(place(grid, size, False))[:keep]]
    kept = {(r + down) % rows * columns + (c + right) % columns for r, c in cells}
    return kept, [set(range(patches)) - kept]


def blockwise(grid: Grid) -> Masks:
    rows, columns = grid
    patches = rows * columns
    quota, least = round(0.4 * patches), 0.08 * patches
    masked: Patches = set()
    while len(masked) < quota:
        missing = quota - len(masked)
        area = random.uniform(least, max(least, missing))
        ratio = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        size = min(max(round(math.sqrt(area * ratio)), 1), rows), min(max(round(math.sqrt(area / ratio)), 1), columns)
        masked |= set(sorted(place(grid, size, False) - masked)[:missing])
    return set(range(patches)) - masked, [masked]


def group(grid: Grid, blocks: int, scale: float) -> Masks:
    patches = set(range(grid[0] * grid[1]))
    sizes = [block_size(grid, scale, random.uniform(0.75, 1.5), False) for _ in range(blocks)]
    while True:
        union = set().union(*(place(grid, size, False) for size in sizes))
        if union != patches:
            return patches - union, [union]


def multigroup(grid: Grid) -> list[Masks]:
    return [group(grid, 8, 0.15), group(grid, 2, 0.7)]


def mixture(grid: Grid) -> Masks:
    return random.choice([multiblock, block])(grid)


LOOPS: dict[str, Callable[[Grid], Any]] = {
    "multiblock": multiblock,
    "block": block,
    "random": one_by_one,
    "rasterized": rasterized,
    "causal": causal,
    "inverse_block": inverse_block,
    "kept_block": kept_block,
    "blockwise": blockwise,
    "multigroup": multigroup,
    "mixture": mixture,
}


def packed(sets: list[tuple[int, Patches]]) -> PatchSets:
    """Pack sets of (image, patches)."""
    lists = [sorted(patches) for _, patches in sets]
    index = torch.tensor([p for patches in lists for p in patches])
    return PatchSets(index, torch.tensor([image for image, _ in sets]), SetLengths([len(x) for x in lists]))


def loop(case: str, grid: Grid, images: int) -> MaskBatch:
    if case == "multiblock, released":
        masks = released_batch(grid, images)
    else:
        masks = [LOOPS[case](grid) for _ in range(images)]
    groups = [(b, m) for b, of in enumerate(masks) for m in (of if isinstance(of, list) else [of])]
    context = packed([(b, context) for b, (context, _) in groups])
    targets = packed([(b, target) for b, (_, targets) in groups for target in targets])
    pair = torch.tensor([s for s, (_, (_, targets)) in enumerate(groups) for _ in targets])
    return MaskBatch(context, targets, grid, pair)


# --- measures ---


def best_time(call: Callable[[], object], seconds: float) -> float:
    """Return the least CPU time of a call in ms, over at least 3 calls and ``seconds`` seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def mean_context(draw: Callable[[int], MaskBatch]) -> float:
    """Return the mean patches of a context over 30 batches of 128 images."""
    contexts = [draw(i).context for i in range(30)]
    return float(np.mean([sets.num_patches / len(sets) for sets in contexts]))


def check(case: str, grid: Grid) -> float:
    """Return the mean context of the masker; raise SystemExit if masker and loop draw different masks."""
    name, options = CASES[case]
    masker = MASKERS.build(name, options, grid=grid)
    ours = mean_context(lambda i: masker(np.arange(128), seed=0, epoch=i, step=i))
    plain = mean_context(lambda i: loop(case, grid, 128))
    if abs(ours - plain) > 0.1 * plain:
        raise SystemExit(f"{case} on {grid}: contexts of {ours:.1f} patches, but {plain:.1f} by the plain loop")
    return ours


def measure(case: str, grid: Grid, images: int, seconds: float) -> dict[str, Any]:
    name, options = CASES[case]
    masker, samples = MASKERS.build(name, options, grid=grid), np.arange(images)
    ms = best_time(lambda: masker(samples, seed=0, epoch=0), seconds)
    loop_ms = best_time(lambda: loop(case, grid, images), seconds)
    return {
        "masker": case,
        "grid": list(grid),
        "images": images,
        "ms": round(ms, 4),
        "plain_loop_ms": round(loop_ms, 4),
        "times_faster": round(loop_ms / ms, 2),
    }


def main(argv: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--grids", nargs="+", default=["14x14", "16x16", "28x28"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each number")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_torchVERSION_masks.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    random.seed(0)
    machine = f"cpu_{platform.machine()}"
    version = torch.__version__.split("+")[0]
    output = args.output or Path(__file__).parent / "results" / f"{machine}_torch{version}_masks.json"
    results = []
    for grid in args.grids:
        rows, columns = (int(side) for side in grid.split("x"))
        for case in CASES:
            context = round(check(case, (rows, columns)), 2)
            for images in args.batch_sizes:
                r = measure(case, (rows, columns), images, args.seconds) | {"mean_context_of_128": context}
                results.append(r)
                print(
                    f"{grid:8s}{case:22s}{images:6d} images {r['ms']:9.3f} ms, plain loop {r['plain_loop_ms']:9.1f} ms "
                    f"({r['times_faster']:.0f} times)",
                    flush=True,
                )
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "torch": torch.__version__, "numpy": np.__version__, "results": results}
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
