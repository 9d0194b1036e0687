"""``load_encoder``: a frozen encoder in one line, from any format, with its own preprocessing.

B = images    N = H * W patches of an image    D = width
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from jepa_kit.data.transforms import CentreCrop, normalize, stack
from jepa_kit.encoders.vit import patch_grid
from jepa_kit.interop.formats import read_encoder
from jepa_kit.interop.weights import EncoderWeights, Positions


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
        attention: Literal["auto", "sdpa", "reference"] = "auto",
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

    def preprocess(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """What the encoder was trained to see: [B, 3, h, w] float, normalised.

        Args:
            images: Pillow's, resized (bilinear) and cropped to ``image_size``; or uint8 [B, 3, h, w] of a size that the
                patches divide, which is kept.

        Raises:
            ValueError: a tensor of another kind, or no image.
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"images must be uint8 [B, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}"
                )
            return normalize(images, self.provenance.mean, self.provenance.std)
        several = [images] if isinstance(images, Image.Image) else list(images)
        if not several:
            raise ValueError("images must hold at least one image")
        crop = CentreCrop(image_size=self.image_size)
        batch = stack([crop(image.convert("RGB")) for image in several])
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
    attention: Literal["auto", "sdpa", "reference"] = "auto",
) -> FrozenEncoder:
    """A frozen encoder from any format, recognised by its content; ``about`` says in words what it is.

    Args:
        path_or_url: a file, a folder (a run's, or one of transformers), or an http address of a file.
        encoder: ``target`` (which the paper evaluates), ``context``, or None for what the file holds.
        image_size: of the images to come, where it is not that of the training: pixels, or (h, w).
        sha256: of the file, in hex, where it is known.
        num_heads: where neither the file nor the size of the encoder tells it.
        positions: ``file`` keeps a position table that is not the formula's, as a fine-tuned model has.
        attention: the backend of ``attend``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, is none of the formats, or does not hold this encoder.
        ValueError: an option outside its values.
    """
    weights = read_encoder(path_or_url, encoder, sha256=sha256, num_heads=num_heads, positions=positions)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return FrozenEncoder(weights, image_size=size, attention=attention)
