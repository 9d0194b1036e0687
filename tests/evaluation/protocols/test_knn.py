"""Nearest neighbours against scikit-learn and a plain float64 loop."""

import numpy as np
import pytest
from protocol_problems import PROBLEM, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS
from sklearn.neighbors import KNeighborsClassifier

from jepa_kit.evaluation import neighbours
from jepa_kit.evaluation.protocols.knn import KNN


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_knn_is_scikit_learns_for_every_k(dtype):
    train, test = TRAIN.astype(np.float64), TEST.astype(np.float64)
    probe = KNN(neighbours=(1, 5, 20, 399))
    found = probe.classify(train.astype(dtype), TRAIN_LABELS, test.astype(dtype), TEST_LABELS)
    for k, accuracy in found.settings["test_by_k"].items():
        theirs = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train, TRAIN_LABELS)
        assert accuracy == pytest.approx(theirs.score(test, TEST_LABELS), abs=0 if dtype is np.float64 else 0.005)
        if dtype is np.float64 and k == found.settings["k"]:
            assert np.array_equal(found.predictions, theirs.predict(test))
            assert found.accuracy == accuracy


def test_knn_chooses_k_by_leave_one_out():
    ks = (1, 3, 10)
    found = KNN(neighbours=ks).classify(*PROBLEM)
    unit = TRAIN.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for k, accuracy in zip(ks, found.settings["validation"], strict=True):
        right = 0
        for i in range(len(unit)):
            cosine = unit @ unit[i]
            cosine[i] = -np.inf
            near = np.argsort(-cosine)[:k]
            votes = np.bincount(TRAIN_LABELS[near], weights=np.exp(cosine[near] / 0.07))
            right += votes.argmax() == TRAIN_LABELS[i]
        assert accuracy == pytest.approx(right / len(unit), abs=0.003)
    assert found.settings["k"] == ks[int(np.argmax(found.settings["validation"]))]
    assert found.validation == max(found.settings["validation"])


def test_votes_do_not_depend_on_the_batch(monkeypatch):
    def answer():
        known, own = TRAIN.astype(np.float64), np.arange(len(TRAIN))
        found = neighbours.nearest(known, known, 20, leave_out=own)
        return neighbours.vote(found, TRAIN_LABELS, 4, [3, 20])

    answers = [answer()]
    monkeypatch.setattr(neighbours, "SIMILARITIES", 3 * len(TRAIN))
    answers.append(answer())
    assert answers[0].shape == (2, 400)
    assert np.array_equal(*answers)


def test_knn_queries_bounds_the_training_samples():
    few = KNN(neighbours=(5,), queries=40).classify(*PROBLEM)
    assert (few.validation * 40) == pytest.approx(round(few.validation * 40))
    assert few.accuracy == KNN(neighbours=(5,)).classify(*PROBLEM).accuracy


def test_knn_ignores_a_k_above_the_training_set():
    assert KNN(neighbours=(200, 10, 400)).classify(*PROBLEM).settings["neighbours"] == [10, 200]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": (0, 5)}, "neighbours (=(0, 5)) must be numbers of at least 1"),
        ({"neighbours": ()}, "neighbours (=()) must be numbers of at least 1"),
        ({"neighbours": (400,)}, "neighbours (=(400,)) must contain numbers from 1 to 399 (N - 1)"),
        ({"temperature": 0.0}, "temperature (=0.0) must be above 0"),
        ({"queries": 0}, "queries (=0) must be at least 1"),
    ],
)
def test_knn_options(options, message):
    with pytest.raises(ValueError) as error:
        KNN(**options).classify(*PROBLEM)
    assert str(error.value) == message
