"""The mask report against numbers of the released code, plain counting, and torch's own FLOP counter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from jepa_kit.config import Config, config_from_dict
from jepa_kit.encoders import packed
from jepa_kit.engine.build import open_shards
from jepa_kit.evaluation.masks.cost import Lengths, cost_of
from jepa_kit.evaluation.masks.page import first_masks, mask_page, samples_of
from jepa_kit.evaluation.masks.report import MaskReport, warnings
from jepa_kit.evaluation.masks.statistics import mask_report, rectangles
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.maskers import RELEASED
from jepa_kit.registry import MASKERS
from jepa_kit.structures import View

FIXTURE = json.loads((Path(__file__).parents[2] / "fixtures/released_mask_statistics.json").read_text())


@pytest.fixture(autouse=True)
def no_rows_beside_tokens(monkeypatch):
    """Turn off padding of rows, which the formula does not count."""
    monkeypatch.setattr(packed, "COUNTS", 1 << 30)


def config(masker: dict[str, Any], side: int = 8, **others: Any) -> Config:
    return config_from_dict(
        {
            "masker": masker,
            "encoder": {"name": "vit", "embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4},
            "predictor": {"name": "vit", "width": 16, "depth": 3, "num_heads": 2},
            "target": {"name": "representation"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema"},
            "data": {"image_size": 4 * side},
            "train": {"attention": "reference", "precision": "float32", "device": "cpu"},
        }
        | others
    )


@pytest.fixture(scope="module")
def released() -> MaskReport:
    return mask_report(config({"name": "multiblock", **RELEASED}, 14), images=6400, images_per_batch=128)


def test_released_statistics_match_the_released_code(released: MaskReport) -> None:
    """50 batches here, 24 in the fixture; images of a batch share their sizes, so figures vary by several percent."""
    golden = FIXTURE["224px_patch16"]["batches"]["images_per_batch_128"]
    figures = released.to_dict()
    assert figures["lengths"]["context_before_truncation"]["mean"] == pytest.approx(
        golden["mean_context_patches_before_truncation"], rel=0.03
    )
    assert figures["lengths"]["context"]["mean"] == pytest.approx(
        golden["mean_context_patches_after_truncation"], rel=0.08
    )
    for ours, theirs in (("by_row", "by_row"), ("by_column", "by_column")):
        expected = golden[f"context_probability_{theirs}"]
        assert figures["probability"]["context"][ours] == pytest.approx(expected, abs=0.05)


def test_warns_of_the_released_biases(released: MaskReport) -> None:
    found = warnings(released)
    assert found[0] == (
        "the last row and the last column: 27 of 196 patches (13.8%) are never context and never target, in 6400 images"
    )
    for line, start in zip(
        found[1:],
        (
            "the context depends on the images per batch: for the same images it has 8",
            "the context lies in the upper half: P(context) of a patch is 0.",
            "scale and aspect ratio of targets come from one number: 5 of the ",
            "the context block is the same in every image: context_scale (=0.85, 1.0) has no effect on this grid",
            "all targets of a batch have one shape, of 5 that occur over batches",
            "images of a batch share what is drawn, so the mean context (",
        ),
        strict=True,
    ):
        assert line.startswith(start)


def test_the_corrected_masker_has_no_warning() -> None:
    assert warnings(mask_report(config({"name": "multiblock"}, 14), images=1024)) == []


def test_warns_of_a_lopsided_context() -> None:
    found = warnings(mask_report(config({"name": "causal"}), images=512))
    assert len(found) == 1
    assert found[0].startswith("the context lies in the upper half: P(context) of a patch is 0.7")


@pytest.mark.parametrize("name", MASKERS.names())
def test_counts_against_plain_python(name: str) -> None:
    """Every masker, counted set by set."""
    held = config({"name": name}, 6)
    report = mask_report(held, images=40, images_per_batch=20)
    masker = build_masker(held)
    context, target, unused = np.zeros((3, 36))
    contexts, targets, once, twice = [], [], 0, 0
    for step in range(2):
        masks = masker(np.arange(20 * step, 20 * step + 20), seed=0, epoch=0, step=step)
        seen: list[set[int]] = [set() for _ in range(20)]
        aimed: list[set[int]] = [set() for _ in range(20)]
        by_context: list[list[int]] = [[] for _ in range(len(masks.context))]
        hidden = masks.context.hidden
        shown = masks.context if hidden is None else masks.context.select(~hidden)
        for patches, image in zip(shown.split(), masks.context.image.tolist(), strict=True):
            context[patches] += 1
            seen[image] |= set(patches.tolist())
            contexts.append(len(patches))
        for patches, image, of in zip(
            masks.targets.split(), masks.targets.image.tolist(), masks.context_of.tolist(), strict=True
        ):
            aimed[image] |= set(patches.tolist())
            by_context[of] += patches.tolist()
            targets.append(len(patches))
        for a, s in zip(aimed, seen, strict=True):
            target[list(a)] += 1
            unused[list(set(range(36)) - a - s)] += 1
        for patches_of in by_context:
            times = np.bincount(patches_of)
            once, twice = once + (times > 0).sum(), twice + (times > 1).sum()
    assert report.probability.context.ravel() == pytest.approx(context / len(contexts))
    assert report.probability.target.ravel() == pytest.approx(target / 40)
    assert report.probability.unused.ravel() == pytest.approx(unused / 40)
    assert sorted(report.context) == sorted(contexts)
    assert sorted(report.context_before) == sorted(contexts)
    assert sorted(report.targets_before) == sorted(targets)
    assert sorted(report.targets) == sorted(targets)
    assert report.overlap == pytest.approx(twice / once)
    assert report.sets_per_image == pytest.approx((len(contexts) / 40, len(targets) / 40))
    json.dumps(report.to_dict())


CUT = {"name": "multiblock", "truncation": "fixed", "context_length": 12, "target_length": 3}


@pytest.mark.parametrize(
    "masker", [CUT, {"name": "mixture", "maskers": [CUT, {"name": "multiblock", "truncation": "released"}]}]
)
def test_lengths_before_truncation(masker: dict[str, Any], tmp_path: Path) -> None:
    """Equal to the lengths of the same images without truncation (with the same minimum context, 12 patches)."""
    whole: dict[str, Any] = {"name": "multiblock", "min_keep": 12}
    if masker["name"] == "mixture":
        whole = {"name": "mixture", "maskers": [whole, {"name": "multiblock"}]}
    held = config(masker, 6)
    report, expected = (mask_report(c, images=60, images_per_batch=20) for c in (held, config(whole, 6)))
    assert report.context_before.tolist() == expected.context.tolist()
    assert report.targets_before.tolist() == expected.targets.tolist()
    lengths = report.to_dict()["lengths"]
    assert lengths["context_before_truncation"]["mean"] > lengths["context"]["mean"]
    assert lengths["target_before_truncation"]["mean"] == pytest.approx(expected.targets.mean())
    assert lengths["target"]["mean"] < lengths["target_before_truncation"]["mean"]
    mask_page([report], [held], ["cut"], tmp_path / "page.png")


def test_standard_errors_are_over_batches() -> None:
    """Equal to the deviation of means over seeds, if images of a batch share their sizes."""
    masker = {"name": "multiblock", **RELEASED}
    held = [config(masker, 14, train={"seed": seed, "device": "cpu"}) for seed in range(16)]
    reports = [mask_report(c, images=4 * 32, images_per_batch=32) for c in held]
    for name in ("context_before", "context", "targets_before", "targets"):
        means = [getattr(report, name).mean() for report in reports]
        error = np.sqrt(np.mean([report.standard_errors[name] ** 2 for report in reports]))
        assert error == pytest.approx(np.std(means, ddof=1), rel=0.5), name
    assert reports[0].to_dict()["lengths"]["context"]["standard_error_over_batches"] > 1
    assert any(" has a standard error of " in line and "over 4 batches" in line for line in warnings(reports[0]))
    assert mask_report(config({"name": "multiblock"}), images=64, images_per_batch=16).standard_errors == {}


def test_context_by_images_per_batch_agrees_with_the_report(released: MaskReport) -> None:
    assert released.by_batch[128] == pytest.approx(released.context.mean(), rel=1e-12)


def test_a_large_batch_is_counted_set_by_set() -> None:
    """20,000 images: a table of images by sets would take gigabytes."""
    report = mask_report(config({"name": "random"}, 4), images=20000, images_per_batch=20000)
    assert report.probability.context == pytest.approx(np.full((4, 4), 6 / 16), abs=0.02)


def test_rectangles() -> None:
    sets = np.zeros((3, 4, 5), dtype=bool)
    sets[0, 1:3, 2:5] = True
    sets[1, 0, 0] = sets[1, 1, 1] = True
    sets[2, 3, 0] = True
    assert rectangles(sets.reshape(3, 20), (4, 5)).tolist() == [[2, 3], [0, 0], [1, 1]]


# --- cost ---


@pytest.mark.parametrize(
    ("masker", "target"),
    [
        ("multiblock", {"name": "representation"}),
        ("multigroup", {"name": "representation"}),
        ("random", {"name": "representation", "masked_at": "input"}),
        ("causal", {"name": "pixel"}),
    ],
)
def test_flops_against_torch(masker: str, target: dict[str, Any]) -> None:
    update = {"name": "none" if target["name"] == "pixel" else "ema"}
    held = config({"name": masker}, target=target, target_update=update)
    torch.manual_seed(0)
    jepa = build_recipe(held)
    masks = build_masker(held)(np.arange(3), seed=0, epoch=0)
    images = torch.randn(3, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        jepa(View(images, masks))
    lengths = Lengths(
        *(np.array(s.on_host) for s in (masks.context.lengths, masks.targets.lengths, masks.sequences)), 3, 64
    )
    cost = cost_of(jepa, lengths)
    with torch.device("meta"):
        assert cost == cost_of(build_recipe(held), lengths)
    parts = (cost.encoder, cost.target_encoder, cost.predictor)
    forward = 3e9 * sum(part.gflop for part in parts)
    assert forward == pytest.approx(counter.get_total_flops(), rel=1e-12)
    with FlopCounterMode(display=False) as counter:
        jepa(View(images, masks)).loss.backward()
    # Nothing is differentiated with respect to pixels, so the patch embedding's backward pass is once its forward.
    pixels = 2 * 48 * 24 * int(lengths.context.sum())
    assert 3e9 * cost.training_gflop == pytest.approx(counter.get_total_flops() + pixels, rel=1e-12)


# --- the page ---


@pytest.mark.parametrize("name", ["multiblock", "multigroup", "mixture"])
def test_the_page_is_drawn(name: str, tmp_path: Path) -> None:
    held = config({"name": name}, 6)
    report = mask_report(held, images=32, images_per_batch=16)
    path = mask_page([report, report], [held, held], ["a", "b"], tmp_path / "new" / "page.png")
    with Image.open(path) as picture:
        assert picture.width > 1500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_first_images_keep_their_masks() -> None:
    held = config({"name": "mixture", "maskers": [{"name": "multigroup"}, {"name": "rasterized"}]})
    masks = build_masker(held)(np.arange(20), seed=held.train.seed, epoch=0)
    few = first_masks(held, 20, 5)
    assert set(few.context.image.tolist()) == set(range(5))
    context, targets = masks.context.split(), masks.targets.split()
    kept = [s for s, b in enumerate(masks.targets.image.tolist()) if b < 5]
    assert [t.tolist() for t in few.targets.split()] == [targets[s].tolist() for s in kept]
    mine = few.context.split()
    assert [mine[c].tolist() for c in few.context_of] == [context[masks.context_of[s]].tolist() for s in kept]


def test_samples_come_from_the_data(scenes: Any) -> None:
    held = config({"name": "block"}, data={"image_size": 16, "shards": str(scenes[0].path)})
    images = samples_of(held, 4)
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert not torch.equal(images, samples_of(config({"name": "block"}, 4), 4))


def test_samples_are_opened_as_the_config_says(scenes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def spied(config: Config) -> Any:
        opened.append(open_shards(config))
        return opened[-1]

    monkeypatch.setattr("jepa_kit.evaluation.masks.page.open_shards", spied)
    held = config({"name": "block"}, data={"image_size": 16, "shards": str(scenes[0].path), "retries": 9})
    assert len(samples_of(held, 4)) == 4
    assert [dataset._access.retries for dataset in opened] == [9]


@pytest.mark.parametrize("name", ["images", "images_per_batch"])
def test_rejects_zero_images(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} \(=0\) must be at least 1$"):
        mask_report(config({"name": "block"}), **{name: 0})
