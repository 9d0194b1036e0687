"""Positions of patches: fixed tables, their interpolation, rotations of queries and keys, and biases of scores.

N = H * W patches of an image    D = width    h = heads    d = D / h    P = packed tokens of all sets    S = sets
k = prefix tokens of a set (class token, registers), which come before its patches
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.encoders.prefix import add_prefix
from jepa_kit.patch_sets import PatchSets
from jepa_kit.set_lengths import SetLengths, token_pairs
from jepa_kit.structures import Grid


def patch_grid(image_size: tuple[int, int], patch_size: int) -> Grid:
    """Return (H, W), the patch grid of an image.

    Raises:
        ValueError: the patch size does not divide both sides.
    """
    h, w = image_size
    if patch_size < 1 or h < patch_size or w < patch_size or h % patch_size or w % patch_size:
        raise ValueError(f"patch_size (={patch_size}) must divide the height (={h}) and the width (={w}) of an image")
    return h // patch_size, w // patch_size


def rows_and_columns(grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each patch, two [N] int64."""
    patch = torch.arange(grid[0] * grid[1], device=device)
    return patch // grid[1], patch % grid[1]


def sincos_2d(embed_dim: int, grid: Grid) -> Tensor:
    """Return the fixed sine-cosine positions of a grid (Vaswani et al. 2017; in two dimensions MAE, He et al. 2022).

    The first half of the width encodes the column, the second half the row; each half is the sine, then the cosine of
    position / 10000**(i / (D / 4)). Computed in float64 and stored in float32, as the released code does.

    Returns:
        [N, D] float32.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of 4.
    """
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"embed_dim (={embed_dim}) must be a multiple of 4: sine and cosine of rows and columns")
    if torch.empty(0).device.type == "meta":  # a network of which only the shapes count
        return torch.empty(grid[0] * grid[1], embed_dim, dtype=torch.float32)
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
    row, column = rows_and_columns(grid)
    angles = [x[:, None] * frequency for x in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def interpolate_pos_embed(table: Tensor, from_grid: Grid, to_grid: Grid, offset: float = 0.0) -> Tensor:
    """Return positions for another grid by bicubic interpolation, as ViT and DINO do.

    Args:
        table: [N, D] for ``from_grid``.
        offset: added to both sides of ``to_grid`` when the distance between samples is computed, see ``ViT``.

    Returns:
        [N', D] for ``to_grid``, in the dtype of ``table``.
    """
    if from_grid == to_grid:
        return table
    image = table.T.reshape(1, -1, *from_grid)
    image = image if image.dtype == torch.float64 else image.float()
    if offset:
        scale = [(to + offset) / side for side, to in zip(from_grid, to_grid, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        image = F.interpolate(image, size=to_grid, mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.to(table.dtype).contiguous()


Rotary = Literal["rotary", "rotary_video"]


def rotary_angles(head_dim: int, grid: Grid, base: float, like: Tensor, kind: Rotary = "rotary") -> Tensor:
    """Return the angles by which channels of queries and keys are rotated, one for each channel.

    ``rotary`` (Heo et al. 2024): channels 2i and 2i + 1 are a pair, which is rotated by position / base**(i / (d / 4));
    the first half of the pairs encodes the column, the second half the row.

    ``rotary_video`` (V-JEPA 2, Assran et al. 2025, as released): three parts of m = 2 * (d // 6) channels encode time,
    row and column; the channels after them stay as they are, and so does time, which is 0 in an image. The frequencies
    base**(-i / (m / 2)) follow each other twice in a part, so that channels 2i and 2i + 1 of a pair have two different
    angles: not a rotation in the strict sense, a slip that the released weights have learned with.

    Args:
        like: a tensor of the device and the dtype.

    Returns:
        [N, d].

    Raises:
        ValueError: ``head_dim`` is not a multiple of 4; for ``rotary_video``, odd or below 6.
    """
    row, column = rows_and_columns(grid, like.device)
    if kind == "rotary_video":
        part = 2 * (head_dim // 6)
        if not part or head_dim % 2:
            raise ValueError(
                f"positions (='rotary_video') need heads whose width (={head_dim}) is even and at least 6: pairs of "
                "channels for time, rows and columns"
            )
        turns = [x[:, None] * _frequencies(part // 2, base, like) for x in (row, column)]  # 2 x [N, m/2]
        turned = torch.cat([turns[0], turns[0], turns[1], turns[1]], dim=1)  # [N, 2 * m]
        return F.pad(turned, (part, head_dim - 3 * part))
    if head_dim < 4 or head_dim % 4:
        raise ValueError(
            f"positions (='rotary') need heads whose width (={head_dim}) is a multiple of 4: pairs of channels for "
            "rows and columns"
        )
    pairs = torch.cat([x[:, None] * _frequencies(head_dim // 4, base, like) for x in (column, row)], dim=1)  # [N, d/2]
    return pairs.repeat_interleave(2, dim=1)


def _frequencies(count: int, base: float, like: Tensor) -> Tensor:
    """Return base**(-i / count) for i = 0, 1, ..., [count]."""
    return base ** -(torch.arange(count, dtype=like.dtype, device=like.device) / count)


class RelativeBias(nn.Module):
    """Learned biases of attention scores, one for each head and relative position of key and query (BEiT, Bao et al.
    2022, section 2.4 of its code, after T5 and Swin).

    Prefix tokens have three biases: from a prefix token to a patch, from a patch to a prefix token, and between two
    prefix tokens.

    Args:
        grid: (H, W) patches of training images.
        num_heads: h.
        tables: number of tables, 1 for all blocks or one for each.
        prefix: k.
    """

    def __init__(self, grid: Grid, num_heads: int, *, tables: int, prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if prefix else 0)
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(rows, num_heads)) for _ in range(tables))
        """Each [(2H - 1) * (2W - 1), h], by row, then column of the query minus those of the key; then the three biases
        of prefix tokens."""

    def forward(self, patches: PatchSets | None, lengths: SetLengths, grid: Grid) -> Iterator[Tensor]:
        """Yield the bias of each table for ``attend``: [h, L, L] if every set is all patches of its image, else flat.

        Args:
            patches: the sets without their prefix tokens; None for all patches of each image.
            lengths: of the sets with their prefix tokens.
            grid: of the images, which may be smaller than in training.

        Raises:
            ValueError: the grid is larger than in training.
        """
        rows = self.rows(grid, lengths.device)  # [k + N, k + N]
        if patches is not None and not patches.lengths.whole:
            own = torch.arange(self.prefix, device=lengths.device).repeat(len(lengths)).view(len(lengths), -1, 1)
            place = add_prefix(own, patches.index[:, None] + self.prefix, patches.lengths).squeeze(1)  # [P]
            i, j = token_pairs(lengths)
            rows = rows.flatten().index_select(0, place[i] * len(rows) + place[j])
        for table in self.tables:
            yield F.embedding(rows, table).movedim(-1, 0).clone(memory_format=torch.contiguous_format)

    def rows(self, grid: Grid, device: torch.device) -> Tensor:
        """Return the row of the table for each pair of a query and a key of a whole image, [k + N, k + N]."""
        if grid[0] > self.grid[0] or grid[1] > self.grid[1]:
            raise ValueError(
                f"images with a grid of {grid[0]} x {grid[1]} patches are larger than those of training "
                f"({self.grid[0]} x {self.grid[1]}), for which relative_bias has its tables"
            )
        (row, column), k = rows_and_columns(grid, device), self.prefix
        down = row[:, None] - row + self.grid[0] - 1
        right = column[:, None] - column + self.grid[1] - 1
        index = down * (2 * self.grid[1] - 1) + right  # [N, N]
        if not k:
            return index
        last = len(self.tables[0])
        n = len(index)
        first = torch.cat([index.new_full((k, k), last - 1), index.new_full((k, n), last - 3)], dim=1)
        others = torch.cat([index.new_full((n, k), last - 2), index], dim=1)
        return torch.cat([first, others])
