"""What protocols share: features as they see them, their registry, and what they give back.

N  training samples    M  test samples    n  patches of an image    D  width of a feature    K  classes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedShuffleSplit
from torch import nn

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.registry import PartRegistry
from jepa_kit.rng import IntArray, Stream, generator

Array = NDArray[np.floating[Any]]
Pooling = Literal["mean", "none"]

PROTOCOLS = PartRegistry("protocol")
"""Name -> protocol: what ``tools/eval_net.py --protocol`` offers."""


class LayerSet(NamedTuple):
    """Which features a protocol asks for: ``layers`` as in ``layer_numbers``, averaged over patches or not."""

    layers: str
    pooling: Pooling = "mean"


class Features:
    """Features of the samples of one part, from one or more layers; read where they lie.

    Args:
        parts: arrays [N, D'] or [N, n, D'], one for each layer; they may be mapped files.
    """

    def __init__(self, *parts: Array) -> None:
        assert parts
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def width(self) -> int:
        """D, of all layers together."""
        return sum(part.shape[-1] for part in self.parts)

    @cached_property
    def array(self) -> NDArray[np.float32]:
        """[N, D] or [N, n, D] float32, all in memory."""
        if len(self.parts) == 1:
            return np.array(self.parts[0], dtype=np.float32)
        return np.concatenate(self.parts, axis=-1).astype(np.float32, copy=False)

    def rows(self, index: IntArray, device: torch.device | str = "cpu") -> torch.Tensor:
        """[b, D] or [b, n, D] float32 of these samples."""
        found = [torch.from_numpy(np.asarray(part[index], dtype=np.float32)).to(device) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


@dataclass(frozen=True, eq=False)
class Part:
    """The training or the test samples, as one network sees them.

    Args:
        features: for each layer set that the protocol asked for.
        labels: [N] classes; None where the protocol takes masks.
        dataset: where images, names and masks of the samples are.
    """

    features: Mapping[LayerSet, Features]
    labels: IntArray | None
    dataset: ShardDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One question to a protocol: one network, one label.

    Args:
        train, test: the samples. Settings are chosen on ``train`` alone.
        layers: what the user asked for, for protocols that take one layer set.
        seed: of everything that the protocol draws.
        device: where a protocol may work.
        encoder: the network itself, for protocols that train it (a copy of it); None for raw pixels.
        images: how images and masks are made, for protocols that read them.
    """

    train: Part
    test: Part
    layers: str = "last"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    encoder: nn.Module | None = None
    images: ImageOptions | None = None

    def labels(self) -> tuple[IntArray, IntArray]:
        """[N] and [M] classes."""
        assert self.train.labels is not None
        assert self.test.labels is not None
        return self.train.labels, self.test.labels

    def both(self, wanted: LayerSet) -> tuple[Features, Features]:
        """Training and test features of a layer set."""
        return self.train.features[wanted], self.test.features[wanted]


@dataclass(frozen=True)
class ProbeResult:
    """What a protocol found.

    Args:
        protocol: its registered name.
        accuracy: share of the test set that is right, in [0, 1]; or what ``metric`` says.
        validation: the same of the settings chosen, on the samples of the training set that chose them; None where
            nothing was chosen.
        settings: the settings chosen, and what they were chosen from.
        n_train: N.
        n_test: M.
        classes: K, of the training set.
        chance: the best that one answer for everything gets on the test set, in [0, 1].
        predictions: [M] the answers; empty where they are not one for each sample, or several draws were made.
        standard_error: of the accuracy: binomial, over test sets of this length; or of ``draws``, their deviation.
        variant: which of a protocol's several figures, as "1 %" of ``logistic``; empty where there is one.
        metric: ``accuracy``, or ``mIoU`` (mean intersection over union), in [0, 1] too.
        draws: over how many draws of the training set the figures are means.
    """

    protocol: str
    accuracy: float
    validation: float | None
    settings: dict[str, Any]
    n_train: int
    n_test: int
    classes: int
    chance: float
    predictions: IntArray
    standard_error: float
    variant: str = ""
    metric: str = "accuracy"
    draws: int = 1


class Probe(Protocol):
    """A registered protocol. Its constructor takes its settings, keyword-only and annotated.

    The docstring of its class is its card: what it is, where it comes from (``Source``) and where it departs from that
    (``Departures``), its options in words (``Args``), and what a user may write (``Example``).
    ``tools/eval_net.py --list`` prints the first, the third and the fourth.

    It may have ``check(labels, key)``, which is called before any feature is extracted and raises ValueError where
    the training set's classes [N], or its keys (sample number -> name), do not do for it.

    Attributes:
        label: the one label that it is about, or None where it takes any.
        takes_layers: whether it follows the user's choice of layers; else it has a choice of its own.
        takes: ``labels`` (one question for each), or ``masks`` (of the shards, one question).
        trains_encoder: whether it needs the encoder itself, so that there is no row for raw pixels.
    """

    label: str | None = None
    takes_layers: bool = False
    takes: Literal["labels", "masks"] = "labels"
    trains_encoder: bool = False

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        """The layer sets that it needs, where the user asked for ``layers``."""
        ...

    def __call__(self, task: Task) -> list[ProbeResult]:
        """The figures; the same for the same task."""
        ...


def classification_result(
    protocol: str,
    predictions: IntArray,
    train_labels: IntArray,
    test_labels: IntArray,
    validation: float | None,
    settings: dict[str, Any],
) -> ProbeResult:
    """The result of one answer for each test sample."""
    accuracy = float(np.mean(predictions == test_labels))
    return ProbeResult(
        protocol=protocol,
        accuracy=accuracy,
        validation=validation,
        settings=settings,
        n_train=len(train_labels),
        n_test=len(test_labels),
        classes=len(np.unique(train_labels)),
        chance=chance(test_labels),
        predictions=predictions,
        standard_error=float(np.sqrt(accuracy * (1.0 - accuracy) / len(test_labels))),
    )


def chance(labels: IntArray) -> float:
    """The best share that one answer for everything gets."""
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def check_samples(
    train: Array, train_labels: IntArray, test: Array, test_labels: IntArray
) -> tuple[IntArray, IntArray]:
    """The labels as int64, where features and labels fit together.

    Raises:
        ValueError: features that are not [samples, width] of finite floats or differ in width, labels that are not
            one integer for each sample, fewer than 2 classes, a class of the test set that training does not know.
    """
    for name, x in (("train", train), ("test", test)):
        if x.ndim != 2 or not len(x) or x.dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} must be float32 or float64 [samples, width], not {x.dtype} of shape {x.shape}")
        if not np.isfinite(x).all():
            bad = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
            raise ValueError(f"{name} must be finite, but the feature of sample {bad} is not")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train and test must be of one width, not {train.shape[1]} and {test.shape[1]}")
    return check_labels(len(train), train_labels, len(test), test_labels)


def check_labels(n_train: int, train_labels: IntArray, n_test: int, test_labels: IntArray) -> tuple[IntArray, IntArray]:
    """As ``check_samples``, for labels alone."""
    labels = []
    for name, count, y in (("train", n_train, train_labels), ("test", n_test, test_labels)):
        if y.shape != (count,) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(
                f"{name}_labels must be an integer for each of the {count} samples, not {y.dtype} of shape {y.shape}"
            )
        labels.append(y.astype(np.int64))
    known = np.unique(labels[0])
    if len(known) < 2:
        raise ValueError(f"train_labels must hold at least 2 classes, not {len(known)} (class {known[0]})")
    unknown = np.setdiff1d(labels[1], known)
    if len(unknown):
        raise ValueError(f"test_labels must be classes of train_labels, but class {unknown[0]} is not")
    return labels[0], labels[1]


def check_holdout(holdout: float) -> None:
    """Raises ValueError where a share cannot be held out."""
    if not 0 < holdout <= 0.5:
        raise ValueError(f"holdout (={holdout}) must be above 0 and at most 0.5")


def choose_holdout(holdout: float | None, default: float, settings: int, what: str) -> float | None:
    """The share of the training set that chooses between settings; None where there is one.

    Args:
        holdout: what the user gave, if anything.
        default: else.
        settings: how many there are.
        what: leaves nothing to choose where there is one.

    Raises:
        ValueError: a share that cannot be held out, or that would do nothing.
    """
    if holdout is None:
        return default if settings > 1 else None
    check_holdout(holdout)
    if settings == 1:
        raise ValueError(f"holdout (={holdout}) would do nothing: {what} leaves nothing to choose")
    return holdout


def split(labels: IntArray, holdout: float, seed: int, splits: int = 1) -> list[tuple[IntArray, IntArray]]:
    """Indices to fit on and indices to choose on, with the same share of each class; so many random pairs.

    Raises:
        ValueError: a class too rare to hold a sample of it out.
    """
    names, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2 or int(len(labels) * holdout) < len(names):
        raise ValueError(
            f"the training set ({len(labels)} samples) must have a sample of each of its {len(names)} classes to fit "
            f"on and one to choose on; class {names[counts.argmin()]} has {counts.min()}"
        )
    state = int(generator(Stream.EVALUATION, seed=seed).integers(2**31))
    splitter = StratifiedShuffleSplit(n_splits=splits, test_size=holdout, random_state=state)
    return list(splitter.split(np.zeros((len(labels), 1)), labels))
