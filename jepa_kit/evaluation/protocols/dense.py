"""Segmentation by a linear head on patch tokens.

N  images    n = H * W  patches    h, w  pixels of the image    D  width    K  classes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    Features,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_values,
    choose_holdout,
)
from jepa_kit.evaluation.protocols.heads import HeadGrid, Recipe, fit_best
from jepa_kit.evaluation.protocols.linear import SINGLE_SETTING, Head, grid
from jepa_kit.rng import IntArray, Stream, generator

IGNORED = 255
"""Value of unlabelled pixels."""
Masks = NDArray[np.uint8]


@PROTOCOLS.register("dense")
@dataclass(kw_only=True)
class Dense(Probe):
    """Segmentation: a linear map from each patch token to its pixels' classes.

    Source: the linear segmentation probe of DINOv2 (Oquab et al. 2023, arXiv 2304.07193, section 7.4): a linear layer
    on patch tokens, its logits upsampled to the image. Departures: the loss is the cross entropy per patch against the
    fraction of its pixels that each class has, which equals the mean over pixels with logits constant in a patch;
    logits are upsampled (bilinear) for the test only. The head and learning rate with the highest accuracy on held-out
    patches (of their most frequent class) are trained again on the whole training set.

    Masks are those of the shards, uint8; 255 is unlabelled. Two figures: pixel accuracy, and the mean over classes of
    intersection over union (mIoU) over all test pixels.

    Example: ``{name: dense, most: 1, epochs: 10}``

    Args:
        layers: the layer set of the tokens: last, last4 (the last 4 concatenated), or blocks as 2+4.
        most: larger mask values become this one: 1 makes scenes into room and solid. None keeps all.
        heads, lrs, weight_decays, holdout: as in ``linear``; holdout None for 0.1. The optimiser is AdamW.
        epochs: passes over the patches.
        batch_size: patches of an update, at most.

    Raises:
        ValueError: a value outside its range.
    """

    layers: str = "last"
    most: int | None = None
    heads: tuple[Head, ...] = ("norm",)
    lrs: tuple[float, ...] = (1e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.0,)
    epochs: int = 5
    batch_size: int = 4096
    holdout: float | None = None

    takes = "masks"

    def __post_init__(self) -> None:
        valid = self.most is None or 1 <= self.most < IGNORED
        check_values(("most", self.most, valid, f"must be from 1 to {IGNORED - 1}"))
        self.features = LayerSet(self.layers, "none")
        self.settings = grid((self.layers,), self.heads, self.lrs, self.weight_decays, "none")
        self.recipe = Recipe(optimizer="adamw", epochs=self.epochs, batch_size=self.batch_size)
        self.holdout = choose_holdout(self.holdout, 0.1, len(self.settings), SINGLE_SETTING)

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return (self.features,)

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Return pixel accuracy and mIoU."""
        assert task.images is not None
        train, test = task.both(self.features)
        patches = train.parts[0].shape[1]
        masks = [self._masks(part.dataset, task.images) for part in (task.train, task.test)]
        classes = 1 + max(int(m[m != IGNORED].max(initial=0)) for m in masks)
        if classes < 2:
            raise ValueError(f"masks of {task.train.dataset.path} must contain at least 2 values, not 1")
        targets = patch_fractions(masks[0], patches, classes).flatten(0, 1)  # [N * n, K]
        flat = {self.features: flatten_patches(train)}
        known = targets.sum(1).numpy() > 0  # [N * n]: patches with a labelled pixel
        pair = None
        if self.holdout is not None:  # else there is one setting, and nothing to choose
            # by images, because patches of one image are alike
            order = generator(Stream.EVALUATION, seed=task.seed, lane=6).permutation(len(train))
            choose_on, fit_on = np.split(order, [max(1, round(self.holdout * len(train)))])
            fit, choose = (patches_of(images, patches) for images in (fit_on, choose_on))
            pair = fit[known[fit]], choose[known[choose]]
        head, best, scores = fit_best(
            self.settings, flat, targets, classes, self.recipe, task, pair, np.flatnonzero(known)
        )
        counts = confusion(head, self.features, test, masks[1], classes)
        return self._results(counts, best, [score[0] for score in scores], (len(train), len(test)))

    def _masks(self, dataset: ShardDataset, images: ImageOptions) -> Masks:
        cropped = (crop_mask(dataset.mask(i, images.max_pixels), images.image_size) for i in range(len(dataset)))
        masks = np.stack(list(cropped))
        if self.most is not None:
            masks = np.where((masks > self.most) & (masks != IGNORED), np.uint8(self.most), masks)
        return masks

    def _results(self, counts: IntArray, best: int, tried: list[float], sizes: tuple[int, int]) -> list[ProbeResult]:
        """Return the figures of counts [K, K]: pixels by true class (rows) and prediction (columns)."""
        total, right = counts.sum(), np.diag(counts)
        union = counts.sum(0) + counts.sum(1) - right
        there = union > 0
        iou = right[there] / union[there]
        largest = counts.sum(1).max() / total  # fraction of the most frequent class
        settings: dict[str, Any] = {
            "chosen": self.settings[best].plain(),
            # a single setting has no validation, and `tried` is empty
            "tried": [s.plain() | {"validation": v} for s, v in zip(self.settings, tried, strict=False)],
            "iou": {int(k): float(v) for k, v in zip(np.flatnonzero(there), iou, strict=True)},
            "most": self.most,
            "confusion": counts.tolist(),
        }
        # (figure, chance); chance predicts the most frequent class everywhere, so the IoU of all others is 0
        figures = {
            "accuracy": (float(right.sum() / total), float(largest)),
            "mIoU": (float(iou.mean()), float(largest / (counts.sum(1) > 0).sum())),
        }
        return [
            ProbeResult(
                protocol="dense",
                accuracy=figure,
                validation=tried[best] if tried else None,
                settings=settings,
                n_train=sizes[0],
                n_test=sizes[1],
                classes=len(counts),
                chance=by_chance,
                predictions=np.empty(0, np.int64),
                # of independent images, not pixels: those of one image are correlated
                standard_error=float(np.sqrt(figure * (1.0 - figure) / sizes[1])),
                metric=metric,
            )
            for metric, (figure, by_chance) in figures.items()
        ]


def crop_mask(mask: Masks, image_size: tuple[int, int]) -> Masks:
    """Resize a mask until it just covers ``image_size`` (nearest), then crop its centre: [h', w'] -> [h, w] uint8."""
    h, w = image_size
    factor = max(h / mask.shape[0], w / mask.shape[1])
    size = max(h, round(mask.shape[0] * factor)), max(w, round(mask.shape[1] * factor))
    if size != mask.shape:
        mask = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return mask[top : top + h, left : left + w]


def patch_grid(patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of an image with so many square patches."""
    h, w = image_size
    side = round((h * w / patches) ** 0.5)
    assert (h // side) * (w // side) == patches, (patches, image_size)
    return h // side, w // side


def patch_fractions(masks: Masks, patches: int, classes: int) -> Tensor:
    """Return the fraction of each patch's pixels that each class has: [N, h, w] -> [N, n, K] float32.

    Unlabelled pixels have no class, so the fractions of a patch add up to less than 1 with them.
    """
    rows, columns = patch_grid(patches, (masks.shape[1], masks.shape[2]))
    blocks = torch.from_numpy(masks).unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # [N, H, p, W, p]
    return torch.stack([(blocks == k).float().mean(dim=(2, 4)).flatten(1) for k in range(classes)], dim=-1)


def flatten_patches(features: Features) -> Features:
    """Return a view of the features by patch: [N, n, D] -> [N * n, D]."""
    return Features(*(part.reshape(-1, part.shape[-1]) for part in features.parts))


def patches_of(images: IntArray, patches: int) -> IntArray:
    """Return the indices of all patches of some images."""
    return (images[:, None] * patches + np.arange(patches)).ravel()


def confusion(head: HeadGrid, key: LayerSet, features: Features, masks: Masks, classes: int) -> IntArray:
    """Count pixels by true class (rows) and prediction (columns), with logits upsampled to the image: [K, K]."""
    patches, size = features.parts[0].shape[1], (masks.shape[1], masks.shape[2])
    rows, columns = patch_grid(patches, size)
    flat = {key: flatten_patches(features)}
    counts = np.zeros(classes * classes, dtype=np.int64)
    for images in np.array_split(np.arange(len(masks)), -(-len(masks) // 64)):
        logits = head.logits(flat, patches_of(images, patches))[:, 0]  # [b * n, K]
        maps = logits.unflatten(0, (len(images), rows, columns)).permute(0, 3, 1, 2)  # [b, K, H, W]
        answers = F.interpolate(maps, size=size, mode="bilinear").argmax(dim=1).cpu().numpy()  # [b, h, w]
        truth = masks[images].astype(np.int64)
        known = truth != IGNORED
        counts += np.bincount(truth[known] * classes + answers[known], minlength=classes * classes)
    return counts.reshape(classes, classes)
