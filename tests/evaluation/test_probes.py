"""Probes against scikit-learn, plain float64 loops, and problems whose answer is known."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jepa_kit.evaluation.probes import PENALTIES, PROTOCOLS, Whitening, check_samples, knn_probe, linear_probe


def clusters(samples, *, classes=4, width=12, apart=1.0, seed=0):
    """Features around one centre for each class, with columns of very different scale; [N, D] float32 and [N]."""
    centres = np.random.default_rng(7).normal(size=(classes, width))
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=samples)
    features = apart * centres[labels] + random.normal(size=(samples, width))
    return (features * np.geomspace(0.01, 10, width)).astype(np.float32), labels


TRAIN, TRAIN_LABELS = clusters(400, seed=1)
TEST, TEST_LABELS = clusters(200, seed=2)
PROBLEM = (TRAIN, TRAIN_LABELS, TEST, TEST_LABELS)


def test_linear_is_scikit_learns_at_the_settings_chosen():
    found = linear_probe(*PROBLEM)
    # scikit-learn divides variances by N - 1: its whitened features are shorter, and its weights longer
    theirs = make_pipeline(
        StandardScaler(),
        PCA(found.settings["components"], whiten=True, svd_solver="full"),
        LogisticRegression(C=found.settings["C"] * 400 / 399, max_iter=1000, tol=1e-6),
    ).fit(TRAIN.astype(np.float64), TRAIN_LABELS)
    np.testing.assert_array_equal(found.predictions, theirs.predict(TEST))
    assert found.accuracy == theirs.score(TEST, TEST_LABELS)
    assert found.settings["C"] == pytest.approx(1 / (found.settings["penalty"] * 400))
    assert found.settings["converged"]


def test_whitening_is_scikit_learns():
    features = TRAIN @ np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32) + 50
    theirs = make_pipeline(StandardScaler(), PCA(5, whiten=True, svd_solver="full")).fit(features.astype(np.float64))
    ours = Whitening(features)(TEST + 50, 5)
    expected = theirs.transform((TEST + 50).astype(np.float64)) * np.sqrt(400 / 399)  # they divide by N - 1
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.cov(Whitening(features)(features, 12).T, bias=True), np.eye(12), atol=1e-4)


def test_whitening_counts_components_and_passes_over_constants():
    features = np.random.default_rng(0).normal(size=(20000, 4)).astype(np.float32)
    features = np.concatenate([features, features[:, :1] + features[:, 1:2], np.full((20000, 1), 0.1, np.float32)], 1)
    whitening = Whitening(features)
    assert whitening.above(1e-9) == 4  # one column is a sum of two, one is constant
    assert np.isfinite(whitening(features, 6)).all()
    assert np.isfinite(Whitening(np.ones((3, 2)))(np.ones((3, 2)), 1)).all()


def test_linear_does_not_hang_on_scales_and_axes():
    mixed = np.random.default_rng(0).normal(size=(12, 12)) * np.geomspace(1, 1000, 12)
    plain = linear_probe(*(x.astype(np.float64) for x in (TRAIN,)), TRAIN_LABELS, TEST, TEST_LABELS, cuts=[1e-12])
    other = linear_probe(TRAIN @ mixed + 7, TRAIN_LABELS, TEST @ mixed + 7, TEST_LABELS, cuts=[1e-12])
    assert np.mean(plain.predictions == other.predictions) >= 0.995
    assert plain.settings["penalty"] == other.settings["penalty"]


def test_linear_chooses_the_least_cross_entropy():
    found = linear_probe(*PROBLEM)
    best = min(found.settings["tried"], key=lambda trial: trial["cross_entropy"])
    assert (found.settings["components"], found.settings["penalty"]) == (best["components"], best["penalty"])
    assert found.validation == best["accuracy"]


def test_linear_stops_two_penalties_after_the_least_cross_entropy():
    found = linear_probe(*PROBLEM, cuts=[1e-9])
    entropies = [trial["cross_entropy"] for trial in found.settings["tried"]]
    assert len(entropies) in (int(np.argmin(entropies)) + 3, len(PENALTIES))
    assert [trial["penalty"] for trial in found.settings["tried"]] == list(PENALTIES[: len(entropies)])
    noise, labels = np.random.default_rng(0).normal(size=(300, 60)), np.arange(300) % 2
    assert linear_probe(noise, labels, noise, labels).settings["penalty"] == PENALTIES[0]


def test_linear_finds_what_lies_in_small_directions():
    """The classes differ only along the last axis of a strongly correlated cloud."""
    random = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    features = random.normal(size=(1000, 8)) * np.geomspace(1, 1e-3, 8)
    features[:, 7] += 2e-3 * labels
    features = (features @ np.linalg.qr(random.normal(size=(8, 8)))[0]).astype(np.float32)
    found = linear_probe(features[:800], labels[:800], features[800:], labels[800:])
    assert found.settings["components"] == 8
    assert found.accuracy > 0.8  # the best that can be is 0.841


def test_linear_passes_over_penalties_that_leave_one_answer_for_everything():
    labels = np.repeat(np.arange(8), [20, 12, 11, 10, 10, 10, 10, 10])
    known = np.eye(8)[labels]
    found = linear_probe(known, labels, known, labels)
    assert found.settings["tried"][0]["accuracy"] < 0.3
    assert found.accuracy == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_knn_is_scikit_learns_for_every_k(dtype):
    train, test = TRAIN.astype(np.float64), TEST.astype(np.float64)
    found = knn_probe(train.astype(dtype), TRAIN_LABELS, test.astype(dtype), TEST_LABELS, neighbours=[1, 5, 20, 399])
    for k, accuracy in found.settings["test_by_k"].items():
        theirs = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train, TRAIN_LABELS)
        assert accuracy == pytest.approx(theirs.score(test, TEST_LABELS), abs=0 if dtype is np.float64 else 0.005)
        if dtype is np.float64 and k == found.settings["k"]:
            assert np.array_equal(found.predictions, theirs.predict(test))
            assert found.accuracy == accuracy


def test_knn_chooses_k_by_asking_each_training_sample_without_itself():
    ks = [1, 3, 10]
    found = knn_probe(*PROBLEM, neighbours=ks)
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


def test_knn_asks_no_more_training_samples_than_it_may():
    few = knn_probe(*PROBLEM, neighbours=[5], queries=40)
    assert (few.validation * 40) == pytest.approx(round(few.validation * 40))
    assert few.accuracy == knn_probe(*PROBLEM, neighbours=[5]).accuracy


def test_knn_leaves_out_a_k_that_the_training_set_cannot_give():
    assert knn_probe(*PROBLEM, neighbours=[200, 10, 400]).settings["neighbours"] == [10, 200]


@pytest.mark.parametrize("protocol", PROTOCOLS)
class TestEveryProtocol:
    def test_solves_what_can_be_solved(self, protocol):
        train, test = clusters(300, apart=6, seed=3), clusters(100, apart=6, seed=4)
        found = PROTOCOLS[protocol](*train, *test)
        assert found.protocol == protocol
        assert found.accuracy >= 0.95

    def test_is_at_chance_on_noise(self, protocol):
        noise = np.random.default_rng(0).normal(size=(2000, 10))
        labels = np.arange(2000) % 4
        found = PROTOCOLS[protocol](noise[:1000], labels[:1000], noise[1000:], labels[1000:])
        assert found.chance == 0.25
        assert abs(found.accuracy - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1000)

    def test_the_same_again(self, protocol):
        first, second = (PROTOCOLS[protocol](*PROBLEM, seed=3) for _ in range(2))
        assert np.array_equal(first.predictions, second.predictions)
        assert first.settings == second.settings

    def test_test_labels_move_no_setting(self, protocol):
        honest = PROTOCOLS[protocol](*PROBLEM)
        other = PROTOCOLS[protocol](TRAIN, TRAIN_LABELS, TEST, np.roll(TEST_LABELS, 7))
        assert np.array_equal(honest.predictions, other.predictions)
        chosen = "penalty" if protocol == "linear" else "k"
        assert honest.settings[chosen] == other.settings[chosen]
        assert honest.accuracy > other.accuracy

    def test_classes_may_be_any_numbers(self, protocol):
        names = np.array([7, 3, 1000, 12])
        plain = PROTOCOLS[protocol](*PROBLEM)
        named = PROTOCOLS[protocol](TRAIN, names[TRAIN_LABELS], TEST, names[TEST_LABELS])
        assert named.accuracy == pytest.approx(plain.accuracy, abs=0.01)
        assert set(named.predictions) <= set(names)

    def test_says_what_it_saw(self, protocol):
        found = PROTOCOLS[protocol](*PROBLEM)
        assert (found.n_train, found.n_test, found.classes) == (400, 200, 4)
        assert found.accuracy == np.mean(found.predictions == TEST_LABELS)
        assert found.chance == np.bincount(TEST_LABELS).max() / 200
        assert found.standard_error == pytest.approx(np.sqrt(found.accuracy * (1 - found.accuracy) / 200))

    def test_arguments_are_left_as_they_were(self, protocol):
        before = [x.copy() for x in PROBLEM]
        PROTOCOLS[protocol](*PROBLEM)
        assert all(np.array_equal(a, b) for a, b in zip(before, PROBLEM, strict=True))


X, Y = TRAIN[:20], TRAIN_LABELS[:20]
BAD = X.copy()
BAD[3, 2] = np.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], Y, X, Y), "train must be float32 or float64 [samples, width], not float32 of shape (12,)"),
        ((X, Y, X[:0], Y[:0]), "test must be float32 or float64 [samples, width], not float32 of shape (0, 12)"),
        ((X.astype(int), Y, X, Y), "train must be float32 or float64 [samples, width], not int64 of shape (20, 12)"),
        ((X, Y, BAD, Y), "test must be finite, but the feature of sample 3 is not"),
        ((X, Y[:5], X, Y), "train_labels must be an integer for each of the 20 samples, not int64 of shape (5,)"),
        ((X, Y, X, Y * 1.0), "test_labels must be an integer for each of the 20 samples, not float64 of shape (20,)"),
        ((X, Y, X[:, :3], Y), "train and test must be of one width, not 12 and 3"),
        ((X, Y * 0, X, Y * 0), "train_labels must hold at least 2 classes, not 1 (class 0)"),
        ((X, Y, X, Y + 4), "test_labels must be classes of train_labels, but class"),
    ],
)
def test_samples_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError) as error:
        check_samples(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalties": []}, "penalties (=()) must be numbers above 0, descending"),
        ({"penalties": [0.1, 1.0]}, "penalties (=(0.1, 1.0)) must be numbers above 0, descending"),
        ({"penalties": [0.1, 0.0]}, "penalties (=(0.1, 0.0)) must be numbers above 0, descending"),
        ({"cuts": [1.0, 0.1]}, "cuts (=(1.0, 0.1)) must be numbers between 0 and 1, descending"),
        ({"holdout": 0.0}, "holdout (=0.0) must be above 0 and at most 0.5"),
        ({"holdout": 0.6}, "holdout (=0.6) must be above 0 and at most 0.5"),
        ({"max_iter": 0}, "max_iter (=0) must be at least 1"),
    ],
)
def test_linear_options(options, message):
    with pytest.raises(ValueError) as error:
        linear_probe(*PROBLEM, **options)
    assert str(error.value) == message


def test_linear_needs_two_samples_of_each_class():
    labels = TRAIN_LABELS.copy()
    labels[0] = 9
    with pytest.raises(ValueError) as error:
        linear_probe(TRAIN, labels, TEST, TEST_LABELS)
    assert str(error.value) == (
        "the training set (400 samples) must have a sample of each of its 5 classes to fit on and one to choose on; "
        "class 9 has 1"
    )


def test_linear_says_when_it_stopped_early():
    assert not linear_probe(*PROBLEM, max_iter=1).settings["converged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": [0, 5]}, "neighbours (=(0, 5)) must hold numbers from 1 to 399, one below N"),
        ({"neighbours": [400]}, "neighbours (=(400,)) must hold numbers from 1 to 399, one below N"),
        ({"temperature": 0.0}, "temperature (=0.0) must be above 0"),
        ({"queries": 0}, "queries (=0) must be at least 1"),
    ],
)
def test_knn_options(options, message):
    with pytest.raises(ValueError) as error:
        knn_probe(*PROBLEM, **options)
    assert str(error.value) == message
