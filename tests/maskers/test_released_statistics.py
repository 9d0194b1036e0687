"""Maskers against numbers of masks that released generators drew (fixtures/methods/mask_statistics.json).

Each entry of the fixture gives statistics of 4,000 images. A masker draws as many, and every number is compared by a
z-test of two samples, whose spread is that of our images; the distribution of the counts by a chi-square test. The
level is 1 % for all numbers of an entry at once (Bonferroni).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jepa_kit.interfaces import Masker
from jepa_kit.maskers import Blockwise, InverseBlock, KeptBlock, Random

LEVEL = 0.01
ENTRIES = json.loads((Path(__file__).parents[1] / "fixtures/methods/mask_statistics.json").read_text())["masks"]


def entries(method: str) -> list[dict[str, Any]]:
    return [entry for entry in ENTRIES if entry["method"] == method]


def drawn(masker: Masker, grid: tuple[int, int], images: int) -> np.ndarray:
    """[images, H, W]: the targets of each image."""
    targets = masker(np.arange(images), seed=0, epoch=0).targets
    masked = np.zeros((images, grid[0] * grid[1]), dtype=bool)
    masked[targets.image_of_token, targets.index] = True
    return masked.reshape(-1, *grid)


def z_scores(masked: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    """|z| of every number of an entry that is a mean over images; inf if ours has no spread and differs."""
    ours = {
        "masked_mean": masked.sum((1, 2))[:, None],
        "masked_share_by_row": masked.mean(2),
        "masked_share_by_column": masked.mean(1),
        "kept_share_by_row": 1 - masked.mean(2),
        "kept_share_by_column": 1 - masked.mean(1),
        "share_of_neighbours_in_a_row_that_agree": (masked[:, :, 1:] == masked[:, :, :-1]).mean((1, 2))[:, None],
        "share_of_neighbours_in_a_column_that_agree": (masked[:, 1:] == masked[:, :-1]).mean((1, 2))[:, None],
    }
    compared = [key for key in ours if key in entry]
    assert len(compared) >= 2
    x = np.concatenate([ours[key] for key in compared], axis=1)  # [images, numbers]
    theirs = np.concatenate([np.atleast_1d(entry[key]) for key in compared])
    error = x.std(0, ddof=1) * np.sqrt(1 / len(x) + 1 / entry["images"])
    difference = np.abs(x.mean(0) - theirs)
    return np.where(difference < 1e-9, 0.0, difference / np.maximum(error, 1e-12))


def bound(z: np.ndarray) -> float:
    return float(stats.norm.isf(LEVEL / 2 / len(z)))


def p_of_counts(masked: np.ndarray, entry: dict[str, Any]) -> float:
    """p of a chi-square test that our counts have the recorded distribution; 1 if all counts are one number."""
    counts = masked.sum((1, 2))
    shares = {int(count): share for count, share in entry["most_frequent_counts"].items()}
    table = np.array([[(counts == count).sum(), round(share * entry["images"])] for count, share in shares.items()])
    rest = [len(counts), entry["images"]] - table.sum(0)
    table = np.vstack([table, rest]) if rest.sum() else table
    return 1.0 if len(table) == 1 else float(stats.chi2_contingency(table).pvalue)


def check(masker: Masker, entry: dict[str, Any]) -> None:
    masked = drawn(masker, tuple(entry["grid"]), entry["images"])
    z = z_scores(masked, entry)
    assert z.max() < bound(z)
    if "most_frequent_counts" in entry:
        assert p_of_counts(masked, entry) > LEVEL
        assert masked.sum((1, 2)).max() == entry["masked_max"]


def blockwise(entry: dict[str, Any], **options: Any) -> Blockwise:
    """Our masker of an entry of BEiT or DINOv2; a block of DINOv2 has at least 4 patches."""
    patches = entry["grid"][0] * entry["grid"][1]
    ratio, least = entry["num_masking_patches"] / patches, entry.get("min_num_patches", 4) / patches
    return Blockwise(grid=tuple(entry["grid"]), ratio=ratio, min_scale=least, **{"count": "at_most", **options})


@pytest.mark.parametrize("entry", [*entries("BEiT"), *entries("DINOv2")], ids=lambda e: f"{e['num_masking_patches']}")
def test_blockwise_draws_as_beit_and_dinov2(entry: dict[str, Any]) -> None:
    check(blockwise(entry), entry)


def test_exact_counts_are_a_departure() -> None:
    """So the tests see the difference between the two counts: blocks that are cut or clipped."""
    entry = entries("BEiT")[1]
    z = z_scores(drawn(blockwise(entry, count="exact"), (14, 14), 4000), entry)
    assert z.max() > 2 * bound(z)


def test_blockwise_draws_as_ibot_but_for_a_rounding() -> None:
    """iBOT rounds each image's number of patches down, we to the nearest: with half a patch less the two agree."""
    entry = next(e for e in entries("iBOT") if e["pred_ratio"] == 0.3)
    low, high = ((0.3 + sign * 0.2) - 0.5 / 196 for sign in (-1, 1))
    masked = drawn(Blockwise(grid=(14, 14), ratio=(low, high), min_scale=16 / 196, count="at_most"), (14, 14), 4000)
    z = z_scores(masked, entry)
    assert z.max() < bound(z)
    assert masked.sum((1, 2)).max() in (97, 98)
    error = entry["masked_std"] * (1 / 4000) ** 0.5  # of the difference of two deviations of normal numbers
    assert abs(masked.sum((1, 2)).std() - entry["masked_std"]) < stats.norm.isf(LEVEL / 2) * error


@pytest.mark.parametrize("entry", entries("data2vec 2.0"), ids=lambda e: f"{e['mask_prob']}")
def test_inverse_block_draws_as_data2vec_2(entry: dict[str, Any]) -> None:
    options = {"ratio": entry["mask_prob"], "block_size": entry["mask_length"], "adjust": entry["mask_prob_adjust"]}
    masker = InverseBlock(grid=tuple(entry["grid"]), **options)
    check(masker, entry)
    assert masker.context_length == entry["kept_patches_per_image"]


@pytest.mark.parametrize("entry", entries("CAPI"), ids=lambda e: f"roll={e['roll']}")
def test_kept_block_draws_as_capi(entry: dict[str, Any]) -> None:
    grid = tuple(entry["grid"])
    check(KeptBlock(grid=grid, ratio=entry["masked"] / (grid[0] * grid[1]), roll=entry["roll"]), entry)


@pytest.mark.parametrize("entry", entries("SimMIM"), ids=lambda e: f"{e['mask_patch_size']} px")
def test_random_units_are_drawn_as_in_simmim(entry: dict[str, Any]) -> None:
    side = entry["model_patch_size"]
    masker = Random(
        grid=tuple(entry["grid"]), ratio=entry["mask_ratio"], unit=entry["mask_patch_size"], patch_size=side
    )
    check(masker, entry)
