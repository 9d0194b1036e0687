"""What holds for every registered masker, whoever wrote it."""

from __future__ import annotations

import pickle
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_kit.interfaces import Masker
from jepa_kit.registry import MASKERS
from jepa_kit.structures import MaskBatch

NAMES = [name for name in MASKERS.names() if MASKERS.get(name).__module__.startswith("jepa_kit.")]
"""Without those of projects, whose tests may run in the same process."""
every_masker = pytest.mark.parametrize("name", NAMES)
grids = st.tuples(st.integers(4, 32), st.integers(4, 32))
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 2**32 - 1)
samples_of_a_data_set = st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=6)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an option's type, of which many are right: counts, shares, ratios, choices, ranges, parts."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    simple = {int: st.integers(1, 12), float: st.floats(0.02, 0.98), bool: st.booleans(), type(None): st.none()}
    if origin in simple:
        return simple[origin]
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, args))
    if annotation == tuple[float, float]:
        share = st.one_of(st.floats(0.05, 1.0), st.floats(0.3, 3.0))
        return st.tuples(share, share).map(lambda r: (min(r), max(r)))
    if origin is tuple and args[-1] is not Ellipsis:
        return st.tuples(*map(values_of, args))
    if origin is tuple:
        return st.lists(values_of(args[0]), min_size=1, max_size=3).map(tuple)
    part = st.sampled_from([name for name in NAMES if name != "mixture"]).map(lambda name: {"name": name})
    if origin is dict:
        return part
    assert origin is Sequence, f"values_of does not know {annotation}: tell it"
    return st.lists(part, min_size=1, max_size=3)


def options_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Up to three options of a masker, whatever they are: read from its signature."""
    options = MASKERS.options(name)
    some = st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True) if options else st.just([])
    return some.flatmap(lambda keys: st.fixed_dictionaries({k: values_of(options[k].annotation) for k in keys}))


def shares_across_the_batch(options: dict[str, Any]) -> bool:
    return options.get("truncation") in ("released", "random") or options.get("size_per") == "batch"


@every_masker
@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=seeds, epoch=epochs, samples=samples_of_a_data_set, step=st.integers(0, 10**6))
def test_masks_are_sound(
    name: str, grid: tuple[int, int], seed: int, epoch: int, samples: list[int], step: int
) -> None:
    check_sound(name, {}, grid, seed, epoch, samples, step)


@every_masker
@settings(max_examples=40, deadline=None)
@given(data=st.data(), grid=grids, seed=seeds, samples=samples_of_a_data_set)
def test_any_options_raise_or_give_sound_masks(
    name: str, data: st.DataObject, grid: tuple[int, int], seed: int, samples: list[int]
) -> None:
    """Whatever its options are, a masker refuses them at construction, or draws masks: it ends, and they are sound."""
    options = data.draw(options_of(name))
    try:
        masker = MASKERS.build(name, options, grid=grid, patch_size=4)
    except ValueError as error:
        assert "(=" in str(error)  # noqa: PT017  (the option and its value)
        return
    check_sound(name, options, grid, seed, 0, samples, 3)
    if not shares_across_the_batch(options):
        check_alone_as_together(masker, samples, seed, 0)


def check_sound(
    name: str, options: dict[str, Any], grid: tuple[int, int], seed: int, epoch: int, samples: list[int], step: int
) -> None:
    """Indices in range, none twice in a set, no empty set, contexts without their targets, the order of sets."""
    masker: Masker = MASKERS.build(name, options, grid=grid, patch_size=4)
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
    context, targets = shown(masks), masks.targets.split()
    for target, of, image in zip(targets, masks.context_of.tolist(), masks.targets.image.tolist(), strict=True):
        may_overlap = options.get("allow_overlap") or options.get("probability", 1.0) < 1.0  # whole images are shown
        assert may_overlap or not set(target.tolist()) & set(context[of].tolist())
        assert masks.context.image[of] == image
    if "mixture" not in name:
        check_block_major(masks, len(samples))


def shown(masks: MaskBatch) -> list[torch.Tensor]:
    """The patches of each context whose content the encoder sees."""
    hidden = masks.context.hidden
    seen = torch.ones_like(masks.context.index, dtype=torch.bool) if hidden is None else ~hidden
    lengths = masks.context.lengths.on_host
    return [x[keep] for x, keep in zip(masks.context.split(), seen.split(lengths), strict=True)]


def check_block_major(masks: MaskBatch, batch_size: int) -> None:
    """Context c * B + b, target m * B + b; each target is predicted from a context of its image."""
    images = torch.arange(batch_size)
    for sets in (masks.context, masks.targets):
        assert torch.equal(sets.image, images.repeat(len(sets) // batch_size))
    assert torch.equal(masks.context_of % batch_size, images.repeat(len(masks.targets) // batch_size))


@every_masker
@settings(max_examples=30, deadline=None)
@given(grid=grids, seed=seeds, epoch=epochs, samples=samples_of_a_data_set)
def test_masks_do_not_depend_on_the_batch(
    name: str, grid: tuple[int, int], seed: int, epoch: int, samples: list[int]
) -> None:
    check_alone_as_together(MASKERS.build(name, {}, grid=grid), samples, seed, epoch)


def sets_of(masks: MaskBatch, image: int) -> list[tuple[list[int], list[int]]]:
    """(target, its context) for every target set of an image."""
    context, targets = masks.context.split(), masks.targets.split()
    mine = np.flatnonzero(masks.targets.image == image).tolist()
    return [(targets[s].tolist(), context[masks.context_of[s]].tolist()) for s in mine]


def check_alone_as_together(masker: Masker, samples: list[int], seed: int, epoch: int) -> None:
    """An image gets the same masks alone, in any batch, at any step."""
    together = masker(np.array(samples), seed=seed, epoch=epoch, step=1)
    for b, sample in enumerate(samples):
        alone = masker(np.array([sample]), seed=seed, epoch=epoch, step=2)
        assert sets_of(alone, 0) == sets_of(together, b)


@every_masker
def test_masks_vary_with_seed_epoch_and_sample(name: str) -> None:
    masker: Masker = MASKERS.build(name, {}, grid=(14, 14))

    def draw(first: int = 0, seed: int = 0, epoch: int = 0) -> list[list[int]]:
        masks = masker(np.arange(first, first + 20), seed=seed, epoch=epoch)
        return [x.tolist() for x in shown(masks)]

    assert draw() == draw()
    for other in (draw(first=20), draw(seed=1), draw(epoch=1)):
        differ = sum(a != b for a, b in zip(draw(), other, strict=False))
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
