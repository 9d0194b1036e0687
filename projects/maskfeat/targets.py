"""Features of pixels as targets: histograms of oriented gradients, and codes of k-means on whitened patches.

B = images    h, w = pixels    N = H * W patches of an image    P = target patches    p = patch size    C = channels
K = centroids
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jepa_kit.evaluation.patch_codes import NUMBERS, triangle_codes
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interfaces import Encoder
from jepa_kit.interop.tensor_files import read_file
from jepa_kit.registry import TARGETS
from jepa_kit.structures import PatchSets

BLOCK = 2**27
"""Numbers in the largest array of a block of images on a GPU (0.5 GB); on a CPU ``NUMBERS``."""


@TARGETS.register("hog")
class HOGTarget(nn.Module):
    """Return the histograms of oriented gradients of each target patch (MaskFeat, Wei et al. 2022).

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
        magnitude = torch.hypot(gx, gy)
        # an orientation at a time, so that votes of all pixels for all of them are not kept
        votes = [F.avg_pool2d(magnitude * (orientation == k), self.cell) for k in range(self.bins)]
        histograms = F.normalize(torch.stack(votes, -1), dim=-1)
        return patches.gather(
            rearrange(histograms, "b c (h i) (w j) n -> b (h w) (i j c n)", i=self.cells, j=self.cells)
        )


class Codes(nn.Module):
    """Return the code vectors of an image's patches: normalised pixels [B, 3, h, w] -> [B, N, K] float32.

    Args:
        tensors: ``mean``, ``whitening`` and ``centroids`` of windows, see
            ``jepa_kit.evaluation.patch_codes.PatchCodes``; ``code_mean`` and ``code_std`` [K] of code vectors.
        patch_size: p.
        stride: pixels between windows.
        mean, std: [3], by which the images were normalised.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        patch_size: int,
        stride: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.side = math.isqrt(len(tensors["mean"]) // 3)
        self.windows, self.stride = patch_size // stride, stride
        self.mean, self.whitening, self.centroids, self.code_mean, self.code_std = (
            nn.Parameter(tensors[name]) for name in ("mean", "whitening", "centroids", "code_mean", "code_std")
        )
        self.pixel_mean, self.pixel_std = (nn.Parameter(torch.tensor(x)[:, None, None]) for x in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):  # half precision would round distances away
            levels = (images.float() * self.pixel_std + self.pixel_mean) * 255
            before = (self.side - self.stride) // 2
            levels = F.pad(levels, (before, self.side - self.stride - before) * 2, mode="replicate")
            rows, columns = ((length - self.side) // self.stride + 1 for length in levels.shape[2:])
            most = NUMBERS if images.device.type == "cpu" else BLOCK
            n, found = self.windows, []
            for block in levels.split(max(1, most // (rows * columns * max(self.centroids.shape)))):
                windows = F.unfold(block, self.side, stride=self.stride)  # [b, 3 side^2, rows * columns]
                codes = triangle_codes(windows.transpose(1, 2), self.mean, self.whitening, self.centroids)
                # one axis, then the other: over both at once torch takes six times as long on a CPU
                found.append(codes.unflatten(1, (rows // n, n, -1, n)).mean(4).mean(2).flatten(1, 2))
            return (torch.cat(found) - self.code_mean) / self.code_std


@TARGETS.register("patch_codes")
class PatchCodeTarget(nn.Module):
    """Return triangle codes of k-means on whitened windows (Coates, Lee & Ng 2011), averaged over each target patch.

    A code vector has a number for each centroid. Windows may be larger than a patch and overlap. Those of a patch lie
    symmetrically about it (if side minus stride is odd, a pixel further to the right and below), and the image is
    continued by its border. Code vectors are standardised, by the training images' mean and deviation.

    Windows of 6 pixels suit small images: in one of 224 they are as many as pixels / stride^2, and see little. With
    ``train.precision: tf32`` distances are rounded as other products are.

    Args:
        codes: file that projects/maskfeat/learn_codes.py writes; it stays outside of checkpoints.
        number: K, the number of centroids.
        patch_size: p; supplied by the recipe.
        mean, std: of the channels of the images; supplied by the recipe.
        stride: pixels between windows; it divides p.

    Raises:
        ValueError: there is no such file, learn_codes.py did not write it, or it is for another number, patch size or
            stride; or ``stride`` does not divide p.
    """

    needs_encoder = False

    def __init__(
        self,
        *,
        codes: str,
        number: int,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        stride: int = 2,
    ) -> None:
        super().__init__()
        if stride < 1 or patch_size % stride:
            raise ValueError(f"stride (={stride}) must divide patch_size (={patch_size})")
        self.out_dim = number
        tensors = read_codes(codes, number=number, patch_size=patch_size, stride=stride)
        network = Codes(tensors, patch_size=patch_size, stride=stride, mean=mean, std=std)
        self.codes = FrozenNetwork(network, codes)

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, 3, h, w] -> [P, K] float32, packed as ``patches``."""
        return patches.gather(self.codes(images))


def read_codes(file: str, **sizes: int) -> dict[str, Tensor]:
    """Return the tensors that learn_codes.py wrote, for these sizes; see ``PatchCodeTarget`` for errors."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"codes (={file!r}) is not a file: projects/maskfeat/learn_codes.py makes it")
    tensors, written = read_file(path)
    for name, value in sizes.items():
        if name not in written:
            raise ValueError(
                f"codes (={file!r}) does not say its {name}: projects/maskfeat/learn_codes.py did not write it"
            )
        if written[name] != str(value):
            raise ValueError(
                f"{name} (={value}) must be that of {file} (={written[name]}); learn_codes.py makes another"
            )
    return tensors
