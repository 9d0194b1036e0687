"""Nearest neighbours by cosine.

N  training samples    M  test samples    D  width of a feature    K  classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from jepa_kit.evaluation.neighbours import TEMPERATURE, Nearest, nearest, vote
from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    Array,
    ImagePooling,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_samples,
    check_values,
    classification_result,
)
from jepa_kit.registry import check_choice
from jepa_kit.rng import IntArray, Stream, generator

NEIGHBOURS = (10, 20, 100, 200)
"""The numbers of neighbours that DINO reports (Caron et al. 2021, arXiv 2104.14294, F)."""


class Found(NamedTuple):
    """Neighbours among the training samples."""

    chosen: IntArray
    """[Q] the training samples that choose k."""
    own: Nearest
    """Theirs, without themselves."""
    test: Nearest
    """Those of the test samples."""


@PROTOCOLS.register("knn")
@dataclass(kw_only=True)
class KNN(Probe):
    """Weighted nearest neighbours by cosine.

    The k most similar training samples vote for their classes, each with the weight exp(cosine / temperature). k is
    the number of neighbours with the best leave-one-out accuracy on training samples, the smaller of two equal ones.

    Source: Wu et al. 2018 (arXiv 1805.01978, section 3.4), and DINO, which report k = 200, and the best of four.
    Departure: k is chosen inside the training set.

    Example: ``{name: knn, neighbours: [5, 20]}``

    Args:
        neighbours: values of k to choose from; those above N - 1 are ignored.
        temperature: of the weights exp(cosine / temperature), above 0.
        queries: the most training samples that are classified to choose k.
        pooling: mean over patches; class: the class token, as DINO; quarters: the means over the four quarters, side by
            side.

    Raises:
        ValueError: no k, or a value outside its range.
    """

    neighbours: tuple[int, ...] = NEIGHBOURS
    temperature: float = TEMPERATURE
    queries: int = 10_000
    pooling: ImagePooling = "mean"

    takes_layers = True

    def __post_init__(self) -> None:
        ks = self.neighbours
        check_choice("pooling", self.pooling, ImagePooling)
        check_values(
            ("neighbours", ks, bool(ks) and min(ks) >= 1, "must be numbers of at least 1"),
            ("temperature", self.temperature, 0 < self.temperature < np.inf, "must be above 0"),
            ("queries", self.queries, self.queries >= 1, "must be at least 1"),
        )

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return (LayerSet(layers, self.pooling),)

    def check(self, labels: IntArray, key: Callable[[int], str]) -> None:
        self._fitting(len(labels))

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Return one figure."""
        train, test = (part.array for part in task.both(*self.wanted(task.layers)))
        labels = task.labels()
        found = task.once("neighbours", lambda: self.find(train, test, seed=task.seed, device=task.device))
        return [self.classify(train, labels[0], test, labels[1], found=found)]

    def find(self, train: Array, test: Array, *, seed: int = 0, device: torch.device | str = "cpu") -> Found:
        """Return the neighbours of training samples that choose k, and of test samples.

        Args:
            train, test: [N, D] and [M, D] features.
            seed: of the choice of ``queries``.
            device: of similarities.

        Raises:
            ValueError: no k from 1 to N - 1.
        """
        most, chosen = self._fitting(len(train))[-1], np.arange(len(train))
        if len(train) > self.queries:
            chosen = np.sort(generator(Stream.EVALUATION, seed=seed, lane=1).permutation(len(train))[: self.queries])
        own = nearest(train, train[chosen], most, leave_out=chosen, device=device)
        return Found(chosen, own, nearest(train, test, most, device=device))

    def classify(
        self,
        train: Array,
        train_labels: IntArray,
        test: Array,
        test_labels: IntArray,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        found: Found | None = None,
    ) -> ProbeResult:
        """Classify test samples, and return the figure.

        Args:
            train, test: [N, D] and [M, D] features.
            train_labels, test_labels: [N] and [M] classes, integers.
            seed: of the choice of ``queries``.
            device: of similarities.
            found: what ``find`` returned for the features, if that is known.

        Raises:
            ValueError: see ``check_samples``; no k from 1 to N - 1.
        """
        train_labels, test_labels = check_samples(train, train_labels, test, test_labels)
        ks = self._fitting(len(train))
        found = found or self.find(train, test, seed=seed, device=device)
        classes, answers = np.unique(train_labels, return_inverse=True)
        votes, predicted = (vote(near, answers, len(classes), ks, self.temperature) for near in (found.own, found.test))
        validation = [float(v) for v in (votes == answers[found.chosen]).mean(axis=1)]
        best = int(np.argmax(validation))
        predictions = classes[predicted]  # [len(ks), M]
        settings = {
            "k": ks[best],
            "neighbours": ks,
            "validation": validation,
            "temperature": self.temperature,
            "test_by_k": {k: float(a) for k, a in zip(ks, (predictions == test_labels).mean(axis=1), strict=True)},
        }
        return classification_result("knn", predictions[best], train_labels, test_labels, validation[best], settings)

    def _fitting(self, samples: int) -> list[int]:
        """Return the values of k below ``samples``, ascending."""
        ks = sorted({k for k in self.neighbours if k < samples})
        right = f"must contain numbers from 1 to {samples - 1} (N - 1)"
        check_values(("neighbours", self.neighbours, bool(ks), right))
        return ks
