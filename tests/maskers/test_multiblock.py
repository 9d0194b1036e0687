"""Multi-block masking: the corrected masker against what it should be, and each option by itself."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jepa_kit.maskers import RELEASED, MultiBlock, multiblock
from jepa_kit.rng import Stream, uniforms
from jepa_kit.structures import MaskBatch, PatchSets

LEVEL = 1e-3
"""Of every statistical test here; the seeds are fixed."""


def tables(sets: PatchSets, grid: tuple[int, int]) -> np.ndarray:
    """[S, H, W] booleans."""
    table = np.zeros((len(sets), grid[0] * grid[1]), dtype=bool)
    table[sets.lengths.set_of_token.numpy(), sets.index.numpy()] = True
    return table.reshape(-1, *grid)


def lengths(sets: PatchSets) -> list[int]:
    return list(sets.lengths)


def same(a: MaskBatch, b: MaskBatch) -> bool:
    return all(
        torch.equal(x.index, y.index) and x.lengths == y.lengths
        for x, y in ((a.context, b.context), (a.targets, b.targets))
    )


def boxes(table: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of each table [S, H, W], which must hold one filled rectangle."""
    found = []
    for cells in table:
        rows, columns = np.flatnonzero(cells.any(1)), np.flatnonzero(cells.any(0))
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert cells.sum() == h * w
        found.append((rows[0], columns[0], h, w))
    return found


# The corrected masker


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (14, 14), (16, 16), (28, 28), (8, 32)])
def test_every_patch_of_the_last_row_and_column_is_used(grid: tuple[int, int]) -> None:
    masks = MultiBlock(grid=grid)(np.arange(1500), seed=0, epoch=0)
    for sets in (masks.context, masks.targets):
        used = tables(sets, grid).sum(0)
        assert used.min() > 0
        # By symmetry the last row is used as often as the first. Its patches come together, at most a whole side.
        for ends in ((used[0].sum(), used[-1].sum()), (used[:, 0].sum(), used[:, -1].sum())):
            assert abs(ends[0] - ends[1]) < 4 * math.sqrt(sum(ends) * max(grid))


@pytest.mark.parametrize("grid", [(14, 14), (9, 20)])
def test_corners_are_uniform(grid: tuple[int, int]) -> None:
    masker = MultiBlock(grid=grid)
    samples = np.arange(8000)
    place = masker.place(samples, *masker.sizes(samples, seed=3, epoch=0), seed=3, epoch=0)
    assert (place.attempts == 1).all()
    for blocks in (place.targets, place.contexts):
        statistic, freedom = 0.0, 0
        flat = [x.ravel() for x in (blocks.top, blocks.left, blocks.height, blocks.width)]
        for h, w in set(zip(flat[2].tolist(), flat[3].tolist(), strict=True)):
            at = (flat[2] == h) & (flat[3] == w)
            places = (grid[0] - h + 1, grid[1] - w + 1)
            cells = math.prod(places)
            if at.sum() < 5 * cells:
                continue
            counts = np.bincount(np.ravel_multi_index((flat[0][at], flat[1][at]), places), minlength=cells)
            statistic += stats.chisquare(counts).statistic if cells > 1 else 0.0
            freedom += cells - 1
        assert freedom > 0
        assert stats.chi2.sf(statistic, freedom) > LEVEL


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (10, 24)])
@pytest.mark.parametrize("coupled", [False, True])
def test_sizes_have_the_probabilities_of_the_formula(grid: tuple[int, int], coupled: bool) -> None:
    """Target sizes against the formula in plain Python on a fine mesh of the two uniform numbers."""
    mesh = [(i + 0.5) / 300 for i in range(300)]
    pairs = (
        [(u, u) for u in ((i + 0.5) / 90_000 for i in range(90_000))]
        if coupled
        else [(u, v) for u in mesh for v in mesh]
    )
    expected: Counter[tuple[int, int]] = Counter()
    for u, v in pairs:
        area, ratio = math.prod(grid) * (0.15 + 0.05 * u), 0.75 + 0.75 * v
        expected[round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))] += 1 / len(pairs)
    masker = MultiBlock(grid=grid, coupled_scale_and_aspect=coupled)
    h, w = masker.sizes(np.arange(4000), seed=1, epoch=2)
    drawn = Counter(zip(h[1:].ravel().tolist(), w[1:].ravel().tolist(), strict=True))
    common = [size for size in expected if expected[size] * 16_000 > 10]
    rare = 16_000 - sum(drawn[size] for size in common)
    share = 1 - sum(expected[size] for size in common)
    assert set(drawn) <= set(expected)
    got, wanted = [drawn[s] for s in common], [16_000 * expected[s] for s in common]
    if share > 5e-4:
        got, wanted = [*got, rare], [*wanted, 16_000 * share]
    wanted = np.array(wanted) * sum(got) / sum(wanted)  # the mesh leaves 1e-5 of the total
    assert stats.chisquare(got, wanted).pvalue > LEVEL


@pytest.mark.parametrize("coupled", [False, True])
def test_each_block_takes_its_scale_then_its_aspect_ratio_from_the_stream(coupled: bool) -> None:
    """Number by number: masks of a run stay what they were."""
    grid, samples = (12, 20), np.arange(7)
    masker = MultiBlock(grid=grid, num_contexts=2, context_aspect_ratio=(0.5, 2.0), coupled_scale_and_aspect=coupled)
    height, width = masker.sizes(samples, seed=5, epoch=6)
    numbers = uniforms(Stream.MASK_SIZE, samples, 12, seed=5, epoch=6)
    for k in range(6):
        (low, high), (flat, tall) = ((0.85, 1.0), (0.5, 2.0)) if k < 2 else ((0.15, 0.2), (0.75, 1.5))
        for b in samples:
            u, v = numbers[b, 2 * k], numbers[b, 2 * k + (not coupled)]
            area, ratio = 240 * (low + u * (high - low)), flat + v * (tall - flat)
            h, w = math.sqrt(area * ratio), math.sqrt(area / ratio)
            expected = min(round(max(h, area / 20)), 12), min(round(max(w, area / 12)), 20)
            assert (height[k, b], width[k, b]) == expected


def test_blocks_of_an_image_are_independent() -> None:
    h, w = MultiBlock(grid=(28, 28)).sizes(np.arange(3000), seed=0, epoch=0)
    area = h * w
    for i in range(5):
        for j in range(i):
            assert stats.spearmanr(area[i], area[j]).pvalue > LEVEL


def test_a_context_fills_a_long_grid() -> None:
    """A square of 0.85 of 4 x 32 would be 10 patches high: the area stays, and the context is 4 x 27 to 4 x 32."""
    h, w = MultiBlock(grid=(4, 32)).sizes(np.arange(500), seed=0, epoch=0)
    assert set(h[0]) == {4}
    assert set(w[0]) == {27, 28, 29, 30, 31, 32}


# Contexts and targets


def test_context_is_its_block_without_the_targets() -> None:
    grid, samples = (14, 14), np.arange(50)
    masker = MultiBlock(grid=grid, num_contexts=2, num_targets=3)
    place = masker.place(samples, *masker.sizes(samples, seed=0, epoch=0), seed=0, epoch=0)
    masks = masker(samples, seed=0, epoch=0)
    context, targets = tables(masks.context, grid), tables(masks.targets, grid)
    for b in range(50):
        image = []
        for m in range(3):
            t = place.targets
            image.append(np.zeros(grid, dtype=bool))
            image[-1][t.top[m, b] :, t.left[m, b] :][: t.height[m, b], : t.width[m, b]] = True
            for c in range(2):
                at = (m * 2 + c) * 50 + b
                assert np.array_equal(targets[at], image[-1])
                assert (masks.targets.image[at], masks.context_of[at]) == (b, c * 50 + b)
        for c in range(2):
            block = np.zeros(grid, dtype=bool)
            x = place.contexts
            block[x.top[c, b] :, x.left[c, b] :][: x.height[c, b], : x.width[c, b]] = True
            assert np.array_equal(context[c * 50 + b], block & ~np.any(image, axis=0))


def test_overlap_leaves_the_targets_in_the_context() -> None:
    grid, samples = (14, 14), np.arange(60)
    apart = MultiBlock(grid=grid)(samples, seed=0, epoch=0)
    over = MultiBlock(grid=grid, allow_overlap=True)(samples, seed=0, epoch=0)
    assert torch.equal(apart.targets.index, over.targets.index)
    blocks = tables(over.context, grid)
    boxes(blocks)
    union = tables(over.targets, grid).reshape(4, 60, *grid).any(0)
    assert np.array_equal(tables(apart.context, grid), blocks & ~union)


def test_more_targets_leave_the_first_ones_as_they_are() -> None:
    two, four = (MultiBlock(grid=(14, 14), num_targets=n)(np.arange(9), seed=0, epoch=0) for n in (2, 4))
    assert torch.equal(four.targets.index[: two.targets.num_patches], two.targets.index)


# Sizes shared


def test_size_per() -> None:
    grid, samples = (28, 28), np.arange(40)

    def sizes(size_per: multiblock.SizePer, **where: int) -> np.ndarray:
        masker = MultiBlock(grid=grid, size_per=size_per, num_contexts=2, context_aspect_ratio=(0.75, 1.5))
        return np.stack(masker.sizes(samples, **{"seed": 0, "epoch": 0, "step": 0, **where}), axis=-1)  # [6, 40, 2]

    block, image, batch = sizes("block"), sizes("image"), sizes("batch")
    assert all(x.shape == (6, 40, 2) for x in (block, image, batch))
    assert (block[2] != block[3]).any(-1).mean() > 0.5
    assert (block[0] != block[1]).any(-1).mean() > 0.5
    for shared in (image, batch):
        assert (shared[0] == shared[1]).all()
        assert (shared[2:] == shared[2]).all()
    assert len(np.unique(image[2], axis=0)) > 5
    assert (batch == batch[:, :1]).all()
    # A batch's size is a function of (seed, step) alone, the others of (seed, epoch, sample).
    assert np.array_equal(sizes("batch", epoch=1), batch)
    shared = MultiBlock(grid=grid, size_per="batch")
    assert same(shared.before_truncation(samples, seed=0, epoch=0), shared(samples, seed=0, epoch=0, step=0))
    assert not same(shared.before_truncation(samples, seed=0, epoch=0, step=1), shared(samples, seed=0, epoch=0))
    assert len({tuple(sizes("batch", step=step)[2, 0]) for step in range(20)}) > 5
    assert len({tuple(sizes("batch", seed=seed)[2, 0]) for seed in range(20)}) > 5
    assert np.array_equal(sizes("image", step=5), image)
    assert np.array_equal(sizes("block", step=5), block)
    assert not np.array_equal(sizes("image", epoch=1), image)


# Truncation


@pytest.mark.parametrize("num_contexts", [1, 2])
def test_released_truncation_keeps_the_first_patches(num_contexts: int) -> None:
    samples = np.arange(16)
    whole = MultiBlock(grid=(14, 14), num_contexts=num_contexts)(samples, seed=0, epoch=0)
    cut = MultiBlock(grid=(14, 14), num_contexts=num_contexts, truncation="released")(samples, seed=0, epoch=0)
    shortest = min(lengths(whole.context))
    assert lengths(cut.context) == [shortest] * 16 * num_contexts
    for a, b in zip(cut.context.split(), whole.context.split(), strict=True):
        assert torch.equal(a, b[:shortest])
    assert torch.equal(cut.targets.index, whole.targets.index)


def test_random_truncation_keeps_as_many_anywhere() -> None:
    grid, samples = (14, 14), np.arange(2000)
    whole = MultiBlock(grid=grid)(samples, seed=0, epoch=0)
    cut = MultiBlock(grid=grid, truncation="random")(samples, seed=0, epoch=0)
    shortest = min(lengths(whole.context))
    assert lengths(cut.context) == [shortest] * 2000
    before, after = tables(whole.context, grid), tables(cut.context, grid)
    assert not (after & ~before).any()
    assert torch.equal(cut.targets.index, whole.targets.index)
    # Given the context, every patch of it stays with probability shortest / length: rows summed over images.
    keep = shortest / before.sum((1, 2))
    rows = before.sum(2)  # [2000, 14]
    expected = (rows * keep[:, None]).sum(0)
    length = before.sum((1, 2))[:, None]
    variance = (rows * (keep * (1 - keep))[:, None] * (length - rows) / (length - 1)).sum(0)  # hypergeometric
    z = (after.sum((0, 2)) - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 4


def test_fixed_truncation_gives_static_shapes_whatever_the_batch() -> None:
    masker = MultiBlock(grid=(14, 14), truncation="fixed", context_length=50, target_length=20)
    samples = np.arange(600)
    masks = masker(samples, seed=0, epoch=0)
    assert set(lengths(masks.context)) == {50}
    assert set(lengths(masks.targets)) == {20}
    alone = [masker(samples[b : b + 1], seed=0, epoch=0) for b in range(20)]
    assert all(torch.equal(masks.context.split()[b], alone[b].context.index) for b in range(20))
    # The sets are drawn out of the masks that nothing cuts, where those need no redraw.
    whole = MultiBlock(grid=(14, 14), min_keep=50)(samples, seed=0, epoch=0)
    for kept, all_of in ((masks.context, whole.context), (masks.targets, whole.targets)):
        assert not (tables(kept, (14, 14)) & ~tables(all_of, (14, 14))).any()
    untouched = MultiBlock(grid=(14, 14), truncation="fixed", context_length=50)(samples, seed=0, epoch=0)
    assert torch.equal(untouched.targets.index, whole.targets.index)


# Redraws


def test_redraws_leave_enough_and_touch_no_other_image() -> None:
    samples = np.arange(3000)
    easy, hard = MultiBlock(grid=(4, 4), min_keep=1), MultiBlock(grid=(4, 4), min_keep=8)
    sizes = easy.sizes(samples, seed=0, epoch=0)
    first, place = (m.place(samples, *sizes, seed=0, epoch=0) for m in (easy, hard))
    good = place.attempts == 1
    assert 0.3 < good.mean() < 0.6
    assert place.attempts.max() == multiblock.ATTEMPTS + 1
    assert np.array_equal(place.targets.top[:, good], first.targets.top[:, good])
    assert np.array_equal(place.targets.left[:, good], first.targets.left[:, good])
    context = lengths(hard.cut(samples, place, seed=0, epoch=0).context)
    assert min(context) >= 8
    before = np.array(lengths(easy.cut(samples, first, seed=0, epoch=0).context))
    once = first.attempts == 1
    assert np.array_equal(good[once], before[once] >= 8)


def test_the_last_resort_uses_all_four_corners() -> None:
    samples = np.arange(4000)
    masker = MultiBlock(grid=(8, 8), context_scale=(0.5, 0.5), num_targets=6, min_keep=28)
    place = masker.place(samples, *masker.sizes(samples, seed=0, epoch=0), seed=0, epoch=0)
    last = place.attempts == multiblock.ATTEMPTS + 1
    assert last.sum() > 100
    context, targets = place.contexts, place.targets
    tops, lefts = context.top[0, last] == 0, context.left[0, last] == 0
    assert stats.chisquare(np.bincount(2 * tops + lefts)).pvalue > LEVEL
    for start, end, near in (
        (targets.top, targets.top + targets.height, tops),
        (targets.left, targets.left + targets.width, lefts),
    ):
        assert ((end[:, last] == 8) == near).all()
        assert ((start[:, last] == 0) == ~near).all()


pairs = st.tuples(st.floats(0.07, 1), st.floats(0.07, 1)).map(lambda r: (min(r), max(r)))
ratios = st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(lambda r: (min(r), max(r)))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(4, 20),
    columns=st.integers(4, 20),
    seed=st.integers(0, 2**63 - 1),
    attempts=st.sampled_from([1, 3]),
    options=st.fixed_dictionaries(
        {
            "num_targets": st.integers(1, 5),
            "num_contexts": st.integers(1, 3),
            "target_scale": pairs,
            "target_aspect_ratio": ratios,
            "context_scale": pairs,
            "context_aspect_ratio": ratios,
            "min_keep": st.integers(1, 30),
            "allow_overlap": st.booleans(),
            "edges": st.sampled_from(["inclusive", "released"]),
            "coupled_scale_and_aspect": st.booleans(),
            "size_per": st.sampled_from(["block", "image", "batch"]),
            "truncation": st.sampled_from(["none", "released", "random", "fixed"]),
        }
    ),
)
def test_what_can_be_made_keeps_its_word(rows: int, columns: int, seed: int, attempts: int, options: dict) -> None:
    """Any options either raise at construction or give, for every image, what they promise (redraws cut short)."""
    fixed = options["truncation"] == "fixed"
    options |= {"context_length": options["min_keep"] + 3, "target_length": 1} if fixed else {}
    grid = (rows, columns)
    try:
        masker = MultiBlock(grid=grid, **options)
    except ValueError as error:
        assert "must be at most" in str(error)  # noqa: PT017
        return
    kept = multiblock.ATTEMPTS
    multiblock.ATTEMPTS = attempts
    try:
        masks = masker(np.arange(12), seed=seed, epoch=0)
    finally:
        multiblock.ATTEMPTS = kept
    context, targets = tables(masks.context, grid), tables(masks.targets, grid)
    assert context.sum((1, 2)).min() >= (options["context_length"] if fixed else options["min_keep"])
    if not options["allow_overlap"]:
        assert not (context[masks.context_of.numpy()] & targets).any()
    if options["truncation"] != "none":
        assert masks.context.uniform
    if options["edges"] == "released":
        for sets in (context, targets):
            assert not sets[:, -1].any()
            assert not sets[:, :, -1].any()


# Errors

IMPOSSIBLE = [
    ({"grid": (3, 9)}, "grid (=(3, 9)) must be (rows, columns) with at least 4 of each"),
    ({"num_targets": 0}, "num_targets (=0) must be at least 1"),
    ({"num_contexts": -1}, "num_contexts (=-1) must be at least 1"),
    ({"min_keep": 0}, "min_keep (=0) must be at least 1"),
    ({"min_keep_target": 0}, "min_keep_target (=0) must be at least 1"),
    ({"target_scale": (0.2, 0.1)}, "target_scale (=(0.2, 0.1)) must be (low, high) with 0 < low <= high <= 1"),
    ({"context_scale": (0.5, 2)}, "context_scale (=(0.5, 2)) must be (low, high) with 0 < low <= high <= 1"),
    (
        {"target_aspect_ratio": (0, 1)},
        "target_aspect_ratio (=(0, 1)) must be (low, high), height over width, with 0 < low <= high",
    ),
    (
        {"context_aspect_ratio": (2, 1)},
        "context_aspect_ratio (=(2, 1)) must be (low, high), height over width, with 0 < low <= high",
    ),
    ({"edges": "open"}, "edges (='open') must be one of 'inclusive', 'released'"),
    ({"size_per": "step"}, "size_per (='step') must be one of 'block', 'image', 'batch'"),
    ({"truncation": "cut"}, "truncation (='cut') must be one of 'none', 'released', 'random', 'fixed'"),
    (
        {"truncation": "fixed"},
        "context_length (=None) must be a number of patches for truncation='fixed'",
    ),
    ({"truncation": "fixed", "context_length": 0}, "context_length (=0) must be at least 1"),
    ({"truncation": "fixed", "context_length": 9, "target_length": 0}, "target_length (=0) must be at least 1"),
    ({"context_length": 50}, "context_length (=50) is only for truncation='fixed', not 'none'; leave it out"),
    (
        {"target_length": 9, "truncation": "random"},
        "target_length (=9) is only for truncation='fixed', not 'random'; leave it out",
    ),
    (
        {"min_keep_target": 29, "edges": "released"},
        "min_keep_target (=29) must be at most 24: on a grid of 14 x 14, target_scale (=(0.15, 0.2)) "
        "can draw a block of 6 x 4 patches",
    ),
    (
        {"truncation": "fixed", "context_length": 9, "target_length": 26},
        "target_length (=26) must be at most 25: on a grid of 14 x 14, target_scale (=(0.15, 0.2)) "
        "can draw a block of 5 x 5 patches",
    ),
    (
        {"min_keep": 131},
        "min_keep (=131) must be at most 130 on a grid of 14 x 14: a context block of 13 x 13 patches, the smallest "
        "of context_scale (=(0.85, 1.0)), may be left with no more beside the largest targets of target_scale "
        "(=(0.15, 0.2)); or make targets smaller, or the context larger",
    ),
    (
        {"truncation": "fixed", "context_length": 131},
        "context_length (=131) must be at most 130 on a grid of 14 x 14: a context block of 13 x 13 patches, the "
        "smallest of context_scale (=(0.85, 1.0)), may be left with no more beside the largest targets of "
        "target_scale (=(0.15, 0.2)); or make targets smaller, or the context larger",
    ),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        MultiBlock(**{"grid": (14, 14), **options})
    assert str(error.value) == message


def test_the_number_in_the_message_is_one_that_works() -> None:
    masker = MultiBlock(grid=(14, 14), min_keep=130)
    assert min(lengths(masker(np.arange(300), seed=0, epoch=0).context)) == 130
    MultiBlock(grid=(14, 14), min_keep_target=24, edges="released")


@pytest.mark.parametrize("grid", [(6, 6), (8, 8)])
def test_where_the_release_hangs_there_is_an_error(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^min_keep_target \(=11\) must be at most "):
        MultiBlock(grid=grid, **RELEASED)
    masks = MultiBlock(grid=grid, **{**RELEASED, "min_keep": 4, "min_keep_target": 1})(np.arange(64), seed=0, epoch=0)
    assert min(lengths(masks.context)) >= 4


def test_targets_that_cover_everything() -> None:
    with pytest.raises(ValueError, match=r"^min_keep \(=4\) must be at most 0 on a grid of 8 x 8"):
        MultiBlock(grid=(8, 8), target_scale=(0.5, 1.0))


def test_no_image() -> None:
    for truncation in ("none", "released", "random"):
        with pytest.raises(ValueError, match=r"^samples \(=\[\]\) must name at least one image$"):
            MultiBlock(grid=(8, 8), truncation=truncation)(np.array([], dtype=np.int64), seed=0, epoch=0)
