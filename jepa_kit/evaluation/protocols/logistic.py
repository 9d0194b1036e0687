"""Multinomial logistic regression, on all labels or on a few.

N  training samples    M  test samples    D  width of a feature    K  classes
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jepa_kit.evaluation.protocols.base import (
    PROTOCOLS,
    Array,
    LayerSet,
    Probe,
    ProbeResult,
    Task,
    check_holdout,
    check_samples,
    classification_result,
    split,
)
from jepa_kit.evaluation.protocols.subsets import Subset, listed
from jepa_kit.evaluation.protocols.whitening import Standardising, Whitening
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


@PROTOCOLS.register("logistic")
@dataclass(kw_only=True)
class Logistic(Probe):
    """Logistic regression on frozen features, with all labels or a few.

    Source: the low-shot protocols of I-JEPA's table 2 and of MSN (arXiv 2204.07141) use 1 % of the labels; MSN fits a
    logistic regression on frozen features. Departures: whitening, unless ``whiten`` is false; the penalty and the
    number of components are chosen inside the given labels (if a class has one image, the middle ones are used);
    I-JEPA's own figure for 1 % is from fine-tuning (``finetune``).

    Example: ``{name: logistic, subsets: [1%, 10/class, all], draws: 5}``

    Args:
        subsets: of all, fractions as 1%, images as 10/class; one figure for each. None for 1%, 10% and all.
        names: a file with the names of samples, one per line, instead of subsets and draws.
        draws: number of draws over which the figure of a subset (except all) is averaged; None for 3.
        penalties: weights of half the squared norm, to choose from, descending.
        whiten: features become principal components of variance 1; false only standardises them, as a batch norm
            before a linear head does.
        cuts: to choose from, descending: components are kept whose variance is above this fraction of the largest.
            None for 1e-3, 1e-6 and 1e-9.
        holdout: fraction of the labels that chooses, in (0, 0.5]; None for 0.2.
        max_iter: iterations of each fit.

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

    takes_layers = True

    def __post_init__(self) -> None:
        subsets, draws, names, cuts = self.subsets, self.draws, self.names, self.cuts
        if subsets is not None and (not subsets or len(set(subsets)) < len(subsets)):
            raise ValueError(f"subsets (={subsets}) must name at least one, and each once")
        if draws is not None and draws < 1:
            raise ValueError(f"draws (={draws}) must be at least 1")
        _check(self.penalties, cuts, self.holdout, self.max_iter, self.whiten)
        one_cut = not self.whiten or (cuts is not None and len(cuts) == 1)
        if self.holdout is not None and len(self.penalties) == 1 and one_cut:
            raise ValueError(
                f"holdout (={self.holdout}) would do nothing: penalties (={self.penalties}) and cuts (={cuts}) leave "
                "nothing to choose"
            )
        for option, value in (("subsets", subsets), ("draws", draws)):
            if names is not None and value is not None:
                raise ValueError(f"{option} (={value}) would do nothing: names (={names!r}) lists the samples")
        if draws is not None and subsets == ("all",):
            raise ValueError(f"draws (={draws}) would do nothing: subsets (={subsets}) has nothing to draw")
        if names is not None and not Path(names).is_file():
            raise ValueError(f"names (={names!r}) must be a file with a name of a sample on each line; there is none")
        for text in subsets or ():
            Subset(text)

    def wanted(self, layers: str) -> tuple[LayerSet, ...]:
        return (LayerSet(layers),)

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
            yield Path(self.names).name, [listed(self.names, key, len(labels))]
            return
        for subset in map(Subset, SUBSETS if self.subsets is None else self.subsets):
            draws = range(1 if subset.is_all else DRAWS if self.draws is None else self.draws)
            variant = "" if subset.is_all else subset.text
            yield variant, [subset.draw(labels, seed=seed, draw=d) for d in draws]

    def _mean(self, task: Task, draws: list[IntArray], variant: str) -> ProbeResult:
        """Return the mean over draws; its error is their deviation."""
        train, test = task.both(LayerSet(task.layers))
        train_labels, test_labels = task.labels()
        names = ("penalties", "whiten", "cuts", "holdout", "max_iter")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        found = [
            logistic_probe(
                train.array[chosen], train_labels[chosen], test.array, test_labels, seed=task.seed + d, **options
            )
            for d, chosen in enumerate(draws)
        ]
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


def logistic_probe(
    train: Array,
    train_labels: IntArray,
    test: Array,
    test_labels: IntArray,
    *,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
    whiten: bool = True,
    cuts: Sequence[float] | None = None,
    holdout: float | None = None,
    max_iter: int = 1000,
) -> ProbeResult:
    """Fit a multinomial logistic regression on frozen features (scikit-learn's, L2 penalty, L-BFGS).

    With ``whiten``, features are whitened (PCA). The probe stays linear, and does not depend on the scales or axes of
    the features: the penalty is on the variance of the logits. Without it, convergence decides the result: variances
    along the components of a JEPA's features span ten orders of magnitude, and L-BFGS does not converge in 3,000
    iterations; with it, in about 10. Whitening also amplifies weak components: random features gain more than learned
    ones.

    Without ``whiten`` features are only standardised, and the penalty favours the directions that vary most.
    ``max_iter`` then matters if the penalty is weak.

    The number of components and the penalty are those with the lowest cross entropy on held-out training samples; then
    the classifier is fitted to the whole training set. Penalties are tried from the strongest down, until two in a row
    are past the minimum. The intercept is not penalised. Below ``FEW`` samples there are ``SPLITS`` random splits, with
    more held-out samples if a class would otherwise have none. With one penalty and one cut there is nothing to choose,
    and no split. If a class has a single sample, no split is possible: the middle penalty and cut are used.

    Args:
        train, test: [N, D] and [M, D] features.
        train_labels, test_labels: [N] and [M] classes, integers.
        seed: of the splits.
        penalties: weights of half the squared norm against the mean loss, descending; scikit-learn's C is
            1 / (penalty * samples).
        whiten: as above.
        cuts: components are kept whose variance is above this fraction of the largest, in (0, 1); None for ``CUTS``.
        holdout: fraction of the training set, and of each class, that chooses, in (0, 0.5]; None for 0.2.
        max_iter: iterations of each fit; ``settings["converged"]`` is whether the last one needed fewer.

    Raises:
        ValueError: see ``check_samples``; an option outside its range.
    """
    train_labels, test_labels = check_samples(train, train_labels, test, test_labels)
    _check(penalties, cuts, holdout, max_iter, whiten)
    cuts, holdout = CUTS if cuts is None else cuts, HOLDOUT if holdout is None else holdout
    if np.unique(train_labels, return_counts=True)[1].min() == 1:  # no split is possible
        penalties, cuts = [_middle(penalties)], [_middle(cuts)]
    prepared = _whitenings(train, cuts) if whiten else {train.shape[1]: Standardising(train)}
    tried: list[dict[str, float]] = []
    if len(prepared) > 1 or len(penalties) > 1:
        pairs = _pairs(train_labels, holdout, seed)
        for components, prepare in prepared.items():
            trials = _path(prepare(train), train_labels, pairs, penalties, max_iter)
            tried += [{"components": components, **trial} for trial in trials]
    best = min(tried, key=lambda trial: trial["cross_entropy"], default=None)
    components = int(best["components"]) if best else next(iter(prepared))
    penalty = best["penalty"] if best else penalties[0]
    prepare = prepared[components]
    classifier = _fit(prepare(train), train_labels, penalty, max_iter)
    settings = {
        "whiten": whiten,
        "components": components,
        "penalty": penalty,
        "C": classifier.C,
        "tried": tried,
        "holdout": holdout if tried else None,
        "converged": int(classifier.n_iter_.max()) < max_iter,
    }
    predictions = classifier.predict(prepare(test))
    validation = best["accuracy"] if best else None
    return classification_result("logistic", predictions, train_labels, test_labels, validation, settings)


def _middle(values: Sequence[float]) -> float:
    """Return the middle value; of an even number, the first of the middle two."""
    return values[(len(values) - 1) // 2]


def _whitenings(train: Array, cuts: Sequence[float]) -> dict[int, Callable[[Array], NDArray[np.float32]]]:
    """Return number of components -> function that whitens features to them."""
    whitening = Whitening(train)
    return {n: partial(whitening, components=n) for n in dict.fromkeys(whitening.above(cut) for cut in cuts)}


def _pairs(labels: IntArray, holdout: float, seed: int) -> list[tuple[IntArray, IntArray]]:
    if len(labels) >= FEW:
        return split(labels, holdout, seed)
    least = (len(np.unique(labels)) + 0.5) / len(labels)  # at least one of each class after rounding
    return split(labels, min(0.5, max(holdout, least)), seed, SPLITS)


def _path(
    features: Array,
    labels: IntArray,
    pairs: Sequence[tuple[IntArray, IntArray]],
    penalties: Sequence[float],
    max_iter: int,
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


def _score(
    features: Array, labels: IntArray, pair: tuple[IntArray, IntArray], penalty: float, max_iter: int
) -> tuple[float, float]:
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


def _check_descending(name: str, values: Sequence[float], below: float) -> None:
    if not values or any(not 0 < v < below for v in values) or any(b >= a for a, b in pairwise(values)):
        right = "above 0" if below == np.inf else f"between 0 and {below:g}"
        raise ValueError(f"{name} (={tuple(values)}) must be numbers {right}, descending")


def _check(
    penalties: Sequence[float], cuts: Sequence[float] | None, holdout: float | None, max_iter: int, whiten: bool
) -> None:
    _check_descending("penalties", penalties, np.inf)
    if cuts is not None:
        if not whiten:
            raise ValueError(f"cuts (={tuple(cuts)}) would do nothing: whiten is False, so there are no components")
        _check_descending("cuts", cuts, 1.0)
    if holdout is not None:
        check_holdout(holdout)
    if max_iter < 1:
        raise ValueError(f"max_iter (={max_iter}) must be at least 1")
