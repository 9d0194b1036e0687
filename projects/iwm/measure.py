"""Equivariance of predictions: whether they follow the action (IWM, section 4.1).

M = targets of an image's bank    A = numbers of an action    P = target patches of an image    D = width of a target
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import Crop, HorizontalFlip, Pipeline, build_pipeline, normalize, stack
from jepa_kit.evaluation.features import LoadedRun, evaluating
from jepa_kit.evaluation.health.measure import EPOCH
from jepa_kit.from_config import build_masker
from jepa_kit.recipe import JEPA
from jepa_kit.rng import FloatArray, IntArray
from jepa_kit.structures import View


def reciprocal_ranks(distances: Tensor) -> Tensor:
    """Return 1 / rank of each prediction's own target among all targets by distance: [M, M] -> [M] float64.

    Args:
        distances: of prediction m to target k at [m, k]; the own targets are on the diagonal. Equal ones share the mean
            of their ranks.
    """
    own = distances.diagonal()[:, None]
    below, equal = ((distances < own).sum(1), (distances == own).sum(1))
    return 1 / (below + (equal + 1) / 2).double()


def chance(bank: int) -> float:
    """Return the expected 1 / rank if all ranks from 1 to ``bank`` are equally likely: (1 + 1/2 + ... + 1/M) / M.

    A prediction that does not depend on the action has exactly this mean over a bank, if no two targets are equal.
    """
    return float((1 / np.arange(1, bank + 1)).sum() / bank)


def explained(predictions: Tensor, targets: Tensor) -> float:
    """Return R^2 of the differences between the targets of a bank: the fraction that the predictions follow, at most 1.

    The mean over the bank is subtracted from both, [M, P * D]. 0 for predictions that do not depend on the action.
    """
    moves, truth = (x - x.mean(0) for x in (predictions, targets))
    return float(1 - (moves - truth).square().sum() / truth.square().sum())


def bank_of(pipeline: Pipeline, samples: IntArray, *, seed: int) -> tuple[FloatArray, FloatArray]:
    """Return random numbers [M, n] of a bank's targets, and [n] of their source: one crop, without changes of colour.

    Every change of colour that the pipeline can make is made, by random amounts.

    Args:
        pipeline: of the target view.
        samples: [M] numbers that the random numbers are functions of.
        seed: of the random numbers.
    """
    draws = pipeline.draws(samples, seed=seed, epoch=EPOCH)
    ends = [0, *accumulate(transform.num_draws for transform in pipeline.transforms)]
    source = draws[0].copy()
    for first, end, transform in zip(ends, ends[1:], pipeline.transforms, strict=False):
        if isinstance(transform, Crop | HorizontalFlip):
            draws[:, first:end] = draws[0, first:end]
        elif end > first:  # the first number decides whether a change is made: if it is below p
            draws[:, first], source[first] = 0.0, 1.0
    return draws, source


@torch.no_grad()
def equivariance(
    run: LoadedRun, dataset: ShardDataset, samples: IntArray, *, bank: int, seed: int, device: torch.device
) -> FloatArray:
    """Return the mean reciprocal rank of each image's predictions in its bank, and ``explained``: [images, 2].

    The source is a crop of the image, masked as in training; the bank has the same crop with the changes of colour of
    the target view. A prediction is given the action from the source to one target, and compared with all targets at
    the target patches, by Euclidean distance.

    Args:
        run: of the recipe ``iwm``; its modules are moved to the device.
        dataset: where the images are.
        samples: their numbers.
        bank: M.
        seed: of crops, colours and masks.
        device: of the networks.
    """
    jepa, data = cast(JEPA, run.jepa).to(device), run.config.data
    entry = data.entries()[-1][1]
    pipeline = build_pipeline(
        entry.transforms or data.transforms,
        image_size=entry.image_size or data.image_size,
        decoder=data.decoder,
        max_pixels=data.max_pixels,
    )
    masker = build_masker(run.config)
    found = []
    with evaluating(jepa):
        for sample in samples.tolist():
            image = dataset.image(sample)
            draws, clean = bank_of(pipeline, sample * bank + np.arange(bank), seed=seed)
            actions: list[list[float]] = [[] for _ in range(bank + 1)]
            rows = [clean.tolist(), *draws.tolist()]
            pixels = [pipeline.apply(image, row, action) for row, action in zip(rows, actions, strict=True)]
            images = normalize(stack(pixels).to(device), data.mean, data.std)  # [1 + M, 3, h, w], the source first
            action = torch.tensor(actions[1:]) - torch.tensor(actions[0])  # [M, A]
            masks = masker(np.full(bank, sample), seed=seed, epoch=EPOCH)
            source = View(images[:1].expand(bank, -1, -1, -1), masks, action).to(device)
            out = jepa.predict(source, of=images[1:])
            order = out.masks.targets.image_of_token.argsort(stable=True)
            guess, truth = (x[order].double().view(bank, -1) for x in (out.prediction, out.target))  # [M, P * D]
            found.append([float(reciprocal_ranks(torch.cdist(guess, truth)).mean()), explained(guess, truth)])
    return np.array(found)


def figures(values: FloatArray, bank: int) -> dict[str, Any]:
    """Return the means of ``equivariance`` with standard errors, the number of images, M and the MRR by chance."""
    (mrr, followed), errors = values.mean(0).tolist(), (values.std(0, ddof=1) / np.sqrt(len(values))).tolist()
    found = {"mrr": mrr, "error": errors[0], "explained": followed, "explained_error": errors[1]}
    return {**found, "images": len(values), "bank": bank, "chance": chance(bank)}
