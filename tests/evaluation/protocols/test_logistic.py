"""Logistic regression against scikit-learn, and on few labels."""

import warnings

import numpy as np
import pytest
from protocol_problems import PROBLEM, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, clusters, task
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jepa_kit.evaluation.protocols.logistic import PENALTIES, Logistic, _fit, _score
from jepa_kit.evaluation.protocols.whitening import Standardising, Whitening


def test_is_scikit_learns_at_the_settings_chosen():
    found = Logistic().classify(*PROBLEM)
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


def test_standardised_features_as_scikit_learn_has_it():
    scales = np.geomspace(0.1, 100, 12).astype(np.float32)
    found = Logistic(whiten=False).classify(TRAIN * scales + 5, TRAIN_LABELS, TEST * scales + 5, TEST_LABELS)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=found.settings["C"], max_iter=1000, tol=1e-6))
    theirs.fit((TRAIN * scales + 5).astype(np.float64), TRAIN_LABELS)
    np.testing.assert_array_equal(found.predictions, theirs.predict((TEST * scales + 5).astype(np.float64)))
    assert found.settings["components"] == 12
    assert not found.settings["whiten"]
    assert found.settings["converged"]


def test_whitening_is_scikit_learns():
    features = TRAIN @ np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32) + 50
    theirs = make_pipeline(StandardScaler(), PCA(5, whiten=True, svd_solver="full")).fit(features.astype(np.float64))
    ours = Whitening(features)(TEST + 50, 5)
    expected = theirs.transform((TEST + 50).astype(np.float64)) * np.sqrt(400 / 399)  # they divide by N - 1
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.cov(Whitening(features)(features, 12).T, bias=True), np.eye(12), atol=1e-4)


def test_few_samples_are_standardised_as_by_scikit_learn():
    """With 3 samples, N and N - 1 differ much."""
    features = np.random.default_rng(5).normal(size=(3, 4))
    expected = StandardScaler().fit_transform(features)
    np.testing.assert_allclose(Standardising(features)(features), expected, rtol=1e-6)


def test_components_are_counted_against_the_largest():
    """16 nearly equal columns: one variance near 16, and all others below a hundredth of it."""
    rng = np.random.default_rng(6)
    features = rng.normal(size=(200, 1)) + rng.normal(size=(200, 16)) * np.geomspace(0.01, 0.5, 16)
    variances = np.linalg.eigvalsh(np.corrcoef(features.T))[::-1]
    cut = float(np.sqrt(variances[4] * variances[5]) / variances[0])
    assert Whitening(features).above(cut) == 5
    assert int((variances > cut).sum()) > 5  # an absolute cut would count others


def test_whitening_counts_components_and_ignores_constants():
    features = np.random.default_rng(0).normal(size=(20000, 4)).astype(np.float32)
    features = np.concatenate([features, features[:, :1] + features[:, 1:2], np.full((20000, 1), 0.1, np.float32)], 1)
    whitening = Whitening(features)
    assert whitening.above(1e-9) == 4  # one column is a sum of two, one is constant
    assert np.isfinite(whitening(features, 6)).all()
    assert np.isfinite(Whitening(np.ones((3, 2)))(np.ones((3, 2)), 1)).all()


def test_is_invariant_to_scales_and_axes():
    mixed = np.random.default_rng(0).normal(size=(12, 12)) * np.geomspace(1, 1000, 12)
    plain = Logistic(cuts=(1e-12,)).classify(*(x.astype(np.float64) for x in (TRAIN,)), TRAIN_LABELS, TEST, TEST_LABELS)
    other = Logistic(cuts=(1e-12,)).classify(TRAIN @ mixed + 7, TRAIN_LABELS, TEST @ mixed + 7, TEST_LABELS)
    assert np.mean(plain.predictions == other.predictions) >= 0.995
    assert plain.settings["penalty"] == other.settings["penalty"]


def test_chooses_the_lowest_cross_entropy():
    found = Logistic().classify(*PROBLEM)
    best = min(found.settings["tried"], key=lambda trial: trial["cross_entropy"])
    assert (found.settings["components"], found.settings["penalty"]) == (best["components"], best["penalty"])
    assert found.validation == best["accuracy"]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_cross_entropy_is_scikit_learns_and_finite(classes):
    """Also if the probability of a label rounds to 0."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % classes
    features = rng.normal(size=(120, 4)) + 3 * np.eye(4)[labels]
    pair = (np.arange(60), np.arange(60, 120))
    ours, _ = _score(features, labels, pair, 1e-2, 100)
    fitted = _fit(features[:60], labels[:60], 1e-2, 100)
    assert ours == pytest.approx(log_loss(labels[60:], fitted.predict_proba(features[60:])), rel=1e-9)
    features[60] = -1e4 * features[60]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 100 < _score(features, labels, pair, 1e-2, 100)[0] < np.inf


def test_stops_two_penalties_after_the_lowest_cross_entropy():
    found = Logistic(cuts=(1e-9,)).classify(*PROBLEM)
    entropies = [trial["cross_entropy"] for trial in found.settings["tried"]]
    assert len(entropies) in (int(np.argmin(entropies)) + 3, len(PENALTIES))
    assert [trial["penalty"] for trial in found.settings["tried"]] == list(PENALTIES[: len(entropies)])
    noise, labels = np.random.default_rng(0).normal(size=(300, 60)), np.arange(300) % 2
    assert Logistic().classify(noise, labels, noise, labels).settings["penalty"] == PENALTIES[0]


def test_uses_directions_of_small_variance():
    """The classes differ only along the last axis of a strongly correlated cloud."""
    random = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    features = random.normal(size=(1000, 8)) * np.geomspace(1, 1e-3, 8)
    features[:, 7] += 2e-3 * labels
    features = (features @ np.linalg.qr(random.normal(size=(8, 8)))[0]).astype(np.float32)
    found = Logistic().classify(features[:800], labels[:800], features[800:], labels[800:])
    assert found.settings["components"] == 8
    assert found.accuracy > 0.8  # the optimum is 0.841


def test_ignores_penalties_that_give_a_constant_answer():
    labels = np.repeat(np.arange(8), [20, 12, 11, 10, 10, 10, 10, 10])
    known = np.eye(8)[labels]
    found = Logistic().classify(known, labels, known, labels)
    assert found.settings["tried"][0]["accuracy"] < 0.3
    assert found.accuracy == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalties": ()}, "penalties (=()) must be numbers above 0, descending"),
        ({"penalties": (0.1, 1.0)}, "penalties (=(0.1, 1.0)) must be numbers above 0, descending"),
        ({"penalties": (0.1, 0.0)}, "penalties (=(0.1, 0.0)) must be numbers above 0, descending"),
        ({"cuts": (1.0, 0.1)}, "cuts (=(1.0, 0.1)) must be numbers between 0 and 1, descending"),
        (
            {"cuts": (1e-3,), "whiten": False},
            "cuts (=(0.001,)) would do nothing: whiten is False, so there are no components",
        ),
        ({"holdout": 0.0}, "holdout (=0.0) must be above 0 and at most 0.5"),
        ({"holdout": 0.6}, "holdout (=0.6) must be above 0 and at most 0.5"),
        ({"max_iter": 0}, "max_iter (=0) must be at least 1"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError) as error:
        Logistic(**options).classify(*PROBLEM)
    assert str(error.value) == message


def test_a_class_of_one_sample_leaves_nothing_to_choose():
    """The middle setting is used, as if it were the only one."""
    few = np.concatenate([np.flatnonzero(k == TRAIN_LABELS)[: 1 + k] for k in range(4)])
    found = Logistic().classify(TRAIN[few], TRAIN_LABELS[few], TEST, TEST_LABELS)
    only = Logistic(penalties=(1e-2,), cuts=(1e-6,)).classify(TRAIN[few], TRAIN_LABELS[few], TEST, TEST_LABELS)
    assert (found.accuracy, found.settings) == (only.accuracy, only.settings)
    assert (found.settings["penalty"], found.settings["holdout"], found.validation) == (1e-2, None, None)


def test_as_many_samples_are_held_out_as_there_are_classes():
    """47 samples of 12 classes: 12 / 47 of 47 is 11.999 in floating point."""
    labels = np.arange(47) % 12
    x = np.random.default_rng(0).normal(size=(47, 5)).astype(np.float32)
    assert Logistic(penalties=(1.0, 0.1)).classify(x, labels, x, labels).settings["tried"]


def test_reports_missing_convergence():
    assert not Logistic(max_iter=1).classify(*PROBLEM).settings["converged"]


def test_one_setting_needs_no_held_out_samples():
    few = np.concatenate([np.flatnonzero(k == TRAIN_LABELS)[:1] for k in range(4)])
    found = Logistic(penalties=(0.1,), cuts=(1e-6,)).classify(TRAIN[few], TRAIN_LABELS[few], TEST, TEST_LABELS)
    assert found.validation is None
    assert found.settings["tried"] == []
    assert found.n_train == 4


def test_few_samples_are_split_several_times():
    few = np.concatenate([np.flatnonzero(k == TRAIN_LABELS)[:2] for k in range(4)])
    found = Logistic().classify(TRAIN[few], TRAIN_LABELS[few], TEST, TEST_LABELS)
    # five times four samples: accuracies are twentieths
    assert {round(trial["accuracy"] * 20, 6) % 1 for trial in found.settings["tried"]} == {0.0}


class TestSubsets:
    def test_a_figure_for_each_with_mean_and_deviation_over_draws(self):
        found = Logistic(subsets=("10%", "5/class", "all"), draws=4)(task(*PROBLEM))
        assert [(one.variant, one.draws) for one in found] == [("10%", 4), ("5/class", 4), ("", 1)]
        for one in found[:2]:
            assert one.accuracy == np.mean(one.settings["accuracies"])
            assert one.standard_error == np.std(one.settings["accuracies"], ddof=1)
            assert len(set(one.settings["accuracies"])) > 1
        assert [one.n_train for one in found[1:]] == [20, 400]
        assert found[2].accuracy == Logistic().classify(*PROBLEM).accuracy

    def test_a_list_of_names(self, tmp_path):
        names = tmp_path / "1percent.txt"
        names.write_text("a/3.JPEG\n\na/7.JPEG\n" + "\n".join(f"{i}.png" for i in range(100, 180)))
        one = task(*PROBLEM)
        keyed = type("Keyed", (), {"key": staticmethod(lambda i: f"train/a/{i}" if i > 9 else f"a/{i}")})
        object.__setattr__(one.train, "dataset", keyed)
        (found,) = Logistic(names=str(names))(one)
        assert (found.n_train, found.variant, found.draws) == (82, "1percent.txt", 1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"subsets": ()}, "subsets (=()) must name at least one, and each once"),
            ({"subsets": ("1%", "1%")}, "subsets (=('1%', '1%')) must name at least one, and each once"),
            (
                {"penalties": (1.0,), "cuts": (1e-6,), "holdout": 0.1},
                "holdout (=0.1) would do nothing: penalties (=(1.0,)) and cuts (=(1e-06,)) leave nothing to choose",
            ),
            ({"draws": 0}, "draws (=0) must be at least 1"),
            ({"names": "a.txt", "draws": 3}, "draws (=3) would do nothing: names (='a.txt') lists the samples"),
            (
                {"names": "a.txt", "subsets": ("1%",)},
                "subsets (=('1%',)) would do nothing: names (='a.txt') lists the samples",
            ),
            (
                {"names": "nowhere.txt"},
                "names (='nowhere.txt') must be a file with a name of a sample on each line; there is none",
            ),
            ({"subsets": ("all",), "draws": 5}, "draws (=5) would do nothing: subsets (=('all',)) has nothing to draw"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError) as error:
            Logistic(**options)
        assert str(error.value) == message


def test_an_easy_problem_needs_few_labels():
    (found,) = Logistic(subsets=("5/class",))(task(*clusters(300, apart=6, seed=3), *clusters(100, apart=6, seed=4)))
    assert found.accuracy > 0.95
