"""Load a frozen encoder with its preprocessing from any format.

B = images    N = H * W patches of an image    D = width
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from jepa_kit.data.images import decode, to_rgb
from jepa_kit.data.transforms import CenterCrop, normalize, stack
from jepa_kit.encoders.positions import patch_grid
from jepa_kit.errors import ImageError
from jepa_kit.interop.formats import read_encoder
from jepa_kit.interop.weights import EncoderWeights, Positions, TorchBackend

Pictures = Image.Image | str | os.PathLike[str] | NDArray[np.uint8]
"""One image as ``preprocess`` accepts it."""


def opened(image: Pictures) -> Image.Image:
    """Return an image in RGB."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"images must have pixels, and one has {image.height} x {image.width}")
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
        if image.dtype != np.uint8 or not shaped or not image.size:
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
    """A frozen encoder: maps images to patch tokens or to one feature per image.

    Args:
        weights: its weights.
        image_size: (h, w) of ``preprocess``; None for the size in training.
        attention: the backend of ``attend``.

    Attributes:
        about: one line on the encoder: its source, step, shape and licence.
        provenance, architecture: the same as data, with the mean and std of images.
        embed_dim: D.

    Raises:
        ValueError: the patch size does not divide the image size.
    """

    def __init__(
        self,
        weights: EncoderWeights,
        *,
        image_size: tuple[int, int] | None = None,
        attention: TorchBackend = "auto",
    ) -> None:
        super().__init__()
        self.image_size = image_size or weights.architecture.image_size
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
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def preprocess(self, images: Pictures | Sequence[Pictures] | Tensor) -> Tensor:
        """Return images as in training: [B, 3, h, w] float, normalised.

        Args:
            images: one or several Pillow images, paths of image files, or numpy arrays, uint8 [h, w, 3] or grey [h, w]
                (several also as one array [B, h, w, 3]); they are resized (bilinear) and cropped to ``image_size``. Or
                a tensor, uint8 [B, 3, h, w], whose size the patch size divides; it is not resized.

        Raises:
            ValueError: there is no image, a file is not an image, or a tensor or array has another type or shape.
            FileNotFoundError: there is no such file.
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"images must be uint8 [B, 3, h, w], not {images.dtype} of shape {tuple(images.shape)}"
                )
            return normalize(images, self.provenance.mean, self.provenance.std)
        one = not isinstance(images, Iterable) or isinstance(images, Image.Image | str | os.PathLike)
        one = one or (isinstance(images, np.ndarray) and images.ndim < 4)
        several = [images] if one else list(images)  # type: ignore[arg-type]
        if not several:
            raise ValueError("there must be at least one image")
        crop = CenterCrop(image_size=self.image_size)
        batch = stack([crop(opened(image)) for image in several])  # type: ignore[arg-type]
        return normalize(batch.to(next(self.vit.parameters()).device), self.provenance.mean, self.provenance.std)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return tokens [B, N, D] of images from ``preprocess``; positions are interpolated for other sizes.

        Raises:
            ValueError: images are not float (``preprocess`` normalises), or have another shape.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be float and normalised, not {images.dtype}: encoder.preprocess(images) is")
        return self.vit(images).unflatten(0, (len(images), -1))

    def embed(self, images: Tensor) -> Tensor:
        """Return features [B, D], the mean over the patch tokens (I-JEPA, A.2)."""
        return self.forward_features(images).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``forward_features(images)``."""
        return self.forward_features(images)


def _sides(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of a size in pixels, one number for a square; None for None.

    Raises:
        ValueError: it is not one whole number above 0, or two.
    """
    if image_size is None:
        return None
    found = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size,) * 2
    if len(found) != 2 or not all(type(side) is int and side > 0 for side in found):
        raise ValueError(f"image_size (={image_size!r}) must be a number of pixels, or (height, width)")
    return found


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
    """Load a frozen encoder from any format, detected by content; ``about`` describes it.

    No code in the file is run, and no module named in its config is imported.

    Args:
        path_or_url: a file, a folder (a run folder, or one of transformers), an http URL of a file, or a run that ships
            with jepa_kit, as ``reference:ijepa_scenes``.
        encoder: ``target`` (evaluated in the paper), ``context``, or None for what the file contains. Of a reference
            run, ``target`` is the encoder that was evaluated, which is the context encoder if no target encoder learns.
        image_size: size of images, if it is not that of training: pixels, or (h, w).
        sha256: expected checksum of the file in hex.
        num_heads: needed if neither the file nor the encoder's size determines it.
        positions: ``file`` keeps a position table that differs from the formula, as in a fine-tuned model.
        prefix: use the weights whose names begin with it, such as ``teacher.``. Prefixes of torch.compile, FSDP, DDP
            and probes (``_orig_mod.``, ``module.``, ``backbone.``, ...) are always removed.
        allow_unchecked: load a file whose checksum is missing or wrong.
        attention: the backend of ``attend``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, has no known format, or does not contain this encoder.
        ValueError: an option has an invalid value.
    """
    size = _sides(image_size)
    weights = read_encoder(
        path_or_url,
        encoder,
        sha256=sha256,
        num_heads=num_heads,
        positions=positions,
        prefix=prefix,
        allow_unchecked=allow_unchecked,
    )
    return FrozenEncoder(weights, image_size=size, attention=attention)
