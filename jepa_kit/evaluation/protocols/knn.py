"""Nearest neighbours by cosine.

N  training samples    M  test samples    D  width of a feature    K  classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from jepa_kit.evaluation.neighbours import TEMPERATURE, Bank
from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    Array,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_samples,
    classification_result,
)
from jepa_kit.rng import IntArray, Stream, generator

NEIGHBOURS = (10, 20, 100, 200)
"""The numbers of neighbours that DINO reports (Caron et al. 2021, arXiv 2104.14294, F)."""


@PROTOCOLS.register("knn")
@dataclass(kw_only=True)
class KNN(Probe):
    """Weighted nearest neighbours by cosine.

    Source: Wu et al. 2018 (arXiv 1805.01978, section 3.4), and DINO. Departure: k is chosen inside the training set.

    Example: ``{name: knn, neighbours: [5, 20]}``

    Args:
        neighbours: values of k to choose from; those above N - 1 are ignored.
        temperature: of the weights exp(cosine / temperature), above 0.
        queries: the most training samples that are classified to choose k.

    Raises:
        ValueError: no k, or a value outside its range.
    """

    neighbours: tuple[int, ...] = NEIGHBOURS
    temperature: float = TEMPERATURE
    queries: int = 10_000

    takes_layers = True

    def __post_init__(self) -> None:
        _check(self.neighbours, self.temperature, self.queries)

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return (LayerSet(layers),)

    def check(self, labels: IntArray, key: Callable[[int], str]) -> None:
        _fitting(self.neighbours, len(labels))

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Return one figure."""
        train, test = task.both(LayerSet(task.layers))
        labels = task.labels()
        options = asdict(self) | {"seed": task.seed, "device": task.device}
        return [knn_probe(train.array, labels[0], test.array, labels[1], **options)]


def knn_probe(
    train: Array,
    train_labels: IntArray,
    test: Array,
    test_labels: IntArray,
    *,
    seed: int = 0,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    queries: int = 10_000,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Classify by weighted nearest neighbours by cosine (Wu et al. 2018, arXiv 1805.01978, section 3.4; used by DINO).

    The k most similar training samples vote for their classes, each with the weight exp(cosine / temperature). k is
    the number of neighbours with the best leave-one-out accuracy on training samples, the smaller of two equal ones.
    (Those papers report k = 200, and the best of four.)

    Args:
        train, test: [N, D] and [M, D] features.
        train_labels, test_labels: [N] and [M] classes, integers.
        seed: of the choice of ``queries``.
        neighbours: values of k; those above N - 1 are ignored.
        temperature: above 0; 0.07 is Wu et al.'s and DINO's.
        queries: the most training samples that are classified to choose k.
        device: of similarities.

    Raises:
        ValueError: see ``check_samples``; no k from 1 to N - 1; a temperature that is not above 0.
    """
    train_labels, test_labels = check_samples(train, train_labels, test, test_labels)
    _check(neighbours, temperature, queries)
    ks = _fitting(neighbours, len(train))
    classes, answers = np.unique(train_labels, return_inverse=True)
    bank = Bank(train, answers, len(classes), temperature, device)
    chosen = np.arange(len(train))
    if len(train) > queries:
        chosen = np.sort(generator(Stream.EVALUATION, seed=seed, lane=1).permutation(len(train))[:queries])
    votes = bank.classify(train[chosen], ks, leave_out=chosen)  # [len(ks), Q]
    validation = [float(v) for v in (votes == answers[chosen]).mean(axis=1)]
    best = int(np.argmax(validation))
    predictions = classes[bank.classify(test, ks)]  # [len(ks), M]
    settings = {
        "k": ks[best],
        "neighbours": ks,
        "validation": validation,
        "temperature": temperature,
        "test_by_k": {k: float(a) for k, a in zip(ks, (predictions == test_labels).mean(axis=1), strict=True)},
    }
    return classification_result("knn", predictions[best], train_labels, test_labels, validation[best], settings)


def _fitting(neighbours: Sequence[int], samples: int) -> list[int]:
    """Return the values of k below ``samples``, ascending."""
    ks = sorted({k for k in neighbours if k < samples})
    if not ks:
        raise ValueError(f"neighbours (={tuple(neighbours)}) must contain numbers from 1 to {samples - 1} (N - 1)")
    return ks


def _check(neighbours: Sequence[int], temperature: float, queries: int) -> None:
    if not neighbours or min(neighbours) < 1:
        raise ValueError(f"neighbours (={tuple(neighbours)}) must be numbers of at least 1")
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature (={temperature}) must be above 0")
    if queries < 1:
        raise ValueError(f"queries (={queries}) must be at least 1")
