"""Evaluation during a run: probes against scikit-learn, a run with and without it, detection of a collapse."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from jepa_kit.config import config_from_dict
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.evaluation.online import (
    PENALTIES,
    STATES,
    knn_accuracy,
    linear_accuracy,
    online_evaluation,
)
from jepa_kit.training import train


def blobs(count=90, width=7, classes=3, spread=1.5):
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, count) * 2 + 1
    return random.normal(size=(count, width)) + spread * np.eye(width)[labels], labels


def test_knn_against_scikit_learn():
    features, labels = blobs()
    right = 0
    for i in range(len(features)):
        others = np.arange(len(features)) != i
        theirs = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(features[others], labels[others])
        right += int(theirs.predict(features[i : i + 1])[0] == labels[i])
    assert 0.5 < knn_accuracy(features, labels) < 1
    assert knn_accuracy(features, labels) == pytest.approx(right / len(features))
    assert knn_accuracy(np.repeat(features, 20, axis=0), np.repeat(labels, 20)) == 1.0


def test_linear_against_leave_one_out_ridge():
    features, labels = blobs(count=40)
    x = (features - features.mean(0)) / features.std(0)
    classes = np.unique(labels)
    wanted = np.eye(6)[labels][:, classes]
    found = {}
    for penalty in PENALTIES:
        answers = np.empty_like(wanted)
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            answers[i] = Ridge(alpha=penalty * len(x)).fit(x[others], wanted[others]).predict(x[i : i + 1])[0]
        found[np.square(answers - wanted).mean()] = np.mean(classes[answers.argmax(1)] == labels)
    assert linear_accuracy(features, labels) == pytest.approx(found[min(found)])


def test_probes_take_constant_features():
    features, labels = np.ones((40, 5)), np.arange(40) % 2
    for probe in (knn_accuracy, linear_accuracy):
        assert 0 <= probe(features, labels) <= 0.6


@pytest.fixture
def config_of(scenes, tiny_config, tmp_path):
    """Return a function that makes the config of a run of 12 steps of 8 scenes in a named folder."""

    def make(name, *overrides):
        own = [f"data.shards={scenes[0].path}", "train.batch_size=8", "train.log_every=1", "encoder.drop_path=0.3"]
        return config_from_dict(tiny_config.to_dict(), [*own, f"train.output_dir={tmp_path / name}", *overrides])

    return make


PROBED = (
    "evaluate.every=5",
    "evaluate.samples=16",
    "evaluate.probe=knn",
    "evaluate.probe_samples=40",
    "evaluate.label=count",
)


def without_clock(line):
    """Return a line of metrics.jsonl without evaluation, times and measurements of the machine."""
    kept = ("step", "epoch", "samples", "loss", "lr", "weight_decay", "momentum", "grad_norm", "context_", "target_")
    return {key: value for key, value in line.items() if key.startswith(kept)}


def test_a_run_is_bitwise_equal_without_it(scenes, config_of, capsys):
    plain = config_of("plain")
    watched = config_of("watched", *PROBED, f"evaluate.shards={scenes[1].path}")
    first, second = train(plain), train(watched)
    lines = [read_metrics(folder) for folder in (first, second)]
    assert [without_clock(line) for line in lines[0]] == [without_clock(line) for line in lines[1]]
    states = [load_checkpoint(folder).model for folder in (first, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    evaluated = [line for line in lines[1] if "eval/verdict" in line]
    assert [line["step"] for line in evaluated] == [4, 9, 11]  # every 5 updates, and after the last of 12
    for name in ("std", "rankme", "cross_sample_gap", "varying", "token_rank", "lidar", "knn", "seconds"):
        assert all(np.isfinite(line[f"eval/{name}"]) for line in evaluated), name
    assert not any("eval/verdict" in line for line in lines[0])
    printed = capsys.readouterr().out
    assert "evaluation after 5 updates: not learned  knn " in printed
    assert "not learned: targets are sound, but" in printed


def test_no_gradient_reaches_the_encoder(config_of):
    config = config_of("run", *PROBED)
    run = build_run(config, World(), torch.device("cpu"))
    hook = online_evaluation(run)
    assert len(hook.images) == 40
    run.jepa.train()
    modes = [module.training for module in run.jepa.modules()]
    random = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in run.jepa.state_dict().items()}
    record = hook(run, 4)
    assert all(parameter.grad is None for parameter in run.jepa.parameters())
    assert all(torch.equal(value, before[name]) for name, value in run.jepa.state_dict().items())
    assert [module.training for module in run.jepa.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert STATES[int(record["eval/verdict"])] == hook.last.state
    again = hook(run, 9)
    assert {k: v for k, v in again.items() if k != "eval/seconds"} == {
        k: v for k, v in record.items() if k != "eval/seconds"
    }


def test_a_probe_uses_the_images_of_health_and_more(config_of):
    config = config_of("run", *PROBED)
    run = build_run(config, World(), torch.device("cpu"))
    hook = online_evaluation(run)
    features = np.concatenate(hook.features(run.jepa, hook.images, run.device))
    assert hook(run, 0)["eval/knn"] == knn_accuracy(features, hook.labels)


def test_a_run_without_it_has_no_hook(config_of):
    config = config_of("run")
    assert online_evaluation(build_run(config, World(), torch.device("cpu"))) is None


def test_rejects_an_unknown_label(config_of):
    config = config_of("run", *PROBED[:-1], "evaluate.label=colour")
    with pytest.raises(ValueError, match=r"label \(='colour'\) is not among the labels of "):
        train(config)


def test_images_are_read_as_the_config_says(config_of):
    config = config_of("run", *PROBED, "data.max_pixels=300")
    run = build_run(config, World(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cannot be used: 16 x 20 pixels are more than max_pixels \(=300\) allows"):
        online_evaluation(run)


def test_a_collapse_is_reported_when_it_happens(config_of, capsys):
    """No stop-gradient, and targets of the encoder itself; the deviation of features dates the collapse."""
    config = config_of(
        "run",
        "evaluate.every=5",
        "evaluate.samples=32",
        "encoder.drop_path=0.0",
        "target_update={name: tied, stop_gradient: false}",
        "train.steps_per_epoch=40",
        "train.log_every=20",
        "optim.lr=5e-3",
        "optim.start_lr=5e-3",
    )
    lines = [line for line in read_metrics(train(config)) if "eval/verdict" in line]
    states = [STATES[int(line["eval/verdict"])] for line in lines]
    spread = [line["eval/unit_std"] for line in lines]
    when = states.index("constant")
    assert states[0] != "constant"
    assert spread[when] < 0.4 * spread[0]
    assert all(state != "constant" for state, s in zip(states, spread, strict=True) if s > 0.5 * spread[0])
    assert states[-1] == "constant"
    assert f"after {5 * (when + 1)} updates: constant" in capsys.readouterr().out
