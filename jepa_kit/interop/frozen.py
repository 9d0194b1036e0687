"""``load_encoder``: a frozen encoder in one line, from any format, with its own preprocessing.

B = images    N = H * W patches of an image    D = width
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from jepa_kit.data.images import decode, to_rgb
from jepa_kit.data.transforms import CenterCrop, normalize, stack
from jepa_kit.encoders.vit import patch_grid
from jepa_kit.errors import ImageError
from jepa_kit.interop.formats import read_encoder
from jepa_kit.interop.weights import EncoderWeights, Positions, TorchBackend

Pictures = Image.Image | str | os.PathLike[str] | NDArray[np.uint8]
"""What ``preprocess`` takes for one image."""


def _opened(image: Pictures) -> Image.Image:
    """An image in RGB."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
            raise ValueError(f"images must be uint8 [h, w, 3] or [h, w], not {image.dtype} of shape {image.shape}")
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).convert("RGB")
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"images must be of Pillow, paths, numpy arrays or a tensor, not a {type(image).__name__}")
    path = Path(image).expanduser()
    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


class FrozenEncoder(nn.Module):
    """An encoder that nothing trains: images in, tokens or one feature of each image out.

    Args:
        weights: what it is made of.
        image_size: (h, w) that ``preprocess`` gives; None for that of the training.
        attention: the backend of ``attend``.

    Raises:
        ValueError: an image size that the patches do not divide.
    """

    def __init__(
        self,
        weights: EncoderWeights,
        *,
        image_size: tuple[int, int] | None = None,
        attention: TorchBackend = "auto",
    ) -> None:
        super().__init__()
        trained = weights.architecture.image_size
        self.image_size = image_size or trained
        grid = patch_grid(self.image_size, weights.architecture.patch_size)
        self.provenance = weights.provenance
        self.architecture = weights.architecture
        self.about = weights.words()
        if grid != weights.architecture.grid:
            was, now = (f"{h} x {w}" for h, w in (weights.architecture.grid, grid))
            self.about += f"; positions interpolated from {was} to {now} patches"
        self.vit = weights.module(attention).requires_grad_(False)
        self.embed_dim, self.patch_size = weights.architecture.embed_dim, weights.architecture.patch_size
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays as it is evaluated, whatever ``mode`` is."""
        return super().train(False)

    def preprocess(self, images: Pictures | Sequence[Pictures] | Tensor) -> Tensor:
        """What the encoder was trained to see: [B, 3, h, w] float, normalised.

        Args:
            images: one image or several, resized (bilinear) and cropped to ``image_size``: Pillow's, paths of image
                files, or numpy arrays, uint8 [h, w, 3] or grey [h, w] (several also as one array [B, h, w, 3]); or a
                tensor, uint8 [B, 3, h, w], of a size that the patches divide, which is kept.

        Raises:
            ValueError: a tensor or an array of another kind, a file that is no image, or no image.
            FileNotFoundError: there is no such file.
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"images must be uint8 [B, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}"
                )
            return normalize(images, self.provenance.mean, self.provenance.std)
        one = isinstance(images, Image.Image | str | os.PathLike) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        )
        several = [images] if one else list(images)  # type: ignore[arg-type]
        if not several:
            raise ValueError("images must hold at least one image")
        crop = CenterCrop(image_size=self.image_size)
        batch = stack([crop(_opened(image)) for image in several])  # type: ignore[arg-type]
        return normalize(batch.to(self.vit.pos_embed.device), self.provenance.mean, self.provenance.std)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, N, D] of images that ``preprocess`` made; other sizes get interpolated positions.

        Raises:
            ValueError: images that are not float (``preprocess`` normalises), or of another shape.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be float and normalised, not {images.dtype}: encoder.preprocess(images) is")
        return self.vit(images).unflatten(0, (len(images), -1))

    def embed(self, images: Tensor) -> Tensor:
        """Features [B, D]: the mean over the patch tokens (I-JEPA, A.2)."""
        return self.forward_features(images).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """As ``forward_features``."""
        return self.forward_features(images)


def load_encoder(
    path_or_url: str | os.PathLike[str],
    encoder: str | None = "target",
    image_size: int | tuple[int, int] | None = None,
    *,
    sha256: str | None = None,
    num_heads: int | None = None,
    positions: Positions = "formula",
    prefix: str | None = None,
    allow_unchecked: bool = False,
    attention: TorchBackend = "auto",
) -> FrozenEncoder:
    """Load a frozen encoder from any format, recognised by its content; ``about`` describes it.

    Nothing in the file is executed, and nothing that its config names is imported.

    Args:
        path_or_url: a file, a folder (a run's, or one of transformers), or an http address of a file.
        encoder: ``target`` (which the paper evaluates), ``context``, or None for what the file holds.
        image_size: of the images to come, where it is not that of the training: pixels, or (h, w).
        sha256: of the file, in hex, where it is known.
        num_heads: where neither the file nor the size of the encoder tells it.
        positions: ``file`` keeps a position table that is not the formula's, as a fine-tuned model has.
        prefix: takes the names of weights that begin with it, without it, as ``teacher.``; what torch.compile, FSDP,
            DDP and probes put before names (``_orig_mod.``, ``module.``, ``backbone.``, ...) comes off without it.
        allow_unchecked: loads a file whose checksum is missing or wrong.
        attention: the backend of ``attend``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, is none of the formats, or does not hold this encoder.
        ValueError: an option outside its values.
    """
    weights = read_encoder(
        path_or_url,
        encoder,
        sha256=sha256,
        num_heads=num_heads,
        positions=positions,
        prefix=prefix,
        allow_unchecked=allow_unchecked,
    )
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return FrozenEncoder(weights, image_size=size, attention=attention)
