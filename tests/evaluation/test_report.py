"""Evaluations of several networks: what is shared, what a table and a file say, and what is refused."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import scene_shards

from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards import ShardDataset
from jepa_kit.evaluation.features import extract_features, load_run, pixel_features, untrained_encoder
from jepa_kit.evaluation.probes import knn_probe, linear_probe
from jepa_kit.evaluation.report import (
    Network,
    Row,
    evaluate,
    format_table,
    results,
    run_networks,
    write_results,
)

PIXELS = Network("pixels", pixel_features)


@pytest.fixture
def loaded(tiny_run):
    return load_run(tiny_run[0])


def test_rows_are_what_the_probes_give_on_the_features(loaded, scenes):
    train, test = scenes
    labels = ["distance", "count"]
    networks = run_networks(loaded, encoders=["target", "context"])
    rows = evaluate(networks, train, test, image_size=(16, 16), labels=labels)
    assert [(r.protocol, r.network, r.label) for r in rows] == [
        (protocol, network, label)
        for protocol in ("linear", "knn")
        for network in ("target", "context", "untrained", "pixels")
        for label in labels
    ]
    images = [torch.cat([b.images for b in eval_batches(part, image_size=(16, 16))]) for part in scenes]
    data = loaded.config.data
    for name, encoder in (("target", loaded.jepa.target_encoder), ("untrained", untrained_encoder(loaded.config, 11))):
        x, y = (extract_features(encoder, part, mean=data.mean, std=data.std) for part in images)
        for protocol, probe in (("linear", linear_probe), ("knn", knn_probe)):
            row = next(r for r in rows if (r.protocol, r.network, r.label) == (protocol, name, "distance"))
            found = probe(x, train.labels("distance"), y, test.labels("distance"))
            assert row.accuracy == found.accuracy
            assert row.settings == found.settings
            assert (row.width, row.layers, row.pooling) == (16, "last", "mean")
    assert next(r for r in rows if r.network == "untrained").seed == 11
    assert next(r for r in rows if r.network == "pixels").layers is None


def test_images_are_read_once_for_everything(scenes, monkeypatch):
    read = []
    decode = ShardDataset.image
    monkeypatch.setattr(ShardDataset, "image", lambda self, i: (read.append((self.path, i)), decode(self, i))[1])
    evaluate([PIXELS, Network("again", pixel_features)], *scenes, image_size=(16, 16), labels=["count", "shape"])
    assert sorted(read) == sorted((part.path, i) for part in scenes for i in range(len(part)))


def test_last4_is_four_times_as_wide(loaded, scenes):
    networks = run_networks(loaded, layers="last4", baselines=["untrained"], untrained_seed=5)
    rows = evaluate(networks, *scenes, image_size=(16, 16), protocols=["knn"], labels=["shape"])
    assert [(r.network, r.width, r.layers, r.seed) for r in rows] == [
        ("target", 64, "last4", None),
        ("untrained", 64, "last4", 5),
    ]


def test_the_same_for_any_workers_and_batches(loaded, scenes):
    networks = run_networks(loaded)
    first, second = (
        evaluate(networks, *scenes, image_size=(16, 16), protocols=["knn"], batch_size=size, num_workers=workers)
        for size, workers in ((256, 0), (7, 1))
    )
    assert [r.accuracy for r in first] == pytest.approx([r.accuracy for r in second], abs=0.05)
    assert [r.settings["k"] for r in first if r.network == "pixels"] == [
        r.settings["k"] for r in second if r.network == "pixels"
    ]


def test_a_recipe_without_a_target_encoder_is_evaluated_by_its_context_encoder(tiny_config, scenes):
    from jepa_kit.config import config_from_dict
    from jepa_kit.evaluation.features import LoadedRun
    from jepa_kit.recipe import build_recipe

    raw = tiny_config.to_dict()
    raw |= {"target": {"name": "pixel"}, "target_update": {"name": "none"}}
    config = config_from_dict(raw)
    networks = run_networks(LoadedRun(config, build_recipe(config), 0), encoders=["target", "context"], baselines=[])
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(networks[0].source(x), networks[1].source(x))


def row(network, label, accuracy, **other):
    values = {
        "network": network,
        "layers": None if network == "pixels" else "last",
        "pooling": None,
        "seed": None,
        "width": 16,
        "protocol": "linear",
        "label": label,
        "accuracy": accuracy,
        "standard_error": 0.01,
        "chance": 0.125,
        "validation": 0.5,
        "classes": 8,
        "n_train": 10,
        "n_test": 10,
        "settings": {},
    }
    return Row(**(values | other))


def test_the_table():
    rows = [
        row("target", "count", 0.4321, layers="last4", width=64),
        row("target", "shape", 1.0, layers="last4", width=64, chance=0.2),
        row("pixels", "count", 0.1),
        row("pixels", "shape", 0.25, chance=0.2),
        row("target", "count", 0.4, protocol="knn"),
        row("target", "shape", 0.3, protocol="knn"),
    ]
    assert format_table(rows).splitlines() == [
        "| protocol | features              | width | count      | shape       |",
        "| -------- | --------------------- | ----- | ---------- | ----------- |",
        "| linear   | target encoder, last4 | 64    | 43.2 ± 1.0 | 100.0 ± 1.0 |",
        "| linear   | pixels                | 16    | 10.0 ± 1.0 | 25.0 ± 1.0  |",
        "| knn      | target encoder        | 16    | 40.0 ± 1.0 | 30.0 ± 1.0  |",
        "|          | chance                |       | 12.5       | 20.0        |",
    ]


def test_results_name_everything_that_a_number_depends_on(loaded, tiny_run, scenes, tmp_path):
    train, test = scenes
    rows = evaluate([PIXELS], train, test, image_size=(16, 16), seed=4)
    content = results(rows, run=loaded, checkpoint=tiny_run[0], train=train, test=test, seed=4)
    file = write_results(content, tmp_path / "new" / "results.json")
    read = json.loads(file.read_text())
    latest = tiny_run[0] / "checkpoint_00000005.pt"
    assert read["format"] == "jepa_kit evaluation/1"
    assert read["checkpoint"] == {
        "file": str(latest),
        "sha256": hashlib.sha256(latest.read_bytes()).hexdigest(),
        "step": 5,
    }
    assert read["data"]["image_size"] == [16, 16]
    assert read["data"]["train"]["samples"] == 96
    assert read["data"]["train"]["index_sha256"] != read["data"]["test"]["index_sha256"]
    assert read["seeds"] == {"run": 11, "probes": 4}
    assert {"jepa_kit", "torch", "scikit-learn"} <= set(read["versions"])
    assert len(read["rows"]) == 6
    assert read["rows"][0]["settings"]["C"] == rows[0].settings["C"]
    assert [p.name for p in file.parent.iterdir()] == ["results.json"]


def test_progress_is_plain_lines_without_a_terminal(scenes, capsys):
    evaluate([PIXELS], *scenes, image_size=(16, 16), protocols=["knn"], labels=["count"], progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"features of 96 images in {scenes[0].path}: ")
    assert lines[-1].startswith("knn, count, pixels: ")
    assert len(lines) == 3
    evaluate([PIXELS], *scenes, image_size=(16, 16), protocols=["knn"], labels=["count"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ["liner"]}, "protocols (='liner') must be of linear, knn; did you mean 'linear'?"),
        ({"protocols": ["knn", "knn"]}, "protocols (=knn, knn) must be different ones"),
        ({"labels": ["cuont"]}, "label (='cuont') is not among the labels of"),
        ({"labels": []}, "labels (=[]) must name at least one; the shards in"),
        ({"networks": []}, "networks (=[]) must be at least one, with names of their own"),
        ({"networks": [PIXELS, PIXELS]}, "networks (=['pixels', 'pixels']) must be at least one, with names of their"),
        ({"seed": -1}, "seed (=-1) must be at least 0"),
        ({"batch_size": 0}, "batch_size (=0) must be at least 1"),
    ],
)
def test_what_evaluate_refuses(scenes, options, message):
    options = {"networks": [PIXELS], "image_size": (16, 16)} | options
    with pytest.raises(ValueError) as error:
        evaluate(options.pop("networks"), *scenes, **options)
    assert str(error.value).startswith(message)


def test_shards_whose_classes_differ(scenes, tmp_path):
    other = scene_shards(tmp_path / "other", 4, seed=0)
    other.classes["shape"] = ("sphere", "cube")
    with pytest.raises(ValueError) as error:
        evaluate([PIXELS], scenes[0], other, image_size=(16, 16))
    assert str(error.value) == (
        f"label (='shape') must have the same classes in both: {scenes[0].path} has 8 (sphere, cube, cylinder, cone, "
        f"ring, ...), {other.path} has 2 (sphere, cube)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": ["taget"]}, "encoders (='taget') must be of target, context; did you mean 'target'?"),
        ({"encoders": ["target", "target"]}, "encoders (=target, target) must be different ones"),
        ({"baselines": ["random"]}, "baselines (='random') must be of untrained, pixels."),
        ({"layers": "last5"}, "layers (='last5') asks for 5 layers, but the encoder has 4"),
    ],
)
def test_what_run_networks_refuses(loaded, options, message):
    with pytest.raises(ValueError) as error:
        run_networks(loaded, **options)
    assert str(error.value) == message


def test_labels_follow_their_images(scenes, tmp_path):
    """A network that knows the answer by the image alone gets everything right: order is kept from shard to probe."""
    train, _ = scenes
    images = torch.cat([b.images for b in eval_batches(train, image_size=(16, 16))])
    code = {images[i].numpy().tobytes(): label for i, label in enumerate(train.labels("count"))}
    assert len(code) == len(train)

    def oracle(batch):
        return torch.eye(8)[[code[image.numpy().tobytes()] for image in batch]]

    rows = evaluate([Network("oracle", oracle)], train, train, image_size=(16, 16), labels=["count"], batch_size=11)
    assert [r.accuracy for r in rows] == [1.0, 1.0]
    assert np.isclose(rows[0].standard_error, 0.0)
