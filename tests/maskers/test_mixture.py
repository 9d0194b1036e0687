"""A mixture of maskers: which member an image gets, that it gets that member's masks, and what a config may say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from jepa_kit.config import config_from_dict
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_masker
from jepa_kit.maskers import Block, Mixture, MultiBlock
from jepa_kit.registry import MASKERS

LEVEL = 1e-3
"""Of every statistical test here; the seeds are fixed."""

TWO = ({"name": "multiblock", "num_targets": 2}, {"name": "multigroup"}, {"name": "random", "ratio": 0.5})


@pytest.mark.parametrize("weights", [None, (1, 2, 5)])
def test_members_are_drawn_by_weight(weights: tuple[float, ...] | None) -> None:
    masker = Mixture(grid=(8, 8), maskers=TWO, weights=weights)
    member = masker.member_of(np.arange(9000), seed=0, epoch=1)
    share = np.array(weights or (1, 1, 1), dtype=float)
    assert stats.chisquare(np.bincount(member), 9000 * share / share.sum()).pvalue > LEVEL


def test_the_member_of_a_sample_changes_with_epoch_and_seed() -> None:
    """Independent draws: two epochs (or seeds) agree on 1 of 3 samples, and an epoch drawn again on all."""
    masker = Mixture(grid=(8, 8), maskers=TWO)
    samples = np.arange(3000)
    first = masker.member_of(samples, seed=0, epoch=0)
    np.testing.assert_array_equal(first, masker.member_of(samples, seed=0, epoch=0))
    for seed, epoch in ((0, 1), (0, 2), (1, 0)):
        agree = int((masker.member_of(samples, seed=seed, epoch=epoch) == first).sum())
        assert stats.binomtest(agree, len(samples), 1 / 3).pvalue > LEVEL


def test_the_choice_is_independent_of_the_masks() -> None:
    """A member draws for its images what it draws for any: the mean context of a masker is that of its part."""
    masker = Mixture(grid=(14, 14), maskers=({"name": "multiblock"}, {"name": "random"}))
    member = masker.member_of(np.arange(6000), seed=0, epoch=0)
    lengths = np.array(MultiBlock(grid=(14, 14))(np.arange(6000), seed=0, epoch=0).context.lengths.on_host)
    assert stats.ks_2samp(lengths[member == 0], lengths[member == 1]).pvalue > LEVEL


def test_each_image_has_the_masks_of_its_member() -> None:
    samples = np.array([5, 900, 3, 77, 12, 8, 2**39, 1])
    masker = Mixture(grid=(14, 14), maskers=TWO)
    masks = masker(samples, seed=4, epoch=9)
    context, targets = masks.context.split(), masks.targets.split()
    members = masker.member_of(samples, seed=4, epoch=9)
    assert len(set(members)) == 3
    for b, sample in enumerate(samples):
        part = dict(TWO[members[b]])
        alone = MASKERS.build(part.pop("name"), part, grid=(14, 14))(samples[b : b + 1], seed=4, epoch=9)
        mine = np.flatnonzero(masks.targets.image == b)
        assert [targets[s].tolist() for s in mine] == [t.tolist() for t in alone.targets.split()], sample
        ours = [context[masks.context_of[s]].tolist() for s in mine]
        theirs = alone.context.split()
        assert ours == [theirs[s].tolist() for s in alone.context_of]


def test_sets_come_by_their_number_then_by_image() -> None:
    masks = Mixture(grid=(8, 8), maskers=({"name": "rasterized"}, {"name": "block"}))(np.arange(12), seed=0, epoch=0)
    per_image = np.bincount(masks.targets.image)
    assert set(per_image) == {1, 3}
    second = [b for b in range(12) if per_image[b] == 3]
    assert masks.targets.image.tolist() == [*range(12), *second, *second]
    assert masks.context.image.tolist() == list(range(12))


def test_before_truncation_are_the_sets_that_are_cut() -> None:
    parts = (
        {"name": "multiblock", "truncation": "released", "edges": "released"},
        {"name": "multiblock", "truncation": "fixed", "context_length": 20, "target_length": 5},
        {"name": "random"},
    )
    masker = Mixture(grid=(8, 8), maskers=parts)
    arguments: dict[str, Any] = {"seed": 1, "epoch": 2, "step": 3}
    masks, before = masker(np.arange(40), **arguments), masker.before_truncation(np.arange(40), **arguments)
    member = masker.member_of(np.arange(40), seed=1, epoch=2)
    cut = np.zeros((3, 2), dtype=np.int64)
    for kind, (after, whole) in enumerate(((masks.context, before.context), (masks.targets, before.targets))):
        assert after.image.tolist() == whole.image.tolist()
        for few, all_of_them, b in zip(after.split(), whole.split(), after.image.tolist(), strict=True):
            assert set(few.tolist()) <= set(all_of_them.tolist())
            cut[member[b], kind] += len(all_of_them) - len(few)
    assert (cut > 0).tolist() == [[True, False], [True, True], [False, False]]


def test_one_member_is_that_masker() -> None:
    mixed = Mixture(grid=(8, 8), maskers=({"name": "block"},))(np.arange(20), seed=3, epoch=0)
    alone = Block(grid=(8, 8))(np.arange(20), seed=3, epoch=0)
    assert mixed.context.index.tolist() == alone.context.index.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 3)}, "grid (=(3, 3)) must be (rows, columns) with at least 4 of each"),
        ({"maskers": ()}, "maskers (=[]) must hold at least one masker"),
        (
            {"maskers": ({"name": "block"}, {"name": "blok"})},
            "maskers[1].name: 'blok' is not a registered masker; did you mean 'block'? Registered: ",
        ),
        ({"maskers": ({"ratio": 0.5},)}, "maskers[0].name: None is not a registered masker"),
        (
            {"maskers": ({"name": "mixture"},)},
            "maskers[0].name (='mixture') must not be a mixture: put its maskers into the outer list",
        ),
        (
            {"maskers": ({"name": "random", "ratoi": 0.5},)},
            "maskers[0].ratoi is not an option of 'random'; did you mean 'ratio'? It takes: ratio",
        ),
        (
            {"maskers": ({"name": "multiblock", "num_targets": 0},)},
            "maskers[0]: num_targets (=0) must be at least 1",
        ),
        (
            {"maskers": ({"name": "blockwise", "ratio": float("inf")},)},
            "maskers[0]: ratio (=inf) must leave a target and a context among the 64 patches",
        ),
        ({"weights": (1.0,)}, "weights (=(1.0,)) must be one number above 0 for each of the 2 maskers"),
        ({"weights": (1.0, 0.0)}, "weights (=(1.0, 0.0)) must be one number above 0 for each of the 2 maskers"),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Mixture(**{"grid": (8, 8), **options})
    assert str(error.value).startswith(message)


def test_no_image() -> None:
    with pytest.raises(ValueError, match=r"^samples \(=\[\]\) must name at least one image$"):
        Mixture(grid=(8, 8))(np.array([], dtype=np.int64), seed=0, epoch=0)


def config(masker: dict[str, Any]) -> dict[str, Any]:
    return {
        "masker": masker,
        "encoder": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
        "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
        "target": {"name": "representation"},
        "loss": {"name": "smooth_l1"},
        "target_update": {"name": "ema"},
        "data": {"image_size": 32},
    }


def test_a_config_writes_out_the_defaults_of_members() -> None:
    members = [{"name": "multiblock", "target_scale": [0.1, 0.2]}, {"name": "random"}]
    held = config_from_dict(config({"name": "mixture", "maskers": members, "weights": [3, 1]}))
    options = held.slots["masker"].options
    assert options["maskers"][1] == {"name": "random", "ratio": 0.6, "unit": None}
    assert options["maskers"][0]["num_targets"] == 4
    assert config_from_dict(held.to_dict()).slots == held.slots
    masker = build_masker(held)
    assert isinstance(masker, Mixture)
    assert isinstance(masker.members[0], MultiBlock)


def test_every_mistake_in_a_member_is_reported() -> None:
    members = [{"name": "multiblock", "num_targts": 2}, {"name": "blok"}, {"name": "random", "ratio": "half"}, 3]
    with pytest.raises(ConfigError) as error:
        config_from_dict(config({"name": "mixture", "maskers": members[:3]}))
    for line in (
        "masker.maskers[0].num_targts is not an option of 'multiblock'; did you mean 'num_targets'? It takes: ",
        "masker.maskers[1].name: 'blok' is not a registered masker; did you mean 'block'? Registered: ",
        "masker.maskers[2].ratio (='half') must be a float",
    ):
        assert any(problem.startswith(line) for problem in error.value.problems)
    with pytest.raises(ConfigError, match=r"masker.maskers \(=\[3\]\) must be a list, each a mapping"):
        config_from_dict(config({"name": "mixture", "maskers": [3]}))


def test_what_a_member_cannot_satisfy_names_it() -> None:
    held = config_from_dict(config({"name": "mixture", "maskers": [{"name": "block", "min_keep": 60}]}))
    with pytest.raises(ValueError, match=r"^masker\.?:? ?maskers\[0\]: min_keep \(=60\) must be at most"):
        build_masker(held)
