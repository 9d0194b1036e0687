"""The position table against its formula, the released code's table, and cubic convolution written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from jepa_kit.encoders.positions import interpolate_pos_embed, rotary_angles, sincos_2d

FIXTURE = Path(__file__).parents[1] / "fixtures" / "released_step.safetensors"


@pytest.mark.parametrize(("dim", "grid"), [(16, (3, 5)), (8, (4, 2)), (4, (1, 1)), (384, (2, 3))])
def test_is_sine_and_cosine_of_column_then_row(dim: int, grid: tuple[int, int]) -> None:
    h, w = grid
    table = sincos_2d(dim, grid)
    assert table.shape == (h * w, dim)
    assert table.dtype == torch.float32
    quarter = dim // 4
    for patch in range(h * w):
        row, column = divmod(patch, w)
        expected = []
        for place in (column, row):
            expected += [math.sin(place / 10000 ** (i / quarter)) for i in range(quarter)]
            expected += [math.cos(place / 10000 ** (i / quarter)) for i in range(quarter)]
        assert table[patch].tolist() == pytest.approx(expected, abs=6e-8)


@pytest.mark.parametrize("name", ["init/encoder/pos_embed", "init/predictor/predictor_pos_embed"])
def test_is_the_released_codes_table(name: str) -> None:
    with safe_open(FIXTURE, framework="pt") as tensors:
        released = tensors.get_tensor(name)[0]  # [N, D]
    side = math.isqrt(len(released))
    assert float((sincos_2d(released.shape[1], (side, side)).double() - released).abs().max()) < 1e-10


def test_on_the_meta_device_a_table_has_its_shape_alone():
    with torch.device("meta"):
        table = sincos_2d(8, (2, 3))
    wanted = sincos_2d(8, (2, 3)).to("meta")
    assert (table.shape, table.dtype, table.device) == (wanted.shape, wanted.dtype, wanted.device)


def test_every_patch_has_a_position_of_its_own() -> None:
    table = sincos_2d(32, (16, 9))
    assert len(torch.unique(table, dim=0)) == 16 * 9


@pytest.mark.parametrize("dim", [0, -4, 2, 6, 30])
def test_refuses_a_width_that_is_not_a_multiple_of_four(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"embed_dim \(={dim}\) must be a multiple of 4: sine and cosine"):
        sincos_2d(dim, (2, 2))


def cubic_convolution(values: np.ndarray, size: int) -> np.ndarray:
    """Keys' kernel with a = -0.75 along axis 0, pixel centres aligned by area, edges repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    old = len(values)
    out = np.zeros((size, *values.shape[1:]))
    for i in range(size):
        at = (i + 0.5) * old / size - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            out[i] += kernel(at - j) * values[min(max(j, 0), old - 1)]
    return out


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((3, 5), (5, 7)), ((6, 4), (4, 6)), ((7, 7), (3, 14))])
def test_other_grids_are_cubic_convolutions(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(old[0] * old[1], 3, dtype=torch.float64)
    rows = cubic_convolution(table.numpy().reshape(*old, 3), new[0])
    expected = cubic_convolution(rows.swapaxes(0, 1), new[1]).swapaxes(0, 1).reshape(-1, 3)
    out = interpolate_pos_embed(table, old, new)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-13)


def test_the_same_grid_gives_the_table_itself() -> None:
    table = sincos_2d(16, (4, 6))
    assert interpolate_pos_embed(table, (4, 6), (4, 6)) is table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert interpolate_pos_embed(sincos_2d(16, (4, 4)).to(dtype), (4, 4), (6, 6)).dtype == dtype


@pytest.mark.parametrize(("width", "part"), [(6, 2), (14, 4), (22, 6), (24, 8)])
def test_rotary_video_turns_thirds_of_the_channels(width: int, part: int) -> None:
    """Time, which is 0, row and column; both channels of a pair take the next frequency; the rest stays."""
    angles = rotary_angles(width, (3, 4), 10000.0, torch.empty(0, dtype=torch.float64), "rotary_video")
    expected = torch.zeros(12, width, dtype=torch.float64)
    for patch in range(12):
        for third, place in enumerate((0, patch // 4, patch % 4)):
            for channel in range(part):
                frequency = 10000.0 ** (-(channel % (part // 2)) / (part / 2))
                expected[patch, third * part + channel] = place * frequency
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-14)
