"""Masks in place, set by set, and what a config says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jepa_kit.config import config_from_dict
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_masker
from jepa_kit.maskers import InPlace, Mixture, Random
from jepa_kit.registry import MASKERS

GRID = (6, 8)
CUT = {"name": "multiblock", "truncation": "fixed", "context_length": 8, "target_length": 3}


@pytest.mark.parametrize(
    "masker",
    [
        {"name": "random", "ratio": 0.4},
        {"name": "multiblock"},
        {"name": "inverse_block", "num_masks": 3},
        {"name": "multigroup"},
        CUT,
    ],
    ids=lambda masker: masker["name"],
)
def test_the_targets_of_a_context_are_hidden_in_its_whole_image(masker: dict[str, Any]) -> None:
    samples, arguments = np.arange(5), {"seed": 3, "epoch": 1, "step": 2}
    part = dict(masker)
    alone = MASKERS.build(part.pop("name"), part, grid=GRID)(samples, **arguments)
    masks = InPlace(grid=GRID, masker=masker)(samples, **arguments)
    assert masks.grid == GRID
    assert masks.context.lengths.whole
    assert masks.context_of.tolist() == list(range(len(alone.context)))
    assert torch.equal(masks.context.image, alone.context.image)
    assert torch.equal(masks.targets.image, alone.context.image)
    assert masks.context.hidden is not None
    hidden = masks.context.hidden.view(-1, 48)
    for s, (context, target) in enumerate(zip(masks.context.split(), masks.targets.split(), strict=True)):
        blocks = [t for t, c in zip(alone.targets.split(), alone.context_of.tolist(), strict=True) if c == s]
        expected = sorted(set(torch.cat(blocks).tolist()))
        assert target.tolist() == expected
        assert hidden[s].nonzero().flatten().tolist() == expected
        assert context.tolist() == list(range(48))


def test_before_truncation_are_the_sets_that_are_cut() -> None:
    masker, samples = InPlace(grid=GRID, masker=CUT), np.arange(5)
    cut, whole = masker(samples, seed=0, epoch=0), masker.before_truncation(samples, seed=0, epoch=0)
    assert all(few < many for few, many in zip(cut.targets.lengths, whole.targets.lengths, strict=True))
    same = InPlace(grid=GRID)
    assert torch.equal(
        same.before_truncation(samples, seed=0, epoch=0).targets.index, same(samples, seed=0, epoch=0).targets.index
    )


def test_images_that_are_shown_have_the_same_targets() -> None:
    part: dict[str, Any] = {"name": "blockwise", "ratio": 0.3}
    samples, arguments = np.arange(400), {"seed": 3, "epoch": 1}
    every = InPlace(grid=GRID, masker=part)(samples, **arguments)
    half = InPlace(grid=GRID, masker=part, probability=0.5)
    masks = half(samples, **arguments)
    assert torch.equal(masks.targets.index, every.targets.index)
    assert masks.context.hidden is not None
    assert every.context.hidden is not None
    hidden, target = (x.context.hidden.view(400, -1) for x in (masks, every))
    hides = hidden.any(1)
    assert torch.equal(hidden, target & hides[:, None])
    assert abs(int(hides.sum()) - 200) < 3.3 * 10  # binomial: 0.1 % of draws are further away
    alone = half(samples[7:9], **arguments).context.hidden
    assert torch.equal(alone, hidden[7:9].flatten())
    assert not torch.equal(half(samples, seed=3, epoch=2).context.hidden.view(400, -1).any(1), hides)


def test_half_of_the_images_hidden_is_what_ibot_draws() -> None:
    """iBOT's ratios 0 and 0.3 +- 0.2, each for half of the images (fixtures/methods/mask_statistics.json)."""
    part: dict[str, Any] = {"name": "blockwise", "ratio": [0.0974, 0.4974], "min_scale": 0.0816, "count": "at_most"}
    masks = InPlace(grid=(14, 14), masker=part, probability=0.5)(np.arange(4000), seed=0, epoch=0)
    assert masks.context.hidden is not None
    counts = masks.context.hidden.view(4000, -1).sum(1).double()
    assert abs(float((counts == 0).double().mean()) - 0.498) < 2.6 * (2 * 0.25 / 4000) ** 0.5
    assert abs(float(counts.mean()) - 28.92625) < 2.6 * (2 / 4000) ** 0.5 * 33.07
    assert float(counts.max()) == 97


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_a_probability_out_of_range(probability: float) -> None:
    with pytest.raises(ValueError, match=rf"probability \(={probability}\) must be in \(0, 1\]"):
        InPlace(grid=GRID, probability=probability)


def test_a_mixture_may_hide_in_place_or_not() -> None:
    masker = Mixture(grid=GRID, maskers=({"name": "in_place", "masker": {"name": "block"}}, {"name": "random"}))
    masks = masker(np.arange(20), seed=0, epoch=0)
    assert masks.context.hidden is not None
    member = masker.member_of(np.arange(20), seed=0, epoch=0)
    hidden = [int(x.sum()) for x in masks.context.hidden.split(masks.context.lengths.on_host)]
    assert [n > 0 for n in hidden] == [m == 0 for m in member.tolist()]
    assert [len(t) for t, m in zip(masks.targets.split(), member, strict=True) if m == 0] == [n for n in hidden if n]


def config(masker: dict[str, Any]) -> dict[str, Any]:
    return {
        "masker": masker,
        "encoder": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "mask_token": True},
        "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
        "target": {"name": "representation"},
        "loss": {"name": "smooth_l1"},
        "target_update": {"name": "ema"},
        "data": {"image_size": 32},
    }


def test_a_config_writes_out_the_defaults_of_the_other_masker() -> None:
    held = config_from_dict(config({"name": "in_place", "masker": {"name": "random", "unit": 8}}))
    assert held.slots["masker"].options["masker"] == {"name": "random", "ratio": 0.6, "unit": 8}
    assert config_from_dict(held.to_dict()).slots == held.slots
    masker = build_masker(held)
    assert isinstance(masker, InPlace)
    assert isinstance(masker.members[0], Random)
    assert masker.members[0].side == 2


@pytest.mark.parametrize(
    ("masker", "message"),
    [
        (
            {"name": "randm"},
            "masker.masker.name: 'randm' is not a registered masker; did you mean 'random'? Registered:",
        ),
        (
            {"name": "random", "unti": 8},
            "masker.masker.unti is not an option of 'random'; did you mean 'unit'? It takes:",
        ),
        ("random", "masker.masker (='random') must be a mapping"),
    ],
)
def test_every_mistake_in_the_other_masker_is_reported(masker: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(config({"name": "in_place", "masker": masker}))
    assert error.value.problems[0].startswith(message)


def test_what_the_other_masker_cannot_satisfy_names_it() -> None:
    with pytest.raises(ValueError) as error:
        InPlace(grid=GRID, masker={"name": "random", "ratio": 0.0})
    assert str(error.value).startswith("masker: ratio (=0.0) must leave a target and a context")
    with pytest.raises(ValueError, match=r"^grid \(=\(3, 8\)\) must be"):
        InPlace(grid=(3, 8))
