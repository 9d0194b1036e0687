"""A torch DataLoader of a folder of image files, with which bench_data.py compares the loader of jepa_kit.

Written from the description of the usual pipeline: open with Pillow, convert to RGB, random resized crop (bilinear),
to a float tensor in [0, 1], normalise, all image by image in the loader; default collation.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder(Dataset):
    """[3, side, side] float32 and a class number, for each .jpg file in a folder of folders."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths = sorted(folder.glob("*/*.jpg"))
        names = sorted({path.parent.name for path in self.paths})
        self.classes = [names.index(path.parent.name) for path in self.paths]
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with open(self.paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, w, h = random_box(image.width, image.height)
        image = image.crop((left, top, left + w, top + h)).resize((self.side, self.side), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)  # [3, side, side]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return x.sub_(mean).div_(std), self.classes[i]


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of a random resized crop of scale (0.3, 1.0)."""
    for _ in range(10):
        area = width * height * random.uniform(0.3, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def folder_batches(folder: Path, *, side: int, batch_size: int, images: int, num_workers: int) -> DataLoader:
    """Return a loader of batches with ``images`` images in total, drawn from a folder."""
    dataset = ImageFolder(folder, side)
    sampler = RandomSampler(dataset, replacement=True, num_samples=images)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)
