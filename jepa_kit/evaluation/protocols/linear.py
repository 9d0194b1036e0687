"""A grid of linear heads trained in one pass, and the settings of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    ImagePooling,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_values,
    choose_holdout,
)
from jepa_kit.evaluation.protocols.heads import Optimizer, Recipe, Setting, grid_probe
from jepa_kit.registry import check_choice
from jepa_kit.structures import Pooling

Head = Literal["plain", "norm"]
LAYERS = ("last", "last4")
HEADS: tuple[Head, ...] = ("plain", "norm")
HOLDOUT = 0.2
SINGLE_SETTING = "one combination of layers, heads, lrs and weight_decays leaves"
"""``what`` of ``choose_holdout``."""


def grid(
    layers: Sequence[str],
    heads: Sequence[Head],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    pooling: Pooling = "mean",
) -> list[Setting]:
    """Return every combination, each of features with this pooling.

    Raises:
        ValueError: an empty list, a repeated or unknown value, a rate that is not above 0, or a negative decay.
    """
    given = {"layers": layers, "heads": heads, "lrs": lrs, "weight_decays": weight_decays}
    check_values(
        *(
            (name, values, 0 < len(values) == len(set(values)), "must contain at least one value, and each once")
            for name, values in given.items()
        )
    )
    check_values(
        ("heads", heads, set(heads) <= set(HEADS), f"must be of {', '.join(HEADS)}"),
        ("lrs", lrs, min(lrs) > 0, "must be above 0"),
        ("weight_decays", weight_decays, min(weight_decays) >= 0, "must be at least 0"),
    )
    return [
        Setting(LayerSet(layer, pooling), head == "norm", lr, decay)
        for layer, head, lr, decay in itertools.product(layers, heads, lrs, weight_decays)
    ]


@dataclass(kw_only=True)
class LinearProbe(Probe):
    """Train a grid of linear heads, and report the best on held-out training samples.

    Args:
        protocol: its registered name.
        settings: of the heads.
        recipe: of their training.
        holdout: fraction of the training set that chooses between them; None for the default, or nothing to choose.
        default_holdout: if there are several settings.
        label: the only label of the protocol; None for any.
        per_256: learning rates are for 256 images, and are multiplied by the batch over 256.

    Raises:
        ValueError: see ``choose_holdout``.
    """

    protocol: str
    settings: Sequence[Setting]
    recipe: Recipe
    holdout: float | None
    default_holdout: float = HOLDOUT
    label: str | None = None
    per_256: bool = False

    def __post_init__(self) -> None:
        self.holdout = choose_holdout(self.holdout, self.default_holdout, len(self.settings), SINGLE_SETTING)

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return tuple(dict.fromkeys(setting.features for setting in self.settings))

    def __call__(self, task: Task) -> list[ProbeResult]:
        settings = self.settings
        if self.per_256:
            batch = min(self.recipe.batch_size, int(len(task.labels()[0]) * (1 - (self.holdout or 0))))
            settings = [replace(setting, lr=setting.lr * batch / 256) for setting in settings]
        return [grid_probe(self.protocol, task, settings, self.recipe, self.holdout)]


@PROTOCOLS.register("linear")
def linear(
    *,
    layers: tuple[str, ...] = LAYERS,
    heads: tuple[Head, ...] = HEADS,
    lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    weight_decays: tuple[float, ...] = (0.0, 1e-2),
    optimizer: Optimizer = "adamw",
    epochs: int = 20,
    batch_size: int = 256,
    holdout: float | None = None,
    pooling: ImagePooling = "mean",
) -> LinearProbe:
    """A linear classifier on frozen features: the best of a grid, trained in one pass.

    Source: the idea of training every head of a grid at once on one pass of the encoder is DINOv2's (Oquab et al. 2023,
    arXiv 2304.07193, section 7.1 and B.3); the inputs are I-JEPA's (A.2: the last layer or the last four, averaged over
    patches) and the heads VISSL's (plain, or with batch norm). Departures: features are those of one centre crop,
    extracted once, so that there is no augmentation; the head is chosen on held-out training samples (those papers
    choose on the validation set that they report), then trained again on the whole training set.

    Example: ``{name: linear, layers: [last], lrs: [1e-2, 1e-1], epochs: 50}``

    Args:
        layers: layer sets to choose from: last, last4 (the last 4 concatenated), blocks as 2+4.
        heads: to choose from: plain, norm (batch norm before the linear map).
        lrs: learning rates to choose from, for a batch of ``batch_size``.
        weight_decays: to choose from.
        optimizer: sgd, adamw or lars.
        epochs: passes over the features; the learning rate follows a cosine to 0.
        batch_size: samples of an update, at most.
        holdout: fraction of the training set that chooses between several heads, in (0, 0.5]; None for 0.2.
        pooling: mean over patches; class: the class token, as DINO and MAE; quarters: the means over the four quarters,
            side by side.

    Raises:
        ValueError: a value outside its range.
    """
    check_choice("pooling", pooling, ImagePooling)
    settings = grid(layers, heads, lrs, weight_decays, pooling)
    recipe = Recipe(optimizer=optimizer, epochs=epochs, batch_size=batch_size)
    return LinearProbe(protocol="linear", settings=settings, recipe=recipe, holdout=holdout)


@PROTOCOLS.register("paper_linear")
def paper_linear(
    *,
    lrs: tuple[float, ...] = (0.01, 0.05, 0.001),
    weight_decays: tuple[float, ...] = (0.0005, 0.0),
    layers: tuple[str, ...] = LAYERS,
    heads: tuple[Head, ...] = HEADS,
    epochs: int = 50,
    batch_size: int = 16384,
    holdout: float | None = None,
) -> LinearProbe:
    """I-JEPA's linear probe on ImageNet.

    Source: arXiv 2301.08243, A.2: LARS, batch 16384, 50 epochs, the learning rate divided by 10 every 15; a grid of
    reference learning rates (for 256 images) and weight decays; the better of the last layer and the last four, mean
    over patches, plain or with batch norm. Departures: no augmentation (features of one centre crop; the paper trains
    on random crops and flips); the head is chosen on held-out training samples, not on the validation set; batch norm
    without affine parameters. With fewer samples than a batch, an epoch is one update: on small sets it trains too
    little for a meaningful figure.

    Example: ``{name: paper_linear, batch_size: 4096}``

    Args:
        lrs: to choose from, for 256 images; multiplied by the batch over 256.
        weight_decays: to choose from.
        layers, heads, holdout: as in ``linear``; holdout None for 0.1.
        epochs: passes over the features; the learning rate is divided by 10 after 15, 30 and 45.
        batch_size: samples of an update, at most.
    """
    settings = grid(layers, heads, lrs, weight_decays)
    recipe = Recipe(optimizer="lars", epochs=epochs, batch_size=batch_size, steps=(15, 30, 45))
    return LinearProbe(
        protocol="paper_linear", settings=settings, recipe=recipe, holdout=holdout, default_holdout=0.1, per_256=True
    )


SCHEDULES: dict[str, tuple[int, tuple[int, ...] | None]] = {
    "cifar10": (28, (8, 16, 24)),  # not in the paper: as its CIFAR-100
    "cifar100": (28, (8, 16, 24)),
    "places205": (14, (4, 8, 12)),
    "inat18": (84, (24, 48, 72)),
    "clevr_count": (50, None),
    "clevr_dist": (100, None),
}
"""Data set -> epochs, and the epochs after which the learning rate is divided by 10 (None: a cosine)."""


@PROTOCOLS.register("paper_transfer")
def paper_transfer(
    *,
    dataset: str,
    layers: tuple[str, ...] = LAYERS,
    heads: tuple[Head, ...] = HEADS,
    holdout: float | None = None,
) -> LinearProbe:
    """I-JEPA's linear transfer to other data sets.

    Source: arXiv 2301.08243, A.2, which uses VISSL's configurations: SGD, Nesterov momentum 0.9, weight decay 5e-4,
    learning rate 0.01 for 256 images, a schedule for each data set (``SCHEDULES``); the best of the last layer and the
    last four, each plain and with batch norm. Departures: as ``paper_linear``.

    Example: ``{name: paper_transfer, dataset: cifar100}``

    Args:
        dataset: that gives the schedule: cifar10 (as cifar100), cifar100, places205, inat18, clevr_count or clevr_dist.
        layers, heads, holdout: as in ``linear``.

    Raises:
        ValueError: another data set.
    """
    return _transfer("paper_transfer", dataset, grid(layers, heads, (0.01,), (5e-4,)), holdout)


@PROTOCOLS.register("count")
def count(
    *, layers: tuple[str, ...] = LAYERS, heads: tuple[Head, ...] = HEADS, holdout: float | None = None
) -> LinearProbe:
    """How many objects there are: the label ``count``, by I-JEPA's settings for Clevr/Count.

    Source: arXiv 2301.08243, table 4 and A.2 (a cosine over 50 epochs; the rest as ``paper_transfer``); the task is
    VTAB's (arXiv 1910.04867), with 8 classes. Here on any shards with a label of that name: scenes, CLEVR.

    Example: ``{name: count, layers: [last4]}``

    Args:
        layers, heads, holdout: as in ``linear``.
    """
    return _transfer("count", "clevr_count", grid(layers, heads, (0.01,), (5e-4,)), holdout, label="count")


@PROTOCOLS.register("distance")
def distance(
    *, layers: tuple[str, ...] = LAYERS, heads: tuple[Head, ...] = HEADS, holdout: float | None = None
) -> LinearProbe:
    """How far the nearest object is: the label ``distance``, by I-JEPA's settings for Clevr/Dist.

    Source: as ``count``; a cosine over 100 epochs, 6 classes.

    Example: ``{name: distance, heads: [norm]}``

    Args:
        layers, heads, holdout: as in ``linear``.
    """
    return _transfer("distance", "clevr_dist", grid(layers, heads, (0.01,), (5e-4,)), holdout, label="distance")


def _transfer(
    protocol: str, dataset: str, settings: list[Setting], holdout: float | None, label: str | None = None
) -> LinearProbe:
    """Return the paper's transfer recipe with the schedule of its data set."""
    check_values(("dataset", repr(dataset), dataset in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}"))
    epochs, steps = SCHEDULES[dataset]
    recipe = Recipe(optimizer="sgd", epochs=epochs, batch_size=256, steps=steps, nesterov=True)
    return LinearProbe(protocol=protocol, settings=settings, recipe=recipe, holdout=holdout, label=label)
