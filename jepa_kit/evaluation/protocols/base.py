"""Interfaces of protocols: their registry, inputs and results.

N  training samples    M  test samples    n  patches of an image    D  width of a feature    K  classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedShuffleSplit
from torch import nn

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.registry import PartRegistry
from jepa_kit.rng import IntArray, Stream, generator
from jepa_kit.structures import Pooling

T = TypeVar("T")
Array = NDArray[np.floating[Any]]
Pair = tuple[IntArray, IntArray]
"""Indices of samples to fit on, and of samples to choose on."""

ImagePooling = Literal["mean", "class", "quarters"]
"""A feature of an image: the mean over its patches, its class token, or the means over its quarters side by side."""
PROTOCOLS = PartRegistry("protocol", package="jepa_kit.evaluation.protocols")
"""Name -> protocol, for ``tools/eval_net.py --protocol``."""


class LayerSet(NamedTuple):
    """Layers of an encoder, as ``layer_numbers`` takes them, and how their tokens become features."""

    layers: str
    pooling: Pooling = "mean"


class Features:
    """Features of the training or test samples, concatenated over layers when they are read.

    Args:
        parts: arrays [N, D'] or [N, n, D'], one per layer; they may be memory-mapped.
    """

    def __init__(self, *parts: Array) -> None:
        assert parts
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def width(self) -> int:
        """D, summed over layers."""
        return sum(part.shape[-1] for part in self.parts)

    @cached_property
    def array(self) -> NDArray[np.float32]:
        """All features in memory: [N, D] or [N, n, D] float32."""
        if len(self.parts) == 1:
            return np.array(self.parts[0], dtype=np.float32)
        return np.concatenate(self.parts, axis=-1).astype(np.float32, copy=False)

    def rows(self, index: IntArray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the features of some samples: [b, D] or [b, n, D] float32."""
        found = [torch.from_numpy(np.asarray(part[index], dtype=np.float32)).to(device) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


@dataclass(frozen=True, eq=False)
class Part:
    """The training or the test samples, with one network's features.

    Args:
        features: for each layer set that the protocol needs.
        labels: [N] classes; None for a protocol that takes masks.
        dataset: with the images, names and masks of the samples.
    """

    features: Mapping[LayerSet, Features]
    labels: IntArray | None
    dataset: ShardDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """The input of a protocol: one network, one label.

    Args:
        train, test: the samples. Settings are chosen on ``train`` alone.
        layers: the user's layer set, for protocols that take one.
        seed: of the protocol's random numbers.
        device: for the protocol's computation.
        encoder: for protocols that train a copy of it; None for raw pixels.
        images: how images and masks are read, for protocols that read them.
        kept: what ``once`` made, for tasks that differ in the label alone.
    """

    train: Part
    test: Part
    layers: str = "last"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    encoder: nn.Module | None = None
    images: ImageOptions | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return ``make()``, which does not depend on the label: the other labels of one network get the same."""
        if name not in self.kept:
            self.kept[name] = make()
        return cast(T, self.kept[name])

    def labels(self) -> tuple[IntArray, IntArray]:
        """Return the classes of the training samples [N] and the test samples [M]."""
        assert self.train.labels is not None
        assert self.test.labels is not None
        return self.train.labels, self.test.labels

    def both(self, wanted: LayerSet) -> tuple[Features, Features]:
        """Return training and test features of a layer set."""
        return self.train.features[wanted], self.test.features[wanted]


@dataclass(frozen=True)
class ProbeResult:
    """A figure of a protocol.

    Args:
        protocol: its registered name.
        accuracy: fraction of the test set that is right, in [0, 1], or the value of ``metric``.
        validation: the same of the chosen settings on the training samples that chose them; None if there was nothing
            to choose.
        settings: the chosen settings, and the candidates.
        n_train: N.
        n_test: M.
        classes: K, of the training set.
        chance: the best value that one constant answer reaches on the test set, in [0, 1].
        predictions: [M] classes; empty if there is not one per sample, or if there were several draws.
        standard_error: binomial, for test sets of M samples; the deviation over draws if there were several.
        variant: which of a protocol's several figures, as "1%" of ``logistic``; empty if there is one.
        metric: ``accuracy``, or ``mIoU`` (mean intersection over union), in [0, 1] too.
        draws: number of draws of the training set over which the figures are averaged.
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

    The docstring of the class (or function) that is registered is its card: its title, its origin (``Source``), how it
    differs from that (``Departures``), its options (``Args``), and a spec (``Example``). ``tools/eval_net.py --list``
    prints the title, the options and the example.

    Attributes:
        label: the only label that it uses; None for any.
        takes_layers: whether it uses the layers that the user chose; else it has an option for them.
        takes: ``labels`` (one call per label), or ``masks`` of the shards (one call).
        trains_encoder: whether it needs the encoder itself, so that it gives no figure for raw pixels.
        holdout: fraction of the training samples that it holds out to choose a setting; None for none.
    """

    label: str | None = None
    takes_layers: bool = False
    takes: Literal["labels", "masks"] = "labels"
    trains_encoder: bool = False
    holdout: float | None = None

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        """Return the layer sets that it needs if the user chose ``layers``: these alone, unless it is overridden."""
        return (LayerSet(layers),)

    def check(self, labels: IntArray, key: Callable[[int], str]) -> None:
        """Raise ValueError for training samples that it cannot use; called before features are extracted.

        Unless it is overridden, each class must have a held-out sample.

        Args:
            labels: [N] classes.
            key: sample number -> name.
        """
        if self.holdout is not None:
            split(labels, self.holdout, seed=0)

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Return the figures; a deterministic function of the task."""
        ...


def classification_result(
    protocol: str,
    predictions: IntArray,
    train_labels: IntArray,
    test_labels: IntArray,
    validation: float | None,
    settings: dict[str, Any],
) -> ProbeResult:
    """Return the result of one prediction per test sample."""
    accuracy = float(np.mean(predictions == test_labels))
    return ProbeResult(
        protocol=protocol,
        accuracy=accuracy,
        validation=validation,
        settings=settings,
        n_train=len(train_labels),
        n_test=len(test_labels),
        classes=len(np.unique(train_labels)),
        chance=float(np.unique(test_labels, return_counts=True)[1].max() / len(test_labels)),
        predictions=predictions,
        standard_error=float(np.sqrt(accuracy * (1.0 - accuracy) / len(test_labels))),
    )


def check_samples(
    train: Array, train_labels: IntArray, test: Array, test_labels: IntArray
) -> tuple[IntArray, IntArray]:
    """Check that features and labels fit together; return the labels as int64.

    Raises:
        ValueError: features that are not [samples, width] of finite floats or differ in width, labels that are not
            one integer per sample, fewer than 2 classes, or a class that only the test set has.
    """
    for name, x in (("train", train), ("test", test)):
        if x.ndim != 2 or not len(x) or x.dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} must be float32 or float64 [samples, width], not {x.dtype} of shape {x.shape}")
        if not np.isfinite(x).all():
            bad = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
            raise ValueError(f"{name} must be finite, but the feature of sample {bad} is not")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train and test must be of one width, not {train.shape[1]} and {test.shape[1]}")
    return check_labels(train, test, train_labels, test_labels)


def check_labels(train: Sized, test: Sized, *given: IntArray) -> tuple[IntArray, IntArray]:
    """Check the labels of the training and the test samples as ``check_samples`` does; return them as int64."""
    labels = []
    for name, samples, y in zip(("train", "test"), (train, test), given, strict=True):
        if y.shape != (len(samples),) or not np.issubdtype(y.dtype, np.integer):
            right = f"an integer for each of the {len(samples)} samples"
            raise ValueError(f"{name}_labels must be {right}, not {y.dtype} of shape {y.shape}")
        labels.append(y.astype(np.int64))
    known = np.unique(labels[0])
    if len(known) < 2:
        raise ValueError(f"train_labels must contain at least 2 classes, not {len(known)} (class {known[0]})")
    unknown = np.setdiff1d(labels[1], known)
    if len(unknown):
        raise ValueError(f"test_labels must be classes of train_labels, but class {unknown[0]} is not")
    return labels[0], labels[1]


def check_values(*rules: tuple[str, Any, bool, str]) -> None:
    """Raise ValueError for the first broken rule: (name, value, whether it is valid, text of the error)."""
    for name, value, valid, text in rules:
        if not valid:
            raise ValueError(f"{name} (={value}) {text}")


def choose_holdout(holdout: float | None, default: float, settings: int, what: str) -> float | None:
    """Return the fraction of the training set that chooses between settings; None if there is one setting.

    Args:
        holdout: the user's value.
        default: if that is None.
        settings: number of settings.
        what: subject and verb of the message if there is one setting: "one k leaves" (nothing to choose).

    Raises:
        ValueError: an impossible fraction, or one without effect.
    """
    if holdout is None:
        return default if settings > 1 else None
    check_values(
        ("holdout", holdout, 0 < holdout <= 0.5, "must be above 0 and at most 0.5"),
        ("holdout", holdout, settings > 1, f"would do nothing: {what} nothing to choose"),
    )
    return holdout


def split(labels: IntArray, holdout: float, seed: int, splits: int = 1) -> list[Pair]:
    """Return random pairs, stratified by class.

    Raises:
        ValueError: a class without samples for both.
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


def epoch_batches(index: IntArray, batch_size: int, *, seed: int, epoch: int, lane: int) -> list[IntArray]:
    """Return the batches of an epoch in random order; a smaller last one is left out, unless it is the only one."""
    order = index[generator(Stream.EVALUATION, seed=seed, epoch=epoch, lane=lane).permutation(len(index))]
    size = min(batch_size, len(index))
    return [order[k * size : (k + 1) * size] for k in range(len(index) // size)]
