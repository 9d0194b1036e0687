"""Probes of frozen features: a linear classifier, and nearest neighbours.

Settings are chosen inside the training set; the test set is looked at once, with the settings chosen.

    N  training samples    M  test samples    D  width of a feature    K  classes
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from threadpoolctl import threadpool_limits
from torch import Tensor

from jepa_kit.rng import FloatArray, IntArray, Stream, generator

Features = NDArray[np.floating[Any]]

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
CUTS = (1e-3, 1e-6, 1e-9)
"""Below the last lies what rounding to float32 leaves."""
PATIENCE = 2
NEIGHBOURS = (10, 20, 100, 200)
"""The numbers of neighbours that DINO reports (Caron et al. 2021, arXiv 2104.14294, F)."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Args:
        protocol: name in ``PROTOCOLS``.
        accuracy: share of the test set that is right, in [0, 1].
        validation: the same of the settings chosen, on the samples of the training set that chose them.
        settings: the settings chosen, and what they were chosen from.
        n_train: N.
        n_test: M.
        classes: K, of the training set.
        chance: the best that one answer for everything gets on the test set, in [0, 1].
        predictions: [M] the answers.
    """

    protocol: str
    accuracy: float
    validation: float
    settings: dict[str, Any]
    n_train: int
    n_test: int
    classes: int
    chance: float
    predictions: IntArray

    @property
    def standard_error(self) -> float:
        """Standard deviation of the accuracy over test sets of this length (binomial)."""
        return float(np.sqrt(self.accuracy * (1.0 - self.accuracy) / self.n_test))


class Probe(Protocol):
    """What an evaluation asks of a protocol."""

    def __call__(
        self,
        train: Features,
        train_labels: IntArray,
        test: Features,
        test_labels: IntArray,
        *,
        seed: int = 0,
    ) -> ProbeResult:
        """[N, D], [N], [M, D], [M] -> the result; the same for the same arguments."""
        ...


def linear_probe(
    train: Features,
    train_labels: IntArray,
    test: Features,
    test_labels: IntArray,
    *,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
    cuts: Sequence[float] = CUTS,
    holdout: float = 0.2,
    max_iter: int = 1000,
) -> ProbeResult:
    """Multinomial logistic regression on whitened features (scikit-learn's, L2 penalty, L-BFGS).

    Features are standardised, turned onto their principal components, and these brought to variance 1. The probe stays
    linear in the features, and what it finds does not hang on their scales or axes: the penalty is on the variance of
    the logits. Without this the result is a question of patience: variances along the components of a JEPA's features
    span ten orders of magnitude, and L-BFGS is not done after 3,000 iterations; with it, after about 10.

    How many components are kept, and the penalty, are those with the least cross entropy on samples held out of the
    training set; then the classifier is fitted to the whole training set. Penalties are tried from the strongest on,
    until two in a row have passed the least cross entropy. The intercept is not penalised.

    Args:
        train, test: [N, D] and [M, D] features.
        train_labels, test_labels: [N] and [M] classes, integers.
        seed: of the split.
        penalties: weights of half the squared norm against the mean loss, descending; scikit-learn's C is
            1 / (penalty * samples).
        cuts: components are kept whose variance is above this share of the largest, in (0, 1).
        holdout: share of the training set that chooses, in (0, 0.5], the same share of each class.
        max_iter: iterations of each fit; ``settings["converged"]`` says whether the last one needed fewer.

    Raises:
        ValueError: see ``check_samples``; a class too rare to hold a sample of it out; an option outside its range.
    """
    train_labels, test_labels = check_samples(train, train_labels, test, test_labels)
    _check_descending("penalties", penalties, np.inf)
    _check_descending("cuts", cuts, 1.0)
    if max_iter < 1:
        raise ValueError(f"max_iter (={max_iter}) must be at least 1")
    if not 0 < holdout <= 0.5:
        raise ValueError(f"holdout (={holdout}) must be above 0 and at most 0.5")
    fit_on, choose_on = _split(train_labels, holdout, seed)
    whitening = Whitening(train)
    tried: list[dict[str, float]] = []
    for components in dict.fromkeys(whitening.above(cut) for cut in cuts):
        x = whitening(train, components)
        pair = (x[fit_on], train_labels[fit_on]), (x[choose_on], train_labels[choose_on])
        tried += [{"components": components, **trial} for trial in _path(*pair, penalties, max_iter)]
    best = min(tried, key=lambda trial: trial["cross_entropy"])
    components = int(best["components"])
    classifier = _fit(whitening(train, components), train_labels, best["penalty"], max_iter)
    settings = {
        "components": components,
        "penalty": best["penalty"],
        "C": classifier.C,
        "tried": tried,
        "holdout": holdout,
        "converged": int(classifier.n_iter_.max()) < max_iter,
    }
    predictions = classifier.predict(whitening(test, components))
    return _result("linear", predictions, train_labels, test_labels, best["accuracy"], settings)


class Whitening:
    """Features to their principal components, each of mean 0 and variance 1 over the training set.

    Args:
        features: [N, D] of the training set. Each column is standardised first; a constant one counts for nothing.
    """

    def __init__(self, features: Features) -> None:
        self.mean = features.mean(axis=0, dtype=np.float64)  # [D]
        deviation = features.std(axis=0, dtype=np.float64)
        # what is left of a constant after rounding is no signal
        self.scale = np.where(deviation > 1e-7 * np.abs(self.mean), 1.0 / np.maximum(deviation, 1e-30), 0.0)
        covariance = np.zeros((features.shape[1], features.shape[1]))
        for part in self._standardised(features):
            covariance += part.T @ part
        values, vectors = np.linalg.eigh(covariance / len(features))  # ascending
        self.variances: FloatArray = np.maximum(values[::-1], 0.0)  # [D]
        self.axes: FloatArray = vectors[:, ::-1]  # [D, D], a column each

    def above(self, cut: float) -> int:
        """How many components have more than the share ``cut`` of the largest variance; at least 1."""
        return max(1, int(np.sum(self.variances > cut * self.variances[0])))

    def __call__(self, features: Features, components: int) -> NDArray[np.float32]:
        """[M, D] -> [M, components]."""
        axes = self.axes[:, :components] / np.sqrt(np.maximum(self.variances[:components], 1e-30))
        return np.concatenate([(part @ axes).astype(np.float32) for part in self._standardised(features)])

    def _standardised(self, features: Features) -> Iterator[FloatArray]:
        """Rows in float64, some at a time: small variances need the digits, large sets the memory."""
        for start in range(0, len(features), 8192):
            yield (features[start : start + 8192] - self.mean) * self.scale


def _path(
    fit_on: tuple[Features, IntArray], choose_on: tuple[Features, IntArray], penalties: Sequence[float], max_iter: int
) -> Iterator[dict[str, float]]:
    """What each penalty gives on ``choose_on``, until ``PATIENCE`` of them have passed the least cross entropy."""
    features, labels = choose_on
    entropies: list[float] = []
    for penalty in penalties:
        classifier = _fit(*fit_on, penalty, max_iter)
        log_chances = classifier.predict_log_proba(features)  # [M, K]
        answers = np.searchsorted(classifier.classes_, labels)
        entropies.append(-float(log_chances[np.arange(len(answers)), answers].mean()))
        accuracy = float(np.mean(log_chances.argmax(axis=1) == answers))
        yield {"penalty": penalty, "cross_entropy": entropies[-1], "accuracy": accuracy}
        if len(entropies) - 1 - int(np.argmin(entropies)) == PATIENCE:
            break


def _fit(features: Features, labels: IntArray, penalty: float, max_iter: int) -> LogisticRegression:
    classifier = LogisticRegression(C=1.0 / (penalty * len(features)), max_iter=max_iter)
    # One thread: on products as small as these, threads wait for one another longer than they work.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says it
        return classifier.fit(features, labels)


def _check_descending(name: str, values: Sequence[float], below: float) -> None:
    if not values or any(not 0 < v < below for v in values) or any(b >= a for a, b in pairwise(values)):
        right = "above 0" if below == np.inf else f"between 0 and {below:g}"
        raise ValueError(f"{name} (={tuple(values)}) must be numbers {right}, descending")


def _split(labels: IntArray, holdout: float, seed: int) -> tuple[IntArray, IntArray]:
    """Indices to fit on and indices to choose on, with the same share of each class."""
    names, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2 or int(len(labels) * holdout) < len(names):
        raise ValueError(
            f"the training set ({len(labels)} samples) must have a sample of each of its {len(names)} classes to fit "
            f"on and one to choose on; class {names[counts.argmin()]} has {counts.min()}"
        )
    state = int(generator(Stream.EVALUATION, seed=seed).integers(2**31))
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=holdout, random_state=state)
    fit_on, choose_on = next(splitter.split(np.zeros((len(labels), 1)), labels))
    return fit_on, choose_on


def knn_probe(
    train: Features,
    train_labels: IntArray,
    test: Features,
    test_labels: IntArray,
    *,
    seed: int = 0,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    queries: int = 10_000,
) -> ProbeResult:
    """Weighted nearest neighbours by cosine (Wu et al. 2018, arXiv 1805.01978, section 3.4; used by DINO).

    The k most similar training samples vote for their classes, each with the weight exp(cosine / temperature).
    Here k is the number of neighbours that answers best when each training sample is asked and its own place in the
    training set is left out; the smaller of two equal ones. (Those papers report k = 200, and the best of four.)

    Args:
        train, test: [N, D] and [M, D] features.
        train_labels, test_labels: [N] and [M] classes, integers.
        seed: of the training samples that are asked.
        neighbours: values of k; those above N - 1 are left out.
        temperature: above 0; 0.07 is Wu et al.'s and DINO's.
        queries: how many training samples are asked at most.

    Raises:
        ValueError: see ``check_samples``; no k from 1 to N - 1; a temperature that is not above 0.
    """
    train_labels, test_labels = check_samples(train, train_labels, test, test_labels)
    ks = sorted({k for k in neighbours if k < len(train)})
    if not ks or ks[0] < 1:
        raise ValueError(f"neighbours (={tuple(neighbours)}) must hold numbers from 1 to {len(train) - 1}, one below N")
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature (={temperature}) must be above 0")
    if queries < 1:
        raise ValueError(f"queries (={queries}) must be at least 1")
    classes, answers = np.unique(train_labels, return_inverse=True)
    bank = _Bank(train, answers, len(classes), temperature)
    asked = np.arange(len(train))
    if len(train) > queries:
        asked = np.sort(generator(Stream.EVALUATION, seed=seed, lane=1).permutation(len(train))[:queries])
    votes = bank.classify(train[asked], ks, leave_out=asked)  # [len(ks), Q]
    validation = [float(v) for v in (votes == answers[asked]).mean(axis=1)]
    best = int(np.argmax(validation))
    predictions = classes[bank.classify(test, ks)]  # [len(ks), M]
    settings = {
        "k": ks[best],
        "neighbours": ks,
        "validation": validation,
        "temperature": temperature,
        "test_by_k": {k: float(a) for k, a in zip(ks, (predictions == test_labels).mean(axis=1), strict=True)},
    }
    return _result("knn", predictions[best], train_labels, test_labels, validation[best], settings)


class _Bank:
    """Training features of length 1 and their classes, ready to be asked."""

    def __init__(self, features: Features, labels: IntArray, classes: int, temperature: float) -> None:
        self.features = _unit(features)  # [N, D]
        self.labels = torch.from_numpy(labels)  # [N], 0 to K - 1
        self.classes, self.temperature = classes, temperature

    def classify(self, features: Features, ks: list[int], leave_out: IntArray | None = None) -> IntArray:
        """The class that the nearest k vote for: [len(ks), M], 0 to K - 1; of equal votes, the lower.

        Args:
            features: [M, D].
            ks: ascending.
            leave_out: [M] the training sample that each may not ask.
        """
        answers = []
        own = None if leave_out is None else torch.from_numpy(leave_out)
        rows = max(1, 2**24 // len(self.features))  # 64 MiB of float32 similarities at a time
        for start in range(0, len(features), rows):
            cosine = _unit(features[start : start + rows]) @ self.features.T  # [m, N]
            if own is not None:
                cosine.scatter_(1, own[start : start + rows, None], -torch.inf)
            near, index = cosine.topk(ks[-1], dim=1)
            # a common factor of a row's weights moves no vote: the largest becomes 1
            weight = ((near - near[:, :1]) / self.temperature).exp()
            votes = torch.zeros(len(cosine), self.classes, dtype=weight.dtype)
            done, best = 0, []
            for k in ks:
                votes.scatter_add_(1, self.labels[index[:, done:k]], weight[:, done:k])
                best.append(votes.argmax(dim=1))
                done = k
            answers.append(torch.stack(best))
        return torch.cat(answers, dim=1).numpy()


def _unit(features: Features) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(features)), dim=1)


def check_samples(
    train: Features, train_labels: IntArray, test: Features, test_labels: IntArray
) -> tuple[IntArray, IntArray]:
    """The labels as int64, where features and labels fit together.

    Raises:
        ValueError: features that are not [samples, width] of finite floats or differ in width, labels that are not
            one integer for each sample, fewer than 2 classes, a class of the test set that training does not know.
    """
    labels = []
    for name, x, y in (("train", train, train_labels), ("test", test, test_labels)):
        if x.ndim != 2 or not len(x) or x.dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} must be float32 or float64 [samples, width], not {x.dtype} of shape {x.shape}")
        if not np.isfinite(x).all():
            bad = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
            raise ValueError(f"{name} must be finite, but the feature of sample {bad} is not")
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(
                f"{name}_labels must be an integer for each of the {len(x)} samples, not {y.dtype} of shape {y.shape}"
            )
        labels.append(y.astype(np.int64))
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train and test must be of one width, not {train.shape[1]} and {test.shape[1]}")
    known = np.unique(labels[0])
    if len(known) < 2:
        raise ValueError(f"train_labels must hold at least 2 classes, not {len(known)} (class {known[0]})")
    unknown = np.setdiff1d(labels[1], known)
    if len(unknown):
        raise ValueError(f"test_labels must be classes of train_labels, but class {unknown[0]} is not")
    return labels[0], labels[1]


def _result(
    protocol: str,
    predictions: IntArray,
    train_labels: IntArray,
    test_labels: IntArray,
    validation: float,
    settings: dict[str, Any],
) -> ProbeResult:
    return ProbeResult(
        protocol=protocol,
        accuracy=float(np.mean(predictions == test_labels)),
        validation=validation,
        settings=settings,
        n_train=len(train_labels),
        n_test=len(test_labels),
        classes=len(np.unique(train_labels)),
        chance=float(np.bincount(np.unique(test_labels, return_inverse=True)[1]).max() / len(test_labels)),
        predictions=predictions,
    )


PROTOCOLS: dict[str, Probe] = {"linear": linear_probe, "knn": knn_probe}
"""What ``tools/eval_net.py --protocol`` offers."""
