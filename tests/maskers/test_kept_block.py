"""Kept-block masking: exact counts, blocks that fit, and rotations."""

from __future__ import annotations

import numpy as np
import pytest

from jepa_kit.maskers import KeptBlock


@pytest.mark.parametrize(("grid", "ratio"), [((4, 4), 0.65), ((14, 14), 0.65), ((5, 31), 0.2), ((31, 5), 0.9)])
@pytest.mark.parametrize("roll", [False, True])
def test_the_context_has_exactly_its_length(grid: tuple[int, int], ratio: float, roll: bool) -> None:
    patches = grid[0] * grid[1]
    masks = KeptBlock(grid=grid, ratio=ratio, roll=roll)(np.arange(300), seed=0, epoch=0)
    assert set(masks.targets.lengths) == {round(ratio * patches)}
    for context, target in zip(masks.context.split(), masks.targets.split(), strict=True):
        assert sorted([*context.tolist(), *target.tolist()]) == list(range(patches))


def test_without_a_roll_the_context_is_a_block_without_its_last_patches() -> None:
    masks = KeptBlock(grid=(14, 14), roll=False)(np.arange(200), seed=0, epoch=0)
    for context in masks.context.split():
        rows, columns = context.numpy() // 14, context.numpy() % 14
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        full = {(r, c) for r in range(rows.min(), rows.max() + 1) for c in range(columns.min(), columns.max() + 1)}
        missing = sorted(full - set(zip(rows.tolist(), columns.tolist(), strict=True)))
        assert len(missing) == height * width - 69
        assert all(r == rows.max() for r, _ in missing)
        assert missing == [(rows.max(), c) for c in range(columns.max() + 1 - len(missing), columns.max() + 1)]


def test_a_roll_rotates_the_same_block() -> None:
    plain, rolled = (KeptBlock(grid=(6, 9), roll=roll)(np.arange(50), seed=1, epoch=2) for roll in (False, True))
    for a, b in zip(plain.context.split(), rolled.context.split(), strict=True):
        cells, turned = np.zeros((2, 6, 9), dtype=bool)
        cells.flat[a.numpy()] = turned.flat[b.numpy()] = True
        shifts = [np.roll(cells, (r, c), (0, 1)) for r in range(6) for c in range(9)]
        assert any(np.array_equal(turned, shift) for shift in shifts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 6)}, "grid (=(3, 6)) must be (rows, columns) with at least 4 of each"),
        (
            {"ratio": 1.0},
            "ratio (=1.0) must leave a target and a context among the 36 patches of a 6 x 6 grid: from 0.0278 to 0.972",
        ),
        (
            {"aspect_ratio": (2, 1)},
            "aspect_ratio (=(2, 1)) must be (low, high), height over width, with 0 < low <= high",
        ),
    ],
)
def test_what_cannot_be_satisfied_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        KeptBlock(**{"grid": (6, 6), **options})
    assert str(error.value) == message
