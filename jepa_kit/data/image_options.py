"""How images are read for an evaluation, as one value for every function that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jepa_kit.config.data_section import DataConfig
from jepa_kit.data.images import MAX_PIXELS, DecoderName
from jepa_kit.registry import check_choice
from jepa_kit.structures import Precision


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are read, normalised and passed through a network.

    Args:
        image_size: (h, w) of the centre crop.
        batch_size: images at a time if nothing is trained.
        num_workers: loader processes; 0 loads in this process.
        decoder: ``pillow`` or ``fast``, see ``jepa_kit.data.transforms.Pipeline``.
        max_pixels: an image of more rows times columns is rejected.
        mean, std: of the channels, for pixel values in [0, 1]; ImageNet's by default.
        precision: of the network's matrix products.

    Raises:
        ValueError: a batch of no image, a negative number of workers, or an unknown precision.
    """

    image_size: tuple[int, int]
    batch_size: int = 256
    num_workers: int = 0
    decoder: DecoderName = "pillow"
    max_pixels: int = MAX_PIXELS
    mean: Sequence[float] = DataConfig.mean
    std: Sequence[float] = DataConfig.std
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least {least}")
        check_choice("precision", self.precision, Precision)

    @classmethod
    def from_config(
        cls, data: DataConfig, *, batch_size: int = 256, num_workers: int = 0, precision: Precision = "float32"
    ) -> ImageOptions:
        """Return the options that a run's ``data`` section has."""
        return cls(
            image_size=data.image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            decoder=data.decoder,
            max_pixels=data.max_pixels,
            mean=data.mean,
            std=data.std,
            precision=precision,
        )
