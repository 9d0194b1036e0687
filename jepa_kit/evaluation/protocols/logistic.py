"""Multinomial logistic regression, on all labels or on a few.

N  training samples    M  test samples    D  width of a feature    K  classes
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    Array,
    ImagePooling,
    LayerSet,
    Pair,
    Probe,
    ProbeResult,
    T,
    Task,
    check_samples,
    check_values,
    choose_holdout,
    classification_result,
    split,
)
from jepa_kit.evaluation.protocols.subsets import Subset, listed_samples
from jepa_kit.evaluation.protocols.whitening import Standardising, Whitening
from jepa_kit.registry import check_choice
from jepa_kit.rng import IntArray

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
CUTS = (1e-3, 1e-6, 1e-9)
"""Components below the last are rounding errors of float32."""
PATIENCE = 2
FEW = 2000
SPLITS = 5
SUBSETS = ("1%", "10%", "all")
DRAWS = 3
HOLDOUT = 0.2


class Inputs(NamedTuple):
    """Inputs of classifiers, C columns of which each takes the first few; they do not depend on the label."""

    components: tuple[int, ...]
    """The number of columns for each cut, ascending to C."""
    train: NDArray[np.float32]
    """[N, C]"""
    test: NDArray[np.float32]
    """[M, C]"""


@PROTOCOLS.register("logistic")
@dataclass(kw_only=True)
class Logistic(Probe):
    """Logistic regression on frozen features, with all labels or a few.

    scikit-learn's multinomial logistic regression (L2 penalty on the weights, none on the intercept; L-BFGS). With
    ``whiten``, features are whitened (PCA). The probe stays linear, and does not depend on the scales or axes of the
    features: the penalty is on the variance of the logits. Without it, convergence decides the result: variances along
    the components of a JEPA's features span ten orders of magnitude, and L-BFGS does not converge in 3,000 iterations;
    with it, in about 10. Whitening also amplifies weak components: random features gain more than learned ones.

    Without ``whiten`` features are only standardised, and the penalty favours the directions that vary most.
    ``max_iter`` then matters if the penalty is weak.

    The number of components and the penalty are those with the lowest cross entropy on held-out training samples; then
    the classifier is fitted to the whole training set. Penalties are tried from the strongest down, until two in a row
    are past the minimum. Below ``FEW`` samples there are ``SPLITS`` random splits, with more held-out samples if a
    class would otherwise have none. With one penalty and one cut there is nothing to choose, and no split. If a class
    has a single sample, no split is possible: the middle penalty and cut are used.

    Source: the low-shot protocols of I-JEPA's table 2 and of MSN (arXiv 2204.07141) use 1 % of the labels; MSN fits a
    logistic regression on frozen features. Departures: whitening, unless ``whiten`` is false; the penalty and the
    number of components are chosen inside the given labels (if a class has one image, the middle ones are used);
    I-JEPA's own figure for 1 % is from fine-tuning (``finetune``).

    Example: ``{name: logistic, subsets: [1%, 10/class, all], draws: 5}``

    Args:
        subsets: of all, fractions as 1%, images as 10/class; one figure for each. None for 1%, 10% and all.
        names: a file with the names of samples, one per line, instead of subsets and draws.
        draws: number of draws over which the figure of a subset (except all) is averaged; None for 3.
        penalties: weights of half the squared norm against the mean loss, to choose from, descending; scikit-learn's C
            is 1 / (penalty * samples).
        whiten: features become principal components of variance 1; false only standardises them, as a batch norm
            before a linear head does.
        cuts: to choose from, descending: components are kept whose variance is above this fraction of the largest.
            None for 1e-3, 1e-6 and 1e-9.
        holdout: fraction of the labels, and of each class, that chooses, in (0, 0.5]; None for 0.2.
        max_iter: iterations of each fit; ``settings["converged"]`` is whether the last one needed fewer.
        pooling: mean over patches; class: the class token; quarters: the means over the four quarters, side by side.

    Raises:
        ValueError: a value outside its range, or an option without effect.
    """

    subsets: tuple[str, ...] | None = None
    names: str | None = None
    draws: int | None = None
    penalties: tuple[float, ...] = PENALTIES
    whiten: bool = True
    cuts: tuple[float, ...] | None = None
    holdout: float | None = None
    max_iter: int = 1000
    pooling: ImagePooling = "mean"

    takes_layers = True

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, ImagePooling)
        subsets, draws, names, cuts = self.subsets, self.draws, self.names, self.cuts
        listing = f"would do nothing: names (={names!r}) lists the samples"
        undrawn = f"would do nothing: subsets (={subsets}) has nothing to draw"
        missing = "must be a file with a name of a sample on each line; there is none"
        components = "would do nothing: whiten is False, so there are no components"
        check_values(
            ("subsets", subsets, subsets is None or _different(subsets), "must name at least one, and each once"),
            ("draws", draws, draws is None or draws >= 1, "must be at least 1"),
            ("penalties", self.penalties, _descending(self.penalties, np.inf), "must be numbers above 0, descending"),
            ("cuts", cuts, cuts is None or self.whiten, components),
            ("cuts", cuts, cuts is None or _descending(cuts, 1.0), "must be numbers between 0 and 1, descending"),
            ("max_iter", self.max_iter, self.max_iter >= 1, "must be at least 1"),
            ("subsets", subsets, names is None or subsets is None, listing),
            ("draws", draws, names is None or draws is None, listing),
            ("draws", draws, draws is None or subsets != ("all",), undrawn),
            ("names", repr(names), names is None or Path(names).is_file(), missing),
        )
        settings = len(self.penalties) * (len(cuts or CUTS) if self.whiten else 1)
        choose_holdout(self.holdout, HOLDOUT, settings, f"penalties (={self.penalties}) and cuts (={cuts}) leave")
        for text in subsets or ():
            Subset(text)

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return (LayerSet(layers, self.pooling),)

    def check(self, labels: IntArray, key: Callable[[int], str]) -> None:
        list(self._drawn(labels, key, seed=0))

    def __call__(self, task: Task) -> list[ProbeResult]:
        """Return one figure per subset, or one for the list of names."""
        drawn = self._drawn(task.labels()[0], task.train.dataset.key if self.names else None, task.seed)
        return [self._mean(task, draws, variant) for variant, draws in drawn]

    def _drawn(
        self, labels: IntArray, key: Callable[[int], str] | None, seed: int
    ) -> Iterator[tuple[str, list[IntArray]]]:
        """Yield (variant, the samples of each draw) of each figure."""
        if self.names is not None:
            assert key is not None
            yield Path(self.names).name, [listed_samples(self.names, key, len(labels))]
            return
        for subset in map(Subset, SUBSETS if self.subsets is None else self.subsets):
            draws = range(1 if subset.is_all else DRAWS if self.draws is None else self.draws)
            variant = "" if subset.is_all else subset.text
            yield variant, [subset.draw(labels, seed=seed, draw=d) for d in draws]

    def _mean(self, task: Task, draws: list[IntArray], variant: str) -> ProbeResult:
        """Return the mean over draws; its error is their deviation."""
        train, test = task.both(*self.wanted(task.layers))
        train_labels, test_labels = task.labels()
        found = []
        for d, chosen in enumerate(draws):
            samples = train.array[chosen], train_labels[chosen], test.array, test_labels
            whole = len(chosen) == len(train_labels)
            given = task.once("inputs", lambda: self.inputs(train.array, test.array)) if whole else None
            found.append(self.classify(*samples, seed=task.seed + d, given=given))
        if len(found) == 1:
            return replace(found[0], variant=variant)
        accuracies = [one.accuracy for one in found]
        validations: list[Any] = [one.validation for one in found]
        return replace(
            found[0],
            variant=variant,
            accuracy=float(np.mean(accuracies)),
            # with one setting no draw has a validation figure
            validation=None if None in validations else float(np.mean(validations)),
            standard_error=float(np.std(accuracies, ddof=1)),
            settings={"accuracies": accuracies, "draws": [one.settings for one in found]},
            predictions=np.empty(0, np.int64),
            draws=len(found),
        )

    def inputs(self, train: Array, test: Array) -> Inputs:
        """Return the inputs of classifiers: [N, D] and [M, D] features whitened, or standardised without ``whiten``."""
        if not self.whiten:
            scaled = Standardising(train)
            return Inputs((train.shape[1],), scaled(train), scaled(test))
        whitening = Whitening(train)
        components = tuple(map(whitening.above, self.cuts or CUTS))
        return Inputs(components, *(whitening(part, components[-1]) for part in (train, test)))

    def classify(
        self,
        train: Array,
        train_labels: IntArray,
        test: Array,
        test_labels: IntArray,
        *,
        seed: int = 0,
        given: Inputs | None = None,
    ) -> ProbeResult:
        """Fit one classifier, and return its figure.

        Args:
            train, test: [N, D] and [M, D] features.
            train_labels, test_labels: [N] and [M] classes, integers.
            seed: of the splits.
            given: what ``inputs`` made of the features, if that is known.

        Raises:
            ValueError: see ``check_samples``.
        """
        train_labels, test_labels = check_samples(train, train_labels, test, test_labels)
        given = given or self.inputs(train, test)
        penalties, kept, known, holdout = self.penalties, given.components, given.train, self.holdout or HOLDOUT
        if np.unique(train_labels, return_counts=True)[1].min() == 1:  # no split is possible
            penalties, kept = (_middle(penalties),), (_middle(kept),)
        kept = tuple(dict.fromkeys(kept))
        tried: list[dict[str, float]] = []
        if len(kept) > 1 or len(penalties) > 1:
            pairs = _pairs(train_labels, holdout, seed)
            for components in kept:
                trials = _path(known[:, :components], train_labels, pairs, penalties, self.max_iter)
                tried += [{"components": components, **trial} for trial in trials]
        best = min(tried, key=lambda trial: trial["cross_entropy"], default=None)
        components = int(best["components"]) if best else kept[0]
        penalty = best["penalty"] if best else penalties[0]
        classifier = _fit(known[:, :components], train_labels, penalty, self.max_iter)
        settings = {
            "whiten": self.whiten,
            "components": components,
            "penalty": penalty,
            "C": classifier.C,
            "tried": tried,
            "holdout": holdout if tried else None,
            "converged": int(classifier.n_iter_.max()) < self.max_iter,
        }
        predictions = classifier.predict(given.test[:, :components])
        validation = best["accuracy"] if best else None
        return classification_result("logistic", predictions, train_labels, test_labels, validation, settings)


def _middle(values: Sequence[T]) -> T:
    """Return the middle value; of an even number, the first of the middle two."""
    return values[(len(values) - 1) // 2]


def _pairs(labels: IntArray, holdout: float, seed: int) -> list[Pair]:
    if len(labels) >= FEW:
        return split(labels, holdout, seed)
    least = (len(np.unique(labels)) + 0.5) / len(labels)  # at least one of each class after rounding
    return split(labels, min(0.5, max(holdout, least)), seed, SPLITS)


def _path(
    features: Array, labels: IntArray, pairs: Sequence[Pair], penalties: Sequence[float], max_iter: int
) -> Iterator[dict[str, float]]:
    """Yield the figures of each penalty on held-out samples, until ``PATIENCE`` penalties are past the minimum.

    Args:
        features, labels: [N, D], [N].
        pairs: (samples to fit on, samples to choose on); figures are averaged over them.
    """
    entropies: list[float] = []
    for penalty in penalties:
        found = [_score(features, labels, pair, penalty, max_iter) for pair in pairs]
        entropy, accuracy = (float(np.mean(values)) for values in zip(*found, strict=True))
        entropies.append(entropy)
        yield {"penalty": penalty, "cross_entropy": entropy, "accuracy": accuracy}
        if len(entropies) - 1 - int(np.argmin(entropies)) == PATIENCE:
            break


def _score(features: Array, labels: IntArray, pair: Pair, penalty: float, max_iter: int) -> tuple[float, float]:
    """Return cross entropy and accuracy on held-out samples."""
    fit_on, choose_on = pair
    classifier = _fit(features[fit_on], labels[fit_on], penalty, max_iter)
    scores = classifier.decision_function(features[choose_on])  # [M, K], or [M] of the second of two classes
    scores = scores if scores.ndim == 2 else np.stack([np.zeros_like(scores), scores], axis=1)
    log_p = log_softmax(scores, axis=1)  # predict_log_proba has -inf if a probability rounds to 0
    answers = np.searchsorted(classifier.classes_, labels[choose_on])
    entropy = -float(log_p[np.arange(len(answers)), answers].mean())
    return entropy, float(np.mean(log_p.argmax(axis=1) == answers))


def _fit(features: Array, labels: IntArray, penalty: float, max_iter: int) -> LogisticRegression:
    classifier = LogisticRegression(C=1.0 / (penalty * len(features)), max_iter=max_iter)
    # One thread: on such small products, threads synchronise longer than they compute.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported in the result
        return classifier.fit(features, labels)


def _different(values: Sequence[str]) -> bool:
    """Return whether there are values, and no two are equal."""
    return 0 < len(values) == len(set(values))


def _descending(values: Sequence[float], below: float) -> bool:
    """Return whether there are values, which descend between ``below`` and 0, both excluded."""
    return bool(values) and below > values[0] and values[-1] > 0 and all(b < a for a, b in pairwise(values))
