"""Packing and cutting against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jepa_kit.maskers.packing import keep_first, keep_random, lengths_of, mask_batch, shortest
from jepa_kit.rng import Stream, uniforms


def some_sets(*shape: int, share: float = 0.4) -> np.ndarray:
    sets = np.random.default_rng(0).random(shape) < share
    sets[..., :2] = True
    return sets


@pytest.mark.parametrize(("contexts", "blocks", "images"), [(1, 4, 3), (2, 3, 5), (3, 1, 1)])
def test_mask_batch_against_loops(contexts: int, blocks: int, images: int) -> None:
    grid = (4, 7)
    context, targets = some_sets(contexts, images, 28), some_sets(blocks, images, 28)
    masks = mask_batch(context, targets, grid)
    assert masks.grid == grid
    sets = iter(zip(masks.context.split(), masks.context.image.tolist(), strict=True))
    for c in range(contexts):
        for b in range(images):
            patches, image = next(sets)
            assert image == b
            assert patches.tolist() == [p for p in range(28) if context[c, b, p]]
    sets = iter(zip(masks.targets.split(), masks.targets.image.tolist(), masks.context_of.tolist(), strict=True))
    for m in range(blocks):
        for c in range(contexts):
            for b in range(images):
                patches, image, of = next(sets)
                assert (image, of) == (b, c * images + b)
                assert patches.tolist() == [p for p in range(28) if targets[m, b, p]]
    assert next(sets, None) is None


def test_an_empty_set_is_refused() -> None:
    sets = some_sets(1, 3, 16)
    empty = sets.copy()
    empty[0, 1] = False
    message = r"lengths\[1\] \(=0\) must be at least 1"
    with pytest.raises(ValueError, match=message):
        mask_batch(empty, sets, (4, 4))
    with pytest.raises(ValueError, match=message):
        mask_batch(sets, empty, (4, 4))


def test_no_image_is_refused() -> None:
    nothing = np.zeros((1, 0, 16), dtype=bool)
    with pytest.raises(ValueError, match=r"^samples \(=\[\]\) must name at least one image$"):
        mask_batch(nothing, nothing, (4, 4))


def test_keep_first_and_lengths() -> None:
    sets = some_sets(2, 5, 30)
    kept = keep_first(sets, 4)
    for i in np.ndindex(2, 5):
        patches = np.flatnonzero(sets[i]).tolist()
        assert np.flatnonzero(kept[i]).tolist() == patches[:4]
        assert lengths_of(sets)[i] == len(patches)
    assert shortest(sets) == lengths_of(sets).min()


def test_keep_random_keeps_the_smallest_numbers_and_breaks_ties_by_place() -> None:
    sets = some_sets(6, 30)
    u = np.floor(np.random.default_rng(1).random((6, 30)) * 4) / 4  # many ties
    kept = keep_random(sets, 5, u)
    for b in range(6):
        ranked = sorted((p for p in range(30) if sets[b, p]), key=lambda p: (u[b, p], p))
        assert np.flatnonzero(kept[b]).tolist() == sorted(ranked[:5])


def test_keep_random_keeps_all_and_tells_the_closest_numbers_apart() -> None:
    u = np.full((1, 8), 1 - 2**-32)
    assert keep_random(np.ones((1, 8), dtype=bool), 3, u).tolist() == [[True] * 3 + [False] * 5]
    assert keep_random(np.ones((1, 8), dtype=bool), 8, u).all()


def test_every_choice_is_equally_likely() -> None:
    """3 patches out of 6 that are in the set: 20 choices."""
    images, inside = 10_000, np.array([0, 2, 3, 5, 6, 8])
    sets = np.zeros((images, 9), dtype=bool)
    sets[:, inside] = True
    kept = keep_random(sets, 3, uniforms(Stream.MASK_DROP, np.arange(images), 9, seed=0, epoch=0))
    assert not kept[:, [1, 4, 7]].any()
    counts = np.unique(kept @ 2 ** np.arange(9), return_counts=True)[1]
    assert len(counts) == math.comb(6, 3)
    assert stats.chisquare(counts).pvalue > 1e-3
