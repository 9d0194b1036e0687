"""Features of pixels as targets: histograms of oriented gradients, and codes of k-means on whitened patches.

B = images    h, w = pixels    N = H * W patches of an image    P = target patches    p = patch size    C = channels
K = centroids
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from jepa_kit.evaluation.patch_codes import NUMBERS, triangle_codes
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interfaces import Encoder
from jepa_kit.interop.tensor_files import read_file
from jepa_kit.registry import TARGETS
from jepa_kit.structures import PatchSets

PARTS = ("mean", "whitening", "centroids", "code_mean", "code_std", "pixel_mean", "pixel_std")
"""Tensors of a file of learn_codes.py."""


@TARGETS.register("hog")
class HOGTarget(nn.Module):
    """Return the histograms of oriented gradients of each target patch (MaskFeat, Wei et al. 2022, section 3.2).

    Gradients are Sobel's, of each channel of the image, which is reflected at its border. Each votes with its magnitude
    for one of ``bins`` orientations in [0, pi), without interpolation. Histograms, one for each cell and channel, have
    L2 norm 1.

    Args:
        patch_size: p; supplied by the recipe.
        bins: orientations.
        cell: side of a cell in pixels, 8 in the paper; it divides p.
        in_chans: C, the encoder's.

    Attributes:
        out_dim: (p / cell)^2 * C * bins, 108 for patches of 16 pixels: by row and column of cells, then channel.

    Raises:
        ValueError: ``bins`` is below 1, or ``cell`` does not divide p.
    """

    needs_encoder = False

    def __init__(self, *, patch_size: int, bins: int = 9, cell: int = 8, in_chans: int = 3) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins (={bins}) must be at least 1")
        if cell < 1 or patch_size % cell:
            raise ValueError(f"cell (={cell}) must divide patch_size (={patch_size})")
        self.bins, self.cell, self.cells = bins, cell, patch_size // cell
        self.out_dim = self.cells**2 * in_chans * bins

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, C, h, w] -> [P, out_dim] float32, packed as ``patches``."""
        x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        down, right = x[..., 2:, :] - x[..., :-2, :], x[..., 2:] - x[..., :-2]
        gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]  # [B, C, h, w]
        gx = right[..., :-2, :] + 2 * right[..., 1:-1, :] + right[..., 2:, :]
        orientation = (torch.atan2(gx, gy) * (self.bins / math.pi)).floor().long() % self.bins
        votes = x.new_zeros(*gx.shape, self.bins).scatter_(-1, orientation[..., None], torch.hypot(gx, gy)[..., None])
        sums = reduce(votes, "b c (h i) (w j) n -> b h w c n", "sum", i=self.cell, j=self.cell)
        n = self.cells
        return patches.gather(rearrange(F.normalize(sums, dim=-1), "b (h i) (w j) c n -> b (h w) (i j c n)", i=n, j=n))


class Codes(nn.Module):
    """Return the codes of an image's patches: normalised pixels [B, 3, h, w] -> [B, N, K], standardised.

    Args:
        tensors: of a file of learn_codes.py.
        patch_size: p.
        stride: pixels between windows.
    """

    def __init__(self, tensors: dict[str, Tensor], patch_size: int, stride: int) -> None:
        super().__init__()
        self.side = side_of(tensors["mean"])
        self.windows, self.stride = patch_size // stride, stride
        for name in PARTS:
            self.register_parameter(name, nn.Parameter(tensors[name].float()))

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(
            images.device.type, enabled=False
        ):  # half precision would round differences of distances away
            return (self.code(images.float()) - self.code_mean) / self.code_std

    def code(self, images: Tensor) -> Tensor:
        """Return the codes before they are standardised, by images and windows averaged over patches."""
        levels = (images * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]) * 255
        before = (self.side - self.stride) // 2  # the windows of a patch lie symmetrically about it
        levels = F.pad(levels, (before, self.side - self.stride - before) * 2, mode="replicate")
        rows = (levels.shape[2] - self.side) // self.stride + 1
        columns = (levels.shape[3] - self.side) // self.stride + 1
        found = []
        for block in levels.split(max(1, NUMBERS // (rows * columns * max(self.centroids.shape)))):
            windows = F.unfold(block, self.side, stride=self.stride).transpose(1, 2)  # [b, rows * columns, 3 side^2]
            codes = triangle_codes(windows, self.mean, self.whitening, self.centroids)
            n = self.windows
            found.append(reduce(codes, "b (h i w j) k -> b (h w) k", "mean", h=rows // n, i=n, j=n))
        return torch.cat(found)


def side_of(mean: Tensor) -> int:
    """Return the side of the windows whose mean [3 * side * side] this is."""
    return math.isqrt(mean.numel() // 3)


@TARGETS.register("patch_codes")
class PatchCodeTarget(nn.Module):
    """Return triangle codes of k-means on whitened windows (Coates, Lee & Ng 2011), averaged over each target patch.

    Windows may be larger than a patch and overlap; those of a patch lie symmetrically about it, and the image is
    continued by its border. Codes are standardised, by the training images' mean and standard deviation.

    Args:
        codes: file that projects/maskfeat/learn_codes.py writes, of the same ``data.mean`` and ``data.std``; it stays
            outside of checkpoints.
        number: K, the number of codes.
        patch_size: p; supplied by the recipe.
        stride: pixels between windows; it divides p.

    Raises:
        ValueError: there is no such file, learn_codes.py did not write it, it has another number of codes, or windows
            that are smaller than ``stride``; or ``stride`` does not divide p.
    """

    needs_encoder = False

    def __init__(self, *, codes: str, number: int, patch_size: int, stride: int = 2) -> None:
        super().__init__()
        if stride < 1 or patch_size % stride:
            raise ValueError(f"stride (={stride}) must divide patch_size (={patch_size})")
        self.out_dim = number
        self.codes = FrozenNetwork(Codes(read_codes(codes, number, stride), patch_size, stride), codes)

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, 3, h, w] -> [P, K] float32, packed as ``patches``."""
        return patches.gather(self.codes(images))


def read_codes(file: str, number: int, stride: int) -> dict[str, Tensor]:
    """Return the tensors that learn_codes.py wrote; see ``PatchCodeTarget`` for errors."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"codes (={file!r}) is not a file: projects/maskfeat/learn_codes.py makes it")
    tensors = read_file(path)[0]
    if missing := [name for name in PARTS if name not in tensors]:
        raise ValueError(f"codes (={file!r}) has no {missing[0]}: projects/maskfeat/learn_codes.py did not write it")
    if len(tensors["centroids"]) != number:
        raise ValueError(f"number (={number}) must be the number of codes of {file} (={len(tensors['centroids'])})")
    if stride > (side := side_of(tensors["mean"])):
        raise ValueError(f"stride (={stride}) must be at most the side of the windows of {file} (={side})")
    return tensors
