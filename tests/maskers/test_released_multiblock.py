"""The released masker against numbers of the released code (fixtures/released_mask_statistics.json).

The fixture's batches have block sizes that are known exactly: batch i draws them from a torch generator with seed i.
Given the sizes, images are independent up to the truncation, which ties a batch together. So the whole experiment of
the fixture (24 batches of 128 images, say) is repeated with the same sizes and other places, and each of its numbers
is held against the spread over the repeats: a t-test on one further observation, which needs no assumption about how
the patches of a batch hang together. The level is 1 % for all numbers of a grid and batch size at once (Bonferroni).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from jepa_kit.maskers import RELEASED, MultiBlock

LEVEL = 0.01
REPEATS = 16
RELEASED_STATISTICS = json.loads((Path(__file__).parents[1] / "fixtures/released_mask_statistics.json").read_text())
GRIDS = {name: entry["grid"] for name, entry in RELEASED_STATISTICS.items()}
per_grid = pytest.mark.parametrize("name", GRIDS)


@cache
def released_sizes(side: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """[batches, 2]: heights and widths of (context, target) that the release draws for seeds 0, 1, ..."""
    masker = MultiBlock(grid=(side, side), **RELEASED)
    u = np.empty((2, batches))
    for seed in range(batches):
        generator = torch.Generator().manual_seed(seed)
        for i in range(2):  # targets first
            u[i, seed] = torch.rand(1, generator=generator).item()
    target, context = masker.target_shape.size(u[0], u[0]), masker.context_shape.size(u[1], u[1])
    return np.stack([context[0], target[0]], axis=1), np.stack([context[1], target[1]], axis=1)


@per_grid
def test_block_sizes_are_the_released_ones(name: str) -> None:
    golden = np.array(RELEASED_STATISTICS[name]["block_sizes_by_seed"]["sizes"])  # [200, (target, context), (h, w)]
    height, width = released_sizes(GRIDS[name], len(golden))
    assert np.array_equal(np.stack([height, width], axis=-1)[:, ::-1], golden)


def experiment(side: int, images: int, batches: int, repeat: int, **changes: Any) -> dict[str, np.ndarray]:
    """The fixture's numbers, from masks with its sizes and with places of our own."""
    options = {**RELEASED, **changes}
    released = MultiBlock(grid=(side, side), **options)
    whole = MultiBlock(grid=(side, side), **{**options, "truncation": "none"})
    heights, widths = released_sizes(side, batches)
    patches = side * side
    context, target = np.zeros(patches), np.zeros(patches)
    before = after = 0
    # Truncation does nothing to a batch of one image: all of them go as one batch, each with its own sizes.
    alone = images == 1
    rounds = [slice(None)] if alone else [slice(i, i + 1) for i in range(batches)]
    width = batches if alone else images
    for i, batch in enumerate(rounds):
        samples = np.arange(i * width, (i + 1) * width)
        sizes = (np.broadcast_to(np.repeat(x[batch].T, (1, 4), axis=0), (5, width)) for x in (heights, widths))
        place = released.place(samples, *sizes, seed=1, epoch=repeat)
        masks = whole.cut(samples, place, seed=1, epoch=repeat)
        before += masks.context.num_patches
        if not alone:
            masks = released.cut(samples, place, seed=1, epoch=repeat)
        after += masks.context.num_patches
        context += np.bincount(masks.context.index.numpy(), minlength=patches)
        target += np.bincount(masks.targets.index.numpy(), minlength=patches)
    total = images * batches
    context, target = context.reshape(side, side) / total, target.reshape(side, side) / (4 * total)
    return {
        "mean_context_patches_before_truncation": np.array([before / total]),
        "mean_context_patches_after_truncation": np.array([after / total]),
        "mean_target_patches": np.array([target.sum()]),
        "context_probability_by_row": context.mean(1),
        "context_probability_by_column": context.mean(0),
        "target_cover_by_row": target.mean(1),
        "target_cover_by_column": target.mean(0),
    }


def deviations(name: str, images: int, **changes: Any) -> tuple[np.ndarray, float]:
    """t of each number of the fixture, and the bound that none passes at the level; inf where ours never varies."""
    golden = RELEASED_STATISTICS[name]["batches"][f"images_per_batch_{images}"]
    runs = [experiment(GRIDS[name], images, golden["num_batches"], r, **changes) for r in range(REPEATS)]
    ours = np.concatenate([np.stack([run[key] for run in runs], axis=1) for key in runs[0]])  # [numbers, REPEATS]
    theirs = np.concatenate([np.atleast_1d(golden[key]) for key in runs[0]])
    # The fixture has 4 digits behind the point where it has a list: the error of rounding is added to the spread.
    spread = np.sqrt(ours.var(axis=1, ddof=1) * (1 + 1 / REPEATS) + 1e-8 / 12)
    difference = np.abs(theirs - ours.mean(axis=1))
    constant = np.ptp(ours, axis=1) < 1e-9
    t = np.where(constant, np.where(difference < 1e-6, 0.0, np.inf), difference / spread)
    return t, float(stats.t.isf(LEVEL / 2 / (~constant).sum(), REPEATS - 1))


@per_grid
@pytest.mark.parametrize("images", [1, 16, 128])
def test_statistics_are_the_released_ones(name: str, images: int) -> None:
    t, bound = deviations(name, images)
    assert t.max() < bound
    # Not one of the numbers is off, and neither are all of them a little: half lie within the middle half.
    varying = t[t > 0]
    assert 0.2 < (varying < stats.t.isf(0.25, REPEATS - 1)).mean() < 0.8


@per_grid
def test_the_last_row_and_column_are_dead(name: str) -> None:
    side = GRIDS[name]
    run = experiment(side, 16, 20, 0)
    for key in ("context_probability_by_row", "context_probability_by_column", "target_cover_by_row"):
        assert run[key][-1] == 0
        assert (run[key][:-1] > 0).all()


@pytest.mark.parametrize(
    ("images", "changes"), [(1, {"edges": "inclusive"}), (128, {"truncation": "random"}), (16, {"truncation": "none"})]
)
def test_each_correction_is_seen_by_the_same_test(images: int, changes: dict[str, str]) -> None:
    t, bound = deviations("224px_patch16", images, **changes)
    assert t.max() > 2 * bound


def test_sets_of_a_batch_are_of_one_length() -> None:
    masks = MultiBlock(grid=(14, 14), **RELEASED)(np.arange(32), seed=0, epoch=0, step=3)
    assert masks.context.uniform
    assert masks.targets.uniform


def test_the_whole_masker_truncates_as_released() -> None:
    """Sizes drawn by the masker itself: the mean context of 128 images, over 150 steps."""
    masker = MultiBlock(grid=(14, 14), **RELEASED)
    lengths = [masker(np.arange(128), seed=0, epoch=e, step=e).context.num_patches / 128 for e in range(150)]
    golden = RELEASED_STATISTICS["224px_patch16"]["batches"]["images_per_batch_128"]
    # The fixture's mean is over 24 batches.
    error = np.std(lengths) * np.sqrt(1 / 24 + 1 / 150)
    z = (np.mean(lengths) - golden["mean_context_patches_after_truncation"]) / error
    assert abs(z) < stats.norm.isf(LEVEL / 2)
