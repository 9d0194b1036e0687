"""``synthetic:scenes``: rendered rooms with three labels and a mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

from jepa_kit.data.images import encode_png
from jepa_kit.data.segmentation import encode_mask
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.sources.base import Source, fingerprint, single_split
from jepa_kit.scenes.scenes import CLASSES, SHAPE_NAMES, render

MASK_CLASSES = ("background", *SHAPE_NAMES)


class Scenes(Source):
    """Scenes 0 to num_scenes - 1 of a seed, as PNG, with their labels and the mask of their shapes.

    Args:
        num_scenes: number of scenes.
        size: (height, width) in pixels.
        seed: of the series.
        masks: whether samples have a mask.

    Raises:
        ValueError: a number, size or seed out of range.
    """

    def __init__(self, *, num_scenes: int, size: tuple[int, int], seed: int, masks: bool = True) -> None:
        if num_scenes < 1:
            raise ValueError(f"num_scenes (={num_scenes}) must be at least 1")
        render(seed, 0, size)  # raises an error for a wrong size or seed here, not in a worker
        self.num_scenes, self.size, self.seed, self.masks = num_scenes, size, seed, masks
        self.classes = CLASSES
        self.mask_classes = MASK_CLASSES if masks else ()
        self.splits, self.mixed = single_split(num_scenes), True

    def name(self, i: int) -> str:
        return f"scene-{self.seed}-{i:08d}"

    def sample(self, i: int) -> Sample:
        scene = render(self.seed, i, self.size)
        # 0 for the room, else 1 + the shape of the solid, at the middle of each pixel
        shapes = np.concatenate([[0], scene.shapes + 1]).astype(np.uint8)[scene.mask]
        mask = encode_mask(shapes) if self.masks else None
        return Sample(self.name(i), "png", encode_png(Image.fromarray(scene.image)), scene.labels, mask)

    def fingerprint(self) -> str:
        return fingerprint(["scenes", self.num_scenes, self.size, self.seed, self.masks])
