"""The encoder of a file as the target encoder of a run: ``target_update: {name: frozen, weights: FILE}``.

B = images    C = channels    P = packed patches    N = patches of an image    D = the teacher's width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kit.interfaces import Encoder
from jepa_kit.interop import hf_vision
from jepa_kit.interop.files import fetch
from jepa_kit.interop.formats import read_encoder
from jepa_kit.registry import READERS
from jepa_kit.structures import Grid, PatchSets

Channels = tuple[float, float, float]


class Teacher(nn.Module):
    """An encoder that is shown a run's images as those of its own training.

    Args:
        encoder: its network, a module.
        patch_size: of the run's encoder. If the teacher's is another, images are resized, so that both have the same
            grid of patches.
        run: (mean, std) of the run's images, each [C]; None if they are not known, and images stay as they are.
        own: (mean, std) of the images in the teacher's training.

    Attributes:
        grid, patch_size, embed_dim, depth: see ``Encoder``; ``patch_size`` is that of the run.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        patch_size: int,
        run: tuple[Channels, Channels] | None,
        own: tuple[Channels, Channels],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        shape = cast(Encoder, encoder)
        self.patch_size, self.own_patch_size = patch_size, shape.patch_size
        self.grid, self.embed_dim, self.depth = shape.grid, shape.embed_dim, shape.depth
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale = shift = None
        if run is not None and run != own:
            (mean, std), (own_mean, own_std) = (torch.tensor(x, dtype=torch.float64) for x in (run, own))
            scale = (std / own_std).float()[:, None, None]  # [C, 1, 1]
            shift = ((mean - own_mean) / own_std).float()[:, None, None]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def images(self, images: Tensor) -> Tensor:
        """Return images [B, C, h, w] of the run as the teacher sees them: its normalisation, and its size."""
        if self.patch_size != self.own_patch_size:
            size = [side // self.patch_size * self.own_patch_size for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        return images

    def forward(self, images: Tensor, patches: PatchSets | None = None) -> Tensor:
        """Encode [B, C, h, w] -> [P, D], packed as ``patches``; all patches if None."""
        out: Tensor = self.encoder(self.images(images), patches)
        return out

    def forward_layers(
        self, images: Tensor, patches: PatchSets | None = None, *, layers: Sequence[int], norm: bool = True
    ) -> list[Tensor]:
        """Return the outputs of some layers, see ``Encoder``."""
        encoder = cast(Encoder, self.encoder)
        return encoder.forward_layers(self.images(images), patches, layers=layers, norm=norm)


@READERS.register("encoder")
def read_teacher(
    *,
    weights: str,
    resize: bool = False,
    patch_size: int | None = None,
    grid: Grid | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Teacher:
    """Return the encoder of a file or folder as target encoder of a run.

    It is the file's target encoder, or its only one. Positions are interpolated if it was trained with another grid.

    Args:
        weights: see ``load_encoder``; or a folder of transformers with a model that jepa_kit does not have
            (``hf_vision.py``).
        resize: whether the teacher's patches may have another size than the run's.
        patch_size, grid: of the run's encoder; None for those of the teacher.
        mean, std: of the run's images; None if they are not known.

    Raises:
        FileNotFoundError, CheckpointError: see ``load_encoder``.
        ValueError: the teacher's patches have another size than the run's, and ``resize`` is false; or the same size,
            and it is true.
    """
    path = fetch(weights)
    encoder: nn.Module
    if hf_vision.is_other_model(path):
        encoder, own = hf_vision.read(path, grid)
    else:
        loaded = read_encoder(weights, None)
        encoder, own = loaded.module("auto"), (loaded.provenance.mean, loaded.provenance.std)
    theirs = cast(Encoder, encoder).patch_size
    ours = theirs if patch_size is None else patch_size
    if (ours != theirs) != resize:
        raise ValueError(
            f"weights (={weights!r}) has patches of {theirs} pixels, and the run's encoder of {ours}: "
            + ("resize (=True) would do nothing" if resize else _advice(theirs, grid))
        )
    known = None if mean is None or std is None else (mean, std)
    return Teacher(encoder, patch_size=ours, run=known, own=own)


def _advice(side: int, grid: Grid | None) -> str:
    """Return what a run does with a teacher whose patches have another size."""
    size = "" if grid is None else f" of {grid[0] * side} x {grid[1] * side} pixels"
    return (
        "the two must see the same grid of patches. Take encoder.patch_size and data.image_size of the teacher, or "
        f"target_update.resize=true, which shows it the same images resized to images{size}"
    )
