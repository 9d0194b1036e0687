"""What holds for every registered masker, whoever wrote it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_kit.maskers import Masker
from jepa_kit.registry import MASKERS

every_masker = pytest.mark.parametrize("name", MASKERS.names())
grids = st.tuples(st.integers(4, 32), st.integers(4, 32))
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 2**32 - 1)
samples_of_a_data_set = st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=6)


@every_masker
@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=seeds, epoch=epochs, samples=samples_of_a_data_set, step=st.integers(0, 10**6))
def test_masks_are_sound(
    name: str, grid: tuple[int, int], seed: int, epoch: int, samples: list[int], step: int
) -> None:
    masker: Masker = MASKERS.build(name, {}, grid=grid)
    assert isinstance(masker, Masker)
    masks = masker(np.array(samples), seed=seed, epoch=epoch, step=step)
    assert masks.grid == masker.grid == grid
    for sets in (masks.context, masks.targets):
        assert set(sets.image.tolist()) == set(range(len(samples)))
        assert sets.index.dtype == torch.int64
        for patches in sets.split():
            assert len(patches) > 0
            assert patches[0] >= 0
            assert patches[-1] < grid[0] * grid[1]
            assert (patches.diff() > 0).all()  # ascending, so without duplicates
    context, targets = masks.context.split(), masks.targets.split()
    for target, of, image in zip(targets, masks.context_of.tolist(), masks.targets.image.tolist(), strict=True):
        assert not set(target.tolist()) & set(context[of].tolist())
        assert masks.context.image[of] == image
    # Block-major: context c * B + b; target (m * C + c) * B + b.
    images = torch.arange(len(samples))
    assert torch.equal(masks.context.image, images.repeat(len(context) // len(samples)))
    assert torch.equal(masks.targets.image, images.repeat(len(targets) // len(samples)))
    assert torch.equal(masks.context_of, torch.arange(len(context)).repeat(len(targets) // len(context)))


@every_masker
@settings(max_examples=30, deadline=None)
@given(grid=grids, seed=seeds, epoch=epochs, samples=samples_of_a_data_set)
def test_masks_do_not_depend_on_the_batch(
    name: str, grid: tuple[int, int], seed: int, epoch: int, samples: list[int]
) -> None:
    masker: Masker = MASKERS.build(name, {}, grid=grid)
    together = masker(np.array(samples), seed=seed, epoch=epoch, step=1)
    for b, sample in enumerate(samples):
        alone = masker(np.array([sample]), seed=seed, epoch=epoch, step=2)
        for a, t in ((alone.context, together.context), (alone.targets, together.targets)):
            mine = t.split()[b :: len(samples)]
            assert [x.tolist() for x in a.split()] == [x.tolist() for x in mine]


@every_masker
def test_masks_vary_with_seed_epoch_and_sample(name: str) -> None:
    masker: Masker = MASKERS.build(name, {}, grid=(14, 14))

    def draw(first: int = 0, seed: int = 0, epoch: int = 0) -> list[list[int]]:
        masks = masker(np.arange(first, first + 20), seed=seed, epoch=epoch)
        return [x.tolist() for x in masks.context.split()]

    assert draw() == draw()
    for other in (draw(first=20), draw(seed=1), draw(epoch=1)):
        differ = sum(a != b for a, b in zip(draw(), other, strict=True))
        assert differ >= 8  # rasterized has four masks: 15 of 20 differ on average


@every_masker
def test_masks_survive_the_way_to_a_worker(name: str) -> None:
    masker: Masker = MASKERS.build(name, {}, grid=(6, 9))
    copy = pickle.loads(pickle.dumps(masker))
    here, there = (m(np.arange(5), seed=1, epoch=2) for m in (masker, copy))
    assert torch.equal(here.context.index, there.context.index)
    assert torch.equal(here.targets.index, there.targets.index)


@every_masker
def test_masks_do_not_touch_global_random_state(name: str) -> None:
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    MASKERS.build(name, {}, grid=(6, 9))(np.arange(5), seed=1, epoch=2)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())
