"""Multi-group masking: groups, their contexts, sizes and places."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers import MultiGroup, multigroup
from jepa_kit.maskers.multigroup import RELEASED
from jepa_kit.rng import uniforms

LEVEL = 1e-3
"""Of every statistical test here; the seeds are fixed."""
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures/methods/vjepa2.json").read_text())["numbers"]
ENTRIES = RECORDED["mask_statistics_one_frame"]
"""Statistics of 400 batches of 16 images for each mask configuration and grid."""


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (16, 16), (5, 31), (28, 28)])
def test_two_groups_each_with_the_rest_as_its_context(grid: tuple[int, int]) -> None:
    images = 200
    masks = MultiGroup(grid=grid)(np.arange(images), seed=0, epoch=0)
    assert len(masks.context) == len(masks.targets) == 2 * images
    assert masks.context_of.tolist() == list(range(2 * images))
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(grid[0] * grid[1]))
    lengths = np.array(masks.targets.lengths.on_host).reshape(2, images)
    # V-JEPA, section 3.2: a group's union of blocks covers about 0.7 (8 of 0.15) and above 0.7 (2 of 0.7) of the image.
    assert lengths[0].mean() < lengths[1].mean()
    assert lengths[1].min() >= 0.55 * grid[0] * grid[1]  # 3 x 3 of 16 at 4 x 4, where sides round down


def test_blocks_apart_are_the_union() -> None:
    union = MultiGroup(grid=(14, 14))(np.arange(30), seed=1, epoch=2)
    apart = MultiGroup(grid=(14, 14), predict="blocks")(np.arange(30), seed=1, epoch=2)
    assert [c.tolist() for c in apart.context.split()] == [c.tolist() for c in union.context.split()]
    assert len(apart.targets) == 10 * 30
    whole = union.targets.split()
    for context, target in enumerate(whole):
        parts = [t for t, of in zip(apart.targets.split(), apart.context_of, strict=True) if of == context]
        assert len(parts) == (8 if context < 30 else 2)
        assert set(target.tolist()) == set(np.concatenate(parts).tolist())


@pytest.mark.parametrize("scale", [(0.15, 0.15), (0.2, 0.3)])
def test_sizes_and_places_of_blocks(scale: tuple[float, float]) -> None:
    """Areas and ratios within rounding of what is asked, independent of one another; places uniform."""
    side = 28
    masker = MultiGroup(grid=(side, side), num_targets=(3,), target_scale=(scale,), predict="blocks")
    masks = masker(np.arange(3000), seed=0, epoch=0)
    first, last = (np.array([t[i].item() for t in masks.targets.split()]) for i in (0, -1))
    (top, left), (bottom, right) = np.divmod(first, side), np.divmod(last, side)
    h, w = bottom - top + 1, right - left + 1
    assert np.array_equal(h * w, masks.targets.lengths.on_host)
    for low, high, value, slack in (
        (scale[0] * side**2, scale[1] * side**2, h * w, (h + w) / 2 + 0.25),
        (math.sqrt(0.75), math.sqrt(1.5), np.sqrt(h / w), 0.06),
    ):
        assert (value >= low - slack).all()
        assert (value <= high + slack).all()
    for size, start in ((h, top), (w, left)):
        for length in np.flatnonzero(np.bincount(size) > 1500):
            counts = np.bincount(start[size == length], minlength=side - length + 1)
            assert stats.chisquare(counts).pvalue > LEVEL
    assert abs(np.corrcoef(top[:3000], top[3000:6000])[0, 1]) < 4 / math.sqrt(3000)


def test_a_context_that_would_be_too_small_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redraws keep every context at min_keep; the last placement too, where all blocks lie in one corner."""
    options = {"grid": (14, 14), "num_targets": (2,), "target_scale": ((0.7, 0.7),), "min_keep": 10}
    samples = np.arange(2000)
    before = np.array(MultiGroup(**{**options, "min_keep": 1})(samples, seed=0, epoch=0).context.lengths.on_host)
    assert 50 < (before < 10).sum() < 1000
    after = np.array(MultiGroup(**options)(samples, seed=0, epoch=0).context.lengths.on_host)
    assert after.min() >= 10
    assert np.array_equal(after[before >= 10], before[before >= 10])
    monkeypatch.setattr(multigroup, "ATTEMPTS", 1)
    masks = MultiGroup(**options)(samples, seed=0, epoch=0)
    corners = [bool(corner & {0, 13, 182, 195}) for corner in (set(t.tolist()) for t in masks.targets.split())]
    assert min(masks.context.lengths) >= 10
    assert all(corner for corner, short in zip(corners, before < 10, strict=True) if short)


def test_no_number_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw of every group has an attempt of its own, so that places drawn again do not hang on the first ones."""
    drawn = []

    def record(*args: Any, attempt: int, **options: int) -> Any:
        drawn.append(attempt)
        return uniforms(*args, attempt=attempt, **options)

    monkeypatch.setattr(multigroup, "uniforms", record)
    masker = MultiGroup(grid=(14, 14), num_targets=(2,) * 3, target_scale=((0.7, 0.7),) * 3, min_keep=10)
    masker(np.arange(500), seed=0, epoch=0)
    assert len(drawn) > 9  # each group drew some images again, more than twice
    assert len(set(drawn)) == len(drawn)


# --- as released ---


def released(entry: dict[str, Any], **options: Any) -> MultiGroup:
    """The masker of an entry of the recorded statistics."""
    mask = entry["mask"]
    return MultiGroup(
        grid=tuple(entry["grid"]),
        num_targets=(mask["num_blocks"],),
        target_scale=(tuple(mask["spatial_scale"]),),
        target_aspect_ratio=tuple(mask["aspect_ratio"]),
        **{**RELEASED, **options},
    )


def z_scores(entry: dict[str, Any], **options: Any) -> np.ndarray:
    """|z| of mean lengths of context and target, and of how often each row and column is a target.

    The images of a batch share sizes and lengths, so the spread is that of means over batches.
    """
    masker, images, rows = released(entry, **options), entry["batch_size"], []
    for step in range(entry["batches"]):
        masks = masker(images * step + np.arange(images), seed=0, epoch=0, step=step)
        targets = np.zeros((images, masker.grid[0] * masker.grid[1]), dtype=bool)
        targets[masks.targets.image_of_token, masks.targets.index] = True
        targets = targets.reshape(images, *masker.grid)
        lengths = [sets.lengths.each.mean() for sets in (masks.context, masks.targets)]
        rows.append([*lengths, *targets.mean((0, 2)), *targets.mean((0, 1))])
    ours = np.array(rows)
    theirs = np.concatenate(
        [
            [entry["context_length_mean_min_max"][0], entry["target_length_mean_min_max"][0]],
            entry["share_of_images_in_which_row_is_target"],
            entry["share_in_which_column_is_target"],
        ]
    )
    z: np.ndarray = np.abs(ours.mean(0) - theirs) / (ours.std(0, ddof=1) * math.sqrt(2 / len(ours)))
    return z


def bound(z: np.ndarray) -> float:
    """Largest |z| of all numbers of an entry together (Bonferroni)."""
    return float(stats.norm.isf(0.01 / 2 / len(z)))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['mask']['num_blocks']} at {e['grid'][0]}")
def test_draws_as_released(entry: dict[str, Any]) -> None:
    z = z_scores(entry)
    assert z.max() < bound(z)


@pytest.mark.parametrize(("option", "value"), [("size_per", "block"), ("truncation", "none")])
def test_a_departure_from_the_release_is_seen(option: str, value: str) -> None:
    z = z_scores(ENTRIES[1], **{option: value})
    assert z.max() > 2 * bound(z)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['mask']['num_blocks']} at {e['grid'][0]}")
def test_sizes_are_as_frequent_as_released(entry: dict[str, Any]) -> None:
    """An exact multinomial test of the 20 recorded sizes, by simulation."""
    u = np.linspace(0, 1, 20001)
    height, width = released(entry).shapes[0].size(np.zeros_like(u), u)
    sizes, count = np.unique(np.stack([height, width]), axis=1, return_counts=True)
    p = count / len(u)
    recorded = [np.flatnonzero((size[1:] == sizes.T).all(1)) for size in entry["block_size_t_h_w_of_seeds_0_to_19"]]
    assert all(len(found) == 1 for found in recorded)
    table = stats.multinomial(20, p)
    simulated = table.logpmf(table.rvs(4000, random_state=0))
    assert (simulated <= table.logpmf(np.bincount(np.concatenate(recorded), minlength=len(p))) + 1e-9).mean() > LEVEL


def test_a_batch_shares_sizes_and_lengths() -> None:
    """One size for all blocks of a group and step; truncated sets are the beginnings of the others."""
    options = {"grid": (28, 28), "num_targets": (3, 1), "target_scale": ((0.05, 0.2),) * 2, "size_per": "batch"}
    blocks = MultiGroup(**options, predict="blocks")
    sizes = [
        np.array(blocks(np.arange(40), seed=0, epoch=0, step=step).targets.lengths.on_host).reshape(4, 40)
        for step in range(3)
    ]
    assert all(len(set(x[:3].flatten())) == len(set(x[3])) == 1 for x in sizes)
    assert len({int(x[0, 0]) for x in sizes}) > 1
    assert any(x[0, 0] != x[3, 0] for x in sizes)
    masker = MultiGroup(**options, truncation="released")
    whole, cut = (draw(np.arange(40), seed=0, epoch=0, step=1) for draw in (masker.before_truncation, masker))
    for name in ("context", "targets"):
        before, after = getattr(whole, name).split(), getattr(cut, name).split()
        for group in (slice(40), slice(40, 80)):
            least = min(len(x) for x in before[group])
            assert [x.tolist() for x in after[group]] == [x[:least].tolist() for x in before[group]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_per": "image"}, "size_per (='image') must be one of 'block', 'batch'"),
        ({"truncation": "random"}, "truncation (='random') must be one of 'none', 'released'"),
        ({"grid": (3, 6)}, "grid (=(3, 6)) must be (rows, columns) with at least 4 of each"),
        ({"min_keep": 0}, "min_keep (=0) must be at least 1"),
        ({"predict": "all"}, "predict (='all') must be one of 'union', 'blocks'"),
        (
            {"num_targets": (8,)},
            "num_targets (=(8,)) and target_scale (=((0.15, 0.15), (0.7, 0.7))) must have an entry for each group",
        ),
        (
            {"num_targets": (), "target_scale": ()},
            "num_targets (=()) and target_scale (=()) must have an entry for each group",
        ),
        ({"num_targets": (8, 0)}, "num_targets[1] (=0) must be at least 1"),
        (
            {"target_scale": ((0.15, 0.15), (0.7, 1.7))},
            "target_scale[1] (=(0.7, 1.7)) must be (low, high) with 0 < low <= high <= 1",
        ),
        (
            {"target_aspect_ratio": (2, 1)},
            "target_aspect_ratio (=(2, 1)) must be (low, high), height over width, with 0 < low <= high",
        ),
        (
            {"target_scale": ((0.15, 0.15), (0.7, 1.0))},
            "min_keep (=1) must be at most 0 on a grid of 14 x 14: the largest blocks of target_scale[1] (=(0.7, 1.0)) "
            "may leave no more; or reduce it",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        MultiGroup(**{"grid": (14, 14), **options})
    assert str(error.value) == message
