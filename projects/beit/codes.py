"""Codes of patches as targets, by a frozen tokenizer: the nearest of K centroids that train_tokenizer.py found.

B = images    P = target patches    p = patch size    K = codes of the vocabulary
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interfaces import Encoder
from jepa_kit.interop.tensor_files import read_file
from jepa_kit.registry import TARGETS
from jepa_kit.structures import PatchSets
from jepa_kit.targets.pixel import PixelTarget


def pixels_of(patch_size: int) -> PixelTarget:
    """Return what the tokenizer sees of a patch: its standardised pixels."""
    return PixelTarget(patch_size=patch_size, norm="patch")


class Tokenizer(nn.Module):
    """Return the code of each patch, the index of the nearest centroid: pixels [P, p * p * 3] -> [P] int64."""

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centroids)  # [K, p * p * 3]

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cdist(pixels, self.centroids).argmin(1)


def read_tokenizer(file: str, vocabulary: int, patch_size: int) -> Tokenizer:
    """Return the tokenizer that train_tokenizer.py wrote; see ``CodeTarget`` for errors."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"tokenizer (={file!r}) is not a file: projects/beit/train_tokenizer.py makes it")
    centroids = read_file(path)[0].get("centroids")
    if centroids is None or centroids.ndim != 2:
        raise ValueError(f"tokenizer (={file!r}) has no centroids: projects/beit/train_tokenizer.py did not write it")
    codes, width = centroids.shape
    if codes != vocabulary:
        raise ValueError(f"vocabulary (={vocabulary}) must be the number of codes of {file} (={codes})")
    if width != pixels_of(patch_size).out_dim:
        side = round((width / 3) ** 0.5)
        raise ValueError(
            f"{file} is of patches of {side} x {side} pixels, but the encoder's are {patch_size} x {patch_size}"
        )
    return Tokenizer(centroids)


@TARGETS.register("codes")
class CodeTarget(nn.Module):
    """Return the code of each target patch (BEiT, Bao et al. 2021, section 2.1).

    A departure: the nearest of K centroids, by k-means on standardised patches, for the code of DALL-E's discrete VAE.

    Args:
        tokenizer: file that projects/beit/train_tokenizer.py writes; it stays outside of checkpoints.
        vocabulary: K, the number of codes.
        patch_size: p; supplied by the recipe.

    Raises:
        ValueError: there is no such file, it is not a tokenizer, or it has another vocabulary or patch size.
    """

    needs_encoder = False

    def __init__(self, *, tokenizer: str, vocabulary: int, patch_size: int) -> None:
        super().__init__()
        self.out_dim = vocabulary
        self.pixels = pixels_of(patch_size)
        self.tokenizer = FrozenNetwork(read_tokenizer(tokenizer, vocabulary, patch_size), tokenizer)

    def forward(self, images: Tensor, patches: PatchSets, encoder: Encoder | None) -> Tensor:
        """[B, 3, h, w] -> [P] int64, packed as ``patches``."""
        return self.tokenizer(self.pixels(images, patches, None))
