"""The attentive probe against torch's own cross-attention."""

import numpy as np
import pytest
import torch
from protocol_problems import PROBLEM, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, clusters, task

from jepa_kit.evaluation.protocols import attentive
from jepa_kit.evaluation.protocols.attentive import Attentive, AttentivePool, Standardise, default_heads
from jepa_kit.evaluation.protocols.base import Features, LayerSet, Part, Task


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_is_torchs_own(num_heads):
    torch.manual_seed(0)
    pool = AttentivePool(width=12, classes=3, num_heads=num_heads).double()
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    theirs = torch.nn.MultiheadAttention(12, num_heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(12), pool.key.weight, pool.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([torch.zeros(12), torch.randn(12), pool.value.bias]))
        theirs.out_proj.weight.copy_(pool.proj.weight)
        theirs.out_proj.bias.copy_(pool.proj.bias)
    tokens = torch.randn(5, 7, 12, dtype=torch.float64)
    expected = theirs(pool.query.expand(5, 1, 12), tokens, tokens, need_weights=False)[0][:, 0]
    torch.testing.assert_close(pool.attend(tokens), expected)


def test_every_parameter_learns():
    pool = AttentivePool(width=12, classes=3, num_heads=2)
    pool(torch.randn(5, 7, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pool.parameters())


def test_tokens_are_standardised_over_the_training_set():
    x = np.random.default_rng(0).normal(3, [1.0, 20.0], size=(50, 6, 2)).astype(np.float32)
    x[..., 1] = 7
    out = Standardise(Features(x), np.arange(50))(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(out[..., 0].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(out[..., 0].std(), 1, rtol=1e-2)
    np.testing.assert_allclose(out[..., 1], 0, atol=1e-3)


def test_statistics_are_of_a_subset_of_many_images(monkeypatch):
    monkeypatch.setattr(attentive, "FOR_STATISTICS", 10)
    x = np.random.default_rng(0).normal(size=(50, 6, 2))
    index = np.arange(5, 40)  # 35 of them: every third
    found = Standardise(Features(x), index)
    some = x[5:40:3].reshape(-1, 2)
    np.testing.assert_allclose(found.mean, some.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.scale, 1 / some.std(0, ddof=1), rtol=1e-5)


def test_it_finds_the_informative_patch():
    """The class is visible in one of nine patches, at random: the mean over patches has little information."""
    random = np.random.default_rng(0)
    parts = []
    for samples in (600, 200):
        labels = random.integers(3, size=samples)
        x = random.normal(size=(samples, 9, 8))
        at = random.integers(9, size=samples)
        x[np.arange(samples), at] = 0
        x[np.arange(samples), at, labels] = 4
        x[np.arange(samples), at, 7] = 6
        features = {LayerSet("last", "none"): Features(x.astype(np.float16))}
        parts.append(Part(features, labels, None))
    (found,) = Attentive(epochs=30, batch_size=50, lrs=(1e-2,))(Task(train=parts[0], test=parts[1]))
    assert found.accuracy > 0.9


def test_the_better_learning_rate_is_chosen():
    one = task(*clusters(400, apart=3, seed=3), *clusters(100, apart=3, seed=4))
    (found,) = Attentive(epochs=5, batch_size=64, lrs=(1e-6, 1e-2))(one)
    assert found.settings["lr"] == 1e-2
    assert [t["lr"] for t in found.settings["tried"]] == [1e-6, 1e-2]
    assert found.validation == found.settings["tried"][1]["validation"]
    (single,) = Attentive(epochs=1, lrs=(1e-3,))(task(*PROBLEM))
    assert single.validation is None
    assert single.settings["tried"] == []
    assert (found.settings["holdout"], single.settings["holdout"]) == (0.2, None)


def test_with_one_learning_rate_nothing_is_held_out():
    """A class of one sample can then be learned."""
    x, labels = clusters(120, apart=6, seed=3)
    rare = np.where(np.arange(120) == 7, 9, labels)
    (found,) = Attentive(epochs=2)(task(x, rare, x, rare))
    assert found.classes == 5
    with pytest.raises(ValueError, match="class 9 has 1"):
        Attentive(epochs=2, lrs=(1e-3, 1e-2))(task(x, rare, x, rare))


def test_a_diverging_learning_rate_is_not_chosen():
    (found,) = Attentive(epochs=3, lrs=(1e30, 1e-3))(task(*PROBLEM))
    assert found.settings["lr"] == 1e-3
    assert found.settings["tried"][0]["validation"] == 0.0
    with pytest.raises(ValueError) as error:
        Attentive(epochs=3, lrs=(1e30,))(task(*PROBLEM))
    assert str(error.value) == "lrs (=(1e+30,)): training with 1e+30 diverged; take lower ones"


def test_torchs_random_state_stays_as_it_is():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Attentive(epochs=1)(task(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS))
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_by_width():
    assert [default_heads(width) for width in (12, 128, 192, 768, 200)] == [1, 2, 3, 12, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": ()}, "lrs (=()) must be at least one, above 0"),
        ({"lrs": (0.0,)}, "lrs (=(0.0,)) must be at least one, above 0"),
        ({"weight_decay": -1.0}, "weight_decay (=-1.0) must be at least 0"),
        ({"lrs": (0.1, 0.1)}, "lrs (=(0.1, 0.1)) must contain each value once"),
        ({"holdout": 0.9, "lrs": (0.1, 0.2)}, "holdout (=0.9) must be above 0 and at most 0.5"),
        ({"holdout": 0.1}, "holdout (=0.1) would do nothing: lrs (=(0.001,)) leaves nothing to choose"),
        ({"num_heads": 5}, "num_heads (=5) must divide the width (=12)"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError) as error:
        Attentive(**options)(task(*PROBLEM))
    assert str(error.value) == message
