"""Fixed 2-D sine-cosine positions (Vaswani et al. 2017; in two dimensions MAE, He et al. 2022, and I-JEPA).

N = H * W patches in row-major order     D = width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.structures import Grid


def sincos_2d(embed_dim: int, grid: Grid) -> Tensor:
    """Return the position table of a grid.

    The first half of the width encodes the column, the second half the row; each half is the sine, then
    the cosine of position / 10000**(i / (D / 4)). Computed in float64 and stored in float32, as the
    released code does.

    Returns:
        [N, D] float32.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of 4.
    """
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"embed_dim (={embed_dim}) must be a multiple of 4: sine and cosine of rows and columns")
    h, w = grid
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
    row = torch.arange(h, dtype=torch.float64).repeat_interleave(w)  # [N]
    column = torch.arange(w, dtype=torch.float64).repeat(h)  # [N]
    angles = [x[:, None] * frequency for x in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def interpolate_pos_embed(table: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """Return positions for another grid by bicubic interpolation, as ViT and DINO do.

    Args:
        table: [N, D] for ``from_grid``.

    Returns:
        [N', D] for ``to_grid``, in the dtype of ``table``.
    """
    if from_grid == to_grid:
        return table
    image = table.T.reshape(1, -1, *from_grid)
    image = image if image.dtype == torch.float64 else image.float()
    image = F.interpolate(image, size=to_grid, mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.to(table.dtype).contiguous()
