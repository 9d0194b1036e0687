"""Maskers of the page against those of jepa_kit: statistics, defaults, and which configs it can draw."""

import inspect

import numpy as np

from jepa_kit.demo.page import DRAWN
from jepa_kit.maskers.multiblock import RELEASED
from jepa_kit.registry import MASKERS

RELEASED_OPTIONS = {name: value for name, value in RELEASED.items() if name != "min_keep_target"}
SMALL, TALL = (8, 8), (9, 14)


def case(name, grid, batch=40, batches=16, **options):
    return {"name": name, "options": options, "grid": grid, "batch": batch, "batches": batches}


CASES = [
    *(case(name, grid) for name in DRAWN for grid in (SMALL, TALL)),
    case("multiblock", SMALL, num_targets=2, target_scale=[0.1, 0.3], context_scale=[0.5, 0.7], min_keep=12),
    case("multiblock", SMALL, target_scale=[0.3, 0.35], min_keep=9),  # often drawn again
    case("multiblock", TALL, allow_overlap=True, size_per="image", coupled_scale_and_aspect=True),
    case("multiblock", TALL, truncation="fixed", context_length=30, target_length=9),
    case("multiblock", SMALL, truncation="fixed", context_length=20),
    case("multiblock", SMALL, truncation="random", batch=8, batches=60),
    case("released", SMALL, batch=16, batches=60),
    case("released", (14, 14), batch=8, batches=60),
    case("random", SMALL, ratio=0.3),
    case("kept_block", TALL, roll=False, ratio=0.5),
    case("causal", SMALL, context_ratio=[0.2, 0.5]),
]


def in_python(name, options, grid, batch, batches):
    """Return of each batch what run_maskers.mjs returns."""
    released = RELEASED_OPTIONS if name == "released" else {}
    masker = MASKERS.get("multiblock" if released else name)(grid=grid, **released, **options)
    patches = grid[0] * grid[1]
    for step in range(batches):
        masks = masker(np.arange(batch) + step * batch, seed=5, epoch=0, step=step)
        sets = masks.context, masks.targets
        context, target = (np.bincount(each.index, minlength=patches) / batch for each in sets)
        yield {
            "context": context,
            "target": target,
            "lengths": masks.context.lengths.each,
            "sizes": masks.targets.lengths.each,
        }


def statistics(draws, grid):
    """Return [batches, figures]: use of every row and column, and lengths."""
    figures = []
    for draw in draws:
        maps = [np.reshape(draw[kind], grid) for kind in ("context", "target")]
        sums = [x.sum(axis) for x in maps for axis in (0, 1)]
        lengths = [f(draw[kind]) for kind in ("lengths", "sizes") for f in (np.mean, np.std)]
        figures.append(np.concatenate([*sums, lengths]))
    return np.array(figures)


def test_masks_have_the_statistics_of_jepa_kit(node):
    found = node("run_maskers.mjs", {"draws": CASES, "fromConfig": []})["draws"]
    assert len(found) == len(CASES)
    for one, draws in zip(CASES, found, strict=True):
        expected = list(in_python(**one))
        ours, theirs = (statistics(each, one["grid"]) for each in (draws, expected))
        error = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / one["batches"])
        difference = np.abs(ours.mean(0) - theirs.mean(0))
        assert (difference <= 5 * error + 1e-9).all(), (one, difference / np.maximum(error, 1e-9))


def test_released_masks_never_use_the_last_row_and_column(node):
    used = {}
    for name in ("released", "multiblock"):
        (draws,) = node("run_maskers.mjs", {"draws": [case(name, SMALL, batch=16)], "fromConfig": []})["draws"]
        maps = [sum(np.reshape(d[kind], SMALL) for d in draws) for kind in ("context", "target")]
        used[name] = [[x[-1].sum() > 0, x[:, -1].sum() > 0] for x in maps]
    assert used == {"released": [[False, False]] * 2, "multiblock": [[True, True]] * 2}


def test_options_have_the_defaults_of_jepa_kit(node):
    maskers = node("run_maskers.mjs", {"draws": [], "fromConfig": []})["maskers"]
    assert [one["key"] for one in maskers] == ["multiblock", "released", *DRAWN[1:]]
    for one in maskers:
        parameters = inspect.signature(MASKERS.get(one["masker"])).parameters
        for name, value in one["options"].items():
            default = parameters[name].default
            equal = np.allclose(default, value) if isinstance(value, list) else default == value
            assert equal, (one["key"], name)
    (released,) = (one["changes"] for one in maskers if one["key"] == "released")
    assert released == RELEASED_OPTIONS


def test_the_page_draws_the_masker_of_a_run_or_none(tiny_config, node):
    names = [name for name in MASKERS.names() if MASKERS.get(name).__module__.startswith("jepa_kit.")]
    variants = [
        ("multiblock", "edges: released, min_keep_target: 3, truncation: released", "released"),
        ("multiblock", "truncation: fixed, context_length: 12, target_length: 5", "multiblock"),
        ("multiblock", "num_contexts: 2", None),
        ("random", "unit: 8", None),
        ("blockwise", "ratio: [0.3, 0.5]", None),
        *((name, "", name if name in DRAWN else None) for name in names),
    ]
    configs = [tiny_config(f"masker={{name: {name}, {options}}}").slots["masker"] for name, options, _ in variants]
    given = [{"name": part.name, **part.options} for part in configs]
    found = node("run_maskers.mjs", {"draws": [], "fromConfig": [*given, None]})["fromConfig"]
    assert [one and one["name"] for one in found] == [*(key for _, _, key in variants), None]
    assert found[0]["options"]["edges"] == "released"
    assert found[0]["options"]["num_targets"] == 4
    assert [found[1]["options"][name] for name in ("context_length", "target_length")] == [12, 5]
