"""Properties of every registered protocol of labels, and errors in samples and specs."""

import re

import numpy as np
import pytest
from protocol_problems import PROBLEM, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, clusters, task

from jepa_kit.errors import ConfigError
from jepa_kit.evaluation.protocols import build_protocols, parse_specs
from jepa_kit.evaluation.protocols.base import PROTOCOLS, Features, check_samples
from jepa_kit.evaluation.protocols.cards import card_of
from jepa_kit.evaluation.protocols.heads import Recipe

SPECS = {
    "knn": {},
    "logistic": {"subsets": ["all"]},
    "linear": {"batch_size": 64, "epochs": 10},
    "paper_linear": {"epochs": 60, "batch_size": 64, "lrs": [4.0, 16.0]},
    "paper_transfer": {"dataset": "cifar10"},
    "count": {},
    "distance": {},
    "attentive": {"epochs": 20, "batch_size": 64, "lrs": [1e-3, 1e-2]},
}
OTHERS = {"dense", "finetune"}
"""They take masks and images, and have tests of their own."""


def ask(name, *problem, **options):
    """Return the protocol's figure."""
    ((_, _, probe),) = build_protocols([{"name": name} | SPECS[name]])
    (found,) = probe(task(*problem, **options))
    return found


def test_every_protocol_is_tested():
    assert set(PROTOCOLS.names()) == set(SPECS) | OTHERS


@pytest.mark.parametrize("name", PROTOCOLS.names())
def test_every_card_has_a_source(name):
    card = PROTOCOLS.get(name).__doc__
    assert "Source: " in card or "source" in card
    assert "arXiv" in card or name == "distance"
    assert "Args:" in card


@pytest.mark.parametrize("name", PROTOCOLS.names())
def test_every_card_has_an_example_and_options(name):
    """The example can be built, and each option has a text."""
    card = card_of(PROTOCOLS.get(name))
    (spec,) = parse_specs([card.example])
    assert spec["name"] == name
    build_protocols([spec])
    assert set(card.options) == set(PROTOCOLS.options(name))
    assert all(card.options.values())


HEADS = {"layers": ("last", "last4"), "heads": ("plain", "norm"), "holdout": None}
DEFAULTS = {
    # Wu et al. 2018: 200, 0.07
    "knn": {"neighbours": (10, 20, 100, 200), "temperature": 0.07, "queries": 10_000, "pooling": "mean"},
    "logistic": {
        **{"subsets": None, "names": None, "draws": None, "whiten": True, "cuts": None, "holdout": None},
        "penalties": (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5),
        "max_iter": 1000,
        "pooling": "mean",
    },
    "linear": {
        **HEADS,
        **{"lrs": (0.003, 0.01, 0.03, 0.1, 0.3), "weight_decays": (0.0, 0.01)},
        **{"optimizer": "adamw", "epochs": 20, "batch_size": 256, "pooling": "mean"},
    },
    "paper_linear": {  # I-JEPA, A.2
        **HEADS,
        **{"lrs": (0.01, 0.05, 0.001), "weight_decays": (0.0005, 0.0), "epochs": 50, "batch_size": 16384},
    },
    "count": HEADS,
    "distance": HEADS,
    "attentive": {
        **{"layers": "last", "num_heads": None, "lrs": (1e-3,), "weight_decay": 0.01},
        **{"epochs": 10, "batch_size": 128, "holdout": None},
    },
    "dense": {
        **{"layers": "last", "most": None, "heads": ("norm",), "lrs": (1e-3, 1e-2), "weight_decays": (0.0,)},
        **{"epochs": 5, "batch_size": 4096, "holdout": None},
    },
    "finetune": {  # MAE, A.1, for small sets
        **{"epochs": 50, "batch_size": 128, "lr": 1e-3, "min_lr": 0.0, "weight_decay": 0.05, "layer_decay": 0.75},
        **{"warmup_epochs": 0.5, "label_smoothing": 0.1, "mixup": 0.2, "drop_path": 0.1},
        **{"crop_scale": (0.7, 1.0), "flip": 0.5, "subset": "all", "pooling": "mean"},
    },
}


@pytest.mark.parametrize("name", PROTOCOLS.names())
def test_defaults_are_part_of_a_protocol(name):
    """Figures with other defaults are not comparable."""
    if name == "paper_transfer":
        ((_, options, probe),) = build_protocols([{"name": name, "dataset": "inat18"}])
        assert options == {"dataset": "inat18", **HEADS}
        assert {(s.lr, s.weight_decay) for s in probe.settings} == {(0.01, 5e-4)}  # I-JEPA, A.2
        assert probe.recipe == Recipe(optimizer="sgd", epochs=84, batch_size=256, steps=(24, 48, 72), nesterov=True)
        return
    ((_, options, _),) = build_protocols([name])
    assert options == DEFAULTS[name]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "finetune", "flip": 0.0, "layer_decay": 1.0, "label_smoothing": 0.0, "drop_path": 0.0, "mixup": 0.0},
        {"name": "finetune", "flip": 1.0, "batch_size": 2, "weight_decay": 0.0, "warmup_epochs": 0.0, "epochs": 1},
        {"name": "linear", "holdout": 0.5, "epochs": 1},
        {"name": "attentive", "weight_decay": 0.0, "lrs": [1e-3, 1e-2], "holdout": 0.5},
        {"name": "dense", "most": 1},
        {"name": "dense", "most": 254},
    ],
)
def test_the_ends_of_ranges_can_be_chosen(spec):
    ((_, options, _),) = build_protocols([spec])
    assert (
        options.items() >= {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "name"}.items()
    )


def test_a_card_as_it_is_read():
    class Card:
        """What it is.

        Example: ``{name: card, a: 1}``

        Args:
            a, b: numbers, of which ``a``
                is None at times.
            c: another: with a colon.

        Raises:
            ValueError: none of these.
        """

    numbers = "numbers, of which a is null at times."
    options = {"a": numbers, "b": numbers, "c": "another: with a colon."}
    assert card_of(Card) == ("What it is", "{name: card, a: 1}", options)
    assert card_of(type("Bare", (), {"__doc__": "Nothing."})) == ("Nothing", None, {})


@pytest.mark.parametrize("name", SPECS)
class TestEveryProtocol:
    def test_solves_an_easy_problem(self, name):
        found = ask(name, *clusters(400, apart=6, seed=3), *clusters(100, apart=6, seed=4))
        assert found.protocol == name
        assert found.accuracy >= 0.9

    def test_is_at_chance_on_noise(self, name):
        noise = np.random.default_rng(0).normal(size=(1200, 12)).astype(np.float32)
        labels = np.arange(1200) % 4
        found = ask(name, noise[:600], labels[:600], noise[600:], labels[600:])
        assert found.chance == 0.25
        assert abs(found.accuracy - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 600)

    def test_test_labels_change_no_setting_and_results_repeat(self, name):
        honest = ask(name, *PROBLEM, seed=3)
        other = ask(name, TRAIN, TRAIN_LABELS, TEST, np.roll(TEST_LABELS, 7), seed=3)
        assert np.array_equal(honest.predictions, other.predictions)
        assert honest.validation == other.validation
        moved = {"test_by_k"}
        assert {k: v for k, v in honest.settings.items() if k not in moved} == {
            k: v for k, v in other.settings.items() if k not in moved
        }
        assert honest.accuracy > other.accuracy

    def test_reports_sizes_and_classes(self, name):
        names = np.array([7, 3, 1000, 12])
        before = [x.copy() for x in PROBLEM]
        found = ask(name, TRAIN, names[TRAIN_LABELS], TEST, names[TEST_LABELS])
        assert (found.n_train, found.n_test, found.classes) == (400, 200, 4)
        assert set(found.predictions) <= set(names)
        assert found.accuracy == np.mean(found.predictions == names[TEST_LABELS])
        assert found.chance == np.bincount(TEST_LABELS).max() / 200
        assert found.standard_error == pytest.approx(np.sqrt(found.accuracy * (1 - found.accuracy) / 200))
        assert all(np.array_equal(a, b) for a, b in zip(before, PROBLEM, strict=True))


X, Y = TRAIN[:20], TRAIN_LABELS[:20]
BAD = X.copy()
BAD[3, 2] = np.nan


def test_layers_are_joined_along_the_width():
    """For features of images and of tokens, in memory and row by row."""
    for shape in ((5, 3), (5, 3, 3)):
        first, second = (np.random.default_rng(k).normal(size=shape).astype(np.float16) for k in range(2))
        expected = np.concatenate([first, second], axis=-1).astype(np.float32)
        joined = Features(first, second)
        assert (len(joined), joined.width) == (5, 6)
        np.testing.assert_array_equal(joined.array, expected)
        np.testing.assert_array_equal(joined.rows(np.array([4, 0])), expected[[4, 0]])


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
        ((X, Y * 0, X, Y * 0), "train_labels must contain at least 2 classes, not 1 (class 0)"),
        ((X, Y, X, Y + 4), "test_labels must be classes of train_labels, but class"),
    ],
)
def test_samples_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError) as error:
        check_samples(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "protocols (=[]) must name at least one of attentive, count, dense"),
        (["liner"], "protocol.name: 'liner' is not a registered protocol; did you mean 'linear'?"),
        ([{"name": "knn", "k": 3}], "protocol.k is not an option of 'knn'"),
        ([{"name": "knn", "temperature": "hot"}], "protocol.temperature (='hot') must be"),
        ([{"name": "knn", "temperature": -1.0}], "protocol 'knn': temperature (=-1.0) must be above 0"),
        (["knn", "knn"], "protocols (=knn) must be different ones"),
        (["paper_transfer"], "protocol.dataset is missing: 'paper_transfer' needs it"),
        ([{"name": "paper_transfer", "dataset": "mnist"}], "dataset (='mnist') must be one of cifar10, cifar100,"),
    ],
)
def test_invalid_specs(specs, message):
    with pytest.raises(ValueError) as error:
        build_protocols(specs)
    assert message in str(error.value)


def test_specs_as_a_user_writes_them():
    texts = ["linear, knn", "{name: logistic, subsets: [1%, 10/class]}"]
    assert parse_specs(texts) == ["linear", "knn", {"name": "logistic", "subsets": ["1%", "10/class"]}]
    assert parse_specs([f"{texts[0]}, {texts[1]},{{name: knn, pooling: class}}, dense"]) == [
        *parse_specs(texts),
        {"name": "knn", "pooling": "class"},
        "dense",
    ]
    nested = {"name": "x", "options": {"a": 1, "b": 2}}
    assert parse_specs(["dense,{name: x, options: {a: 1, b: 2}}"]) == ["dense", nested]
    for text in ("{name: knn", "{name: knn}}"):
        with pytest.raises(ConfigError, match=re.escape(f"--protocol [{text}]: 1 mistake")):
            parse_specs([text])
    (first, second) = build_protocols(["knn", {"name": "knn", "neighbours": [5]}])
    assert first[1]["neighbours"] == (10, 20, 100, 200)
    assert second[1]["neighbours"] == (5,)
