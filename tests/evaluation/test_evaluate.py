"""Evaluation of several networks: shared features, tables, files of results, and errors."""

import copy
import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.evaluation.data_identity import shared_samples
from jepa_kit.evaluation.evaluate import evaluate
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import Network, encoder_named, pixel_network, run_networks
from jepa_kit.evaluation.features import extract_features, load_run, untrained_encoder
from jepa_kit.evaluation.protocols.finetune import Finetune
from jepa_kit.evaluation.protocols.knn import KNN
from jepa_kit.evaluation.protocols.logistic import Logistic
from jepa_kit.evaluation.tables.results import about_checkpoint, results, write_results
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.evaluation.tables.table import format_table

PIXELS = pixel_network()
IMAGES = ImageOptions(image_size=(16, 16))
LOGISTIC = {"name": "logistic", "subsets": ["all"]}


@pytest.fixture
def loaded(tiny_run):
    return load_run(tiny_run[0])


def test_rows_equal_the_probes_on_the_same_features(loaded, scenes):
    train, test = scenes
    labels = ["distance", "count"]
    networks = run_networks(loaded, encoders=["target", "context"])
    rows = evaluate(networks, train, test, IMAGES, labels=labels)
    assert [(r.protocol, r.network, r.label) for r in rows] == [
        (protocol, network, label)
        for protocol in ("logistic", "knn")
        for network in ("target", "context", "untrained", "pixels")
        for label in labels
    ]
    images = [torch.cat([b.images for b in eval_batches(part, ImageOptions(image_size=(16, 16)))]) for part in scenes]
    data = loaded.config.data
    for name, encoder in (("target", loaded.jepa.target_encoder), ("untrained", untrained_encoder(loaded.config, 11))):
        x, y = (extract_features(encoder, part, mean=data.mean, std=data.std) for part in images)
        for (protocol, probe), label in itertools.product((("logistic", Logistic()), ("knn", KNN())), labels):
            row = next(r for r in rows if (r.protocol, r.network, r.label) == (protocol, name, label))
            found = probe.classify(x, train.labels(label), y, test.labels(label))
            assert row.accuracy == found.accuracy
            assert row.settings == found.settings
            assert (row.width, row.layers, row.pooling) == (16, "last", "mean")
    assert next(r for r in rows if r.network == "untrained").seed == 11
    assert next(r for r in rows if r.network == "pixels").layers is None


def test_what_no_label_changes_is_computed_once_for_a_network(loaded, scenes, monkeypatch):
    made = []
    for part, name in ((Logistic, "inputs"), (KNN, "find")):
        method = getattr(part, name)
        monkeypatch.setattr(
            part, name, lambda *args, m=method, n=name, **options: made.append(n) or m(*args, **options)
        )
    networks = run_networks(loaded, encoders=["target"], baselines=["untrained"])
    evaluate(networks, *scenes, IMAGES, protocols=[LOGISTIC, "knn"], labels=["distance", "count", "shape"])
    assert made == ["inputs", "inputs", "find", "find"]


def test_poolings_are_one_question_for_pixels(loaded, scenes, monkeypatch):
    asked = []
    classify = Logistic.classify
    monkeypatch.setattr(Logistic, "classify", lambda *args, **given: asked.append(0) or classify(*args, **given))
    networks = [*run_networks(loaded, encoders=["target"], baselines=["pixels"])]
    rows = evaluate(
        networks, *scenes, IMAGES, protocols=[LOGISTIC, {**LOGISTIC, "pooling": "quarters"}], labels=["count"]
    )
    assert len(asked) == 3
    assert [(r.network, r.pooling, r.variant) for r in rows] == [
        ("target", "mean", "pooling=mean"),
        ("pixels", None, "pooling=mean"),
        ("target", "quarters", "pooling=quarters"),
        ("pixels", None, "pooling=quarters"),
    ]
    assert rows[1].accuracy == rows[3].accuracy


EVERYTHING = [
    LOGISTIC,
    "knn",
    {"name": "linear", "epochs": 1},
    {"name": "paper_linear", "epochs": 1},
    {"name": "paper_transfer", "dataset": "cifar10"},
    "count",
    "distance",
    {"name": "attentive", "epochs": 1},
    {"name": "dense", "epochs": 1},
]
"""Every protocol on frozen features."""


@pytest.fixture
def reads(monkeypatch):
    """Record the (folder, sample) of each image that is read."""
    found = []
    files = ShardDataset.image_files

    def noted(self, samples):
        found.extend((self.path, int(i)) for i in samples)
        return files(self, samples)

    monkeypatch.setattr(ShardDataset, "image_files", noted)
    return found


def test_images_are_read_once_for_everything(loaded, masked_scenes, reads, tmp_path):
    networks = run_networks(loaded, encoders=["target", "context"], checkpoint_sha256="a")
    once = sorted((part.path, i) for part in masked_scenes for i in range(len(part)))
    rows = evaluate(networks, *masked_scenes, IMAGES, protocols=EVERYTHING, store=FeatureStore(tmp_path))
    assert sorted(reads) == once
    assert {r.protocol for r in rows} == {s if isinstance(s, str) else s["name"] for s in EVERYTHING}
    networks = run_networks(loaded, encoders=["target", "context"], checkpoint_sha256="a")
    again = evaluate(networks, *masked_scenes, IMAGES, protocols=EVERYTHING, store=FeatureStore(tmp_path))
    assert len(reads) == len(once)  # from the folder
    assert [r.accuracy for r in again] == [r.accuracy for r in rows]


def test_protocols_of_one_label_or_masks(loaded, masked_scenes):
    networks = run_networks(loaded, baselines=["pixels"])
    specs = ["count", {"name": "dense", "epochs": 1}, "knn"]
    rows = evaluate(networks, *masked_scenes, IMAGES, protocols=specs, labels=["shape"])
    assert [(r.protocol, r.network, r.column) for r in rows] == [
        ("count", "target", "count"),
        ("count", "pixels", "count"),
        ("dense", "target", "mask"),
        ("dense", "target", "mask mIoU"),
        ("dense", "pixels", "mask"),
        ("dense", "pixels", "mask mIoU"),
        ("knn", "target", "shape"),
        ("knn", "pixels", "shape"),
    ]
    assert [r.layers for r in rows if r.network == "target"] == ["last, last4", "last", "last", "last"]
    assert [r.pooling for r in rows if r.network == "target"] == ["mean", "none", "none", "mean"]


def test_fine_tuning_has_no_row_for_pixels(loaded, scenes):
    networks = run_networks(loaded)
    specs = [{"name": "finetune", "epochs": 1, "batch_size": 32}]
    rows = evaluate(networks, *scenes, IMAGES, protocols=specs, labels=["count"])
    assert [(r.network, r.layers, r.pooling, r.width) for r in rows] == [
        ("target", None, None, 0),
        ("untrained", None, None, 0),
    ]


def test_one_protocol_with_several_options_has_a_row_of_each(scenes):
    specs = ["knn", {"name": "knn", "neighbours": [5, 9], "queries": 50}, LOGISTIC]
    rows = evaluate([PIXELS], *scenes, IMAGES, protocols=specs, labels=["count"])
    titles = ["knn neighbours=[10, 20, 100, 200] queries=10000", "knn neighbours=[5, 9] queries=50", "logistic"]
    assert [row.title for row in rows] == titles
    assert [line.split("|")[1].strip() for line in format_table(rows).splitlines()[2:5]] == titles


def test_fine_tuning_gets_the_image_options(loaded, scenes, monkeypatch):
    found = []
    monkeypatch.setattr(Finetune, "__call__", lambda self, task: found.append(task.images) or [])
    networks = run_networks(loaded, baselines=[])
    read = {"image_size": (16, 16), "mean": (0.1,) * 3, "std": (0.2,) * 3, "batch_size": 7, "num_workers": 0}
    read |= {"decoder": "fast", "max_pixels": 12345, "precision": "bf16"}
    assert evaluate(networks, *scenes, ImageOptions(**read), protocols=["finetune"], labels=["count"]) == []
    assert vars(found[0]) == read


def test_last4_is_four_times_as_wide(loaded, scenes):
    networks = run_networks(loaded, baselines=["untrained"], untrained_seed=5)
    rows = evaluate(networks, *scenes, IMAGES, protocols=["knn"], labels=["shape"], layers="last4")
    assert [(r.network, r.width, r.layers, r.seed) for r in rows] == [
        ("target", 64, "last4", None),
        ("untrained", 64, "last4", 5),
    ]


def test_the_same_for_any_workers_and_batches(loaded, scenes):
    networks = run_networks(loaded)
    first, second = (
        evaluate(networks, *scenes, replace(IMAGES, batch_size=size, num_workers=workers), protocols=["knn"])
        for size, workers in ((256, 0), (7, 1))
    )
    assert [r.accuracy for r in first] == pytest.approx([r.accuracy for r in second], abs=0.05)
    assert [r.settings["k"] for r in first if r.network == "pixels"] == [
        r.settings["k"] for r in second if r.network == "pixels"
    ]


def test_a_recipe_without_a_target_encoder_is_evaluated_by_its_context_encoder(tiny_config, scenes):
    from jepa_kit.config import config_from_dict
    from jepa_kit.evaluation.features import LoadedRun
    from jepa_kit.from_config import build_recipe

    raw = tiny_config.to_dict()
    raw |= {"target": {"name": "pixel"}, "target_update": {"name": "none"}}
    config = config_from_dict(raw)
    run = LoadedRun(config, build_recipe(config), 0)
    (network,) = run_networks(run, baselines=[])
    assert network.name == "context"
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = extract_features(run.jepa.encoder, x, mean=config.data.mean, std=config.data.std)
    np.testing.assert_array_equal(network.source(x, [(4, "mean")])[0].numpy(), expected)
    assert encoder_named(run.jepa) == encoder_named(run.jepa, "context") == "context"
    with pytest.raises(ValueError, match=r"encoder \(='target'\) must be 'context': this recipe has no target encoder"):
        run_networks(run, encoders=["target"], baselines=[])
    tied = config_from_dict(tiny_config.to_dict() | {"target_update": {"name": "tied"}})
    assert encoder_named(build_recipe(tied)) == "target"
    frozen = build_recipe(config_from_dict(tiny_config.to_dict() | {"target_update": {"name": "frozen"}}))
    assert encoder_named(frozen) == "context"  # the target encoder has its first weights
    assert encoder_named(frozen, "target") == "target"


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
        row("target", "shape", 0.3, protocol="knn", chance=0.2),
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
    rows = evaluate([PIXELS], train, test, IMAGES, seed=4)
    checkpoint = about_checkpoint(tiny_run[0], loaded)
    content = results(rows, config=loaded.config, checkpoint=checkpoint, train=train, test=test, seed=4)
    file = write_results(content, tmp_path / "new" / "results.json")
    read = json.loads(file.read_text())
    latest = tiny_run[0] / "checkpoint_00000005.pt"
    assert read["format"] == "jepa_kit evaluation/2"
    assert read["config"]["encoder"]["embed_dim"] == 16
    assert read["checkpoint"] == {
        "file": str(latest),
        "sha256": hashlib.sha256(latest.read_bytes()).hexdigest(),
        "step": 5,
        "data": {"samples": 8, "digest": ""},
    }
    assert read["rows"][0]["options"]["subsets"] == ["all"]
    assert read["data"]["test_samples_in_train"] == 0
    assert read["data"]["image_size"] == [16, 16]
    assert read["data"]["decoder"] == "pillow"
    assert read["data"]["train"]["samples"] == 96
    assert read["data"]["train"]["index_sha256"] != read["data"]["test"]["index_sha256"]
    assert read["seeds"] == {"run": 11, "protocols": 4}
    assert {"jepa_kit", "torch", "scikit-learn"} <= set(read["versions"])
    assert len(read["rows"]) == 6
    assert read["rows"][0]["settings"]["C"] == rows[0].settings["C"]
    assert [p.name for p in file.parent.iterdir()] == ["results.json"]


def test_progress_is_plain_lines_without_a_terminal(scenes, capsys):
    evaluate([PIXELS], *scenes, IMAGES, protocols=["knn"], labels=["count"], progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"features of 96 images in {scenes[0].path}: ")
    assert lines[-1].startswith("knn, count, pixels: ")
    assert len(lines) == 3
    evaluate([PIXELS], *scenes, IMAGES, protocols=["knn"], labels=["count"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": []}, "protocols (=[]) must name at least one of attentive"),
        ({"protocols": ["dense"]}, "patch_size (=None) must be given to pixel_network for protocols of patches"),
        ({"protocols": ["finetune"]}, "protocol 'finetune' trains an encoder, and pixels has none"),
        ({"labels": ["cuont"]}, "label (='cuont') is not among the labels of"),
        ({"labels": []}, "labels (=[]) must name at least one; the shards in"),
        ({"networks": []}, "networks (=[]) must be at least one, with names of their own"),
        ({"networks": [PIXELS, PIXELS]}, "networks (=['pixels', 'pixels']) must be at least one, with names of their"),
        ({"seed": -1}, "seed (=-1) must be at least 0"),
    ],
)
def test_evaluate_rejects_bad_arguments(scenes, options, message):
    options = {"networks": [PIXELS]} | options
    with pytest.raises(ValueError) as error:
        evaluate(options.pop("networks"), *scenes, IMAGES, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "knn", "neighbours": [96]}, "neighbours (=(96,)) must contain numbers from 1 to 95 (N - 1)"),
        ({"name": "logistic", "subsets": ["90/class"]}, "subsets (='90/class') needs 90 images, but class 0 has "),
        ({"name": "finetune", "subset": "90/class"}, "subsets (='90/class') needs 90 images, but class 0 has "),
    ],
)
def test_unusable_labels_are_rejected_before_images_are_read(loaded, scenes, reads, spec, message):
    with pytest.raises(ValueError) as error:
        evaluate(run_networks(loaded), *scenes, IMAGES, protocols=[LOGISTIC, spec], labels=["count"])
    assert str(error.value).startswith(f"protocol {spec['name']!r}, label 'count', target: {message}")
    assert not reads


@pytest.mark.parametrize("name", ["linear", "count", "paper_linear", {"name": "attentive", "lrs": [1e-3, 1e-2]}])
def test_too_rare_a_class_is_rejected_before_images_are_read(loaded, scenes, reads, monkeypatch, name):
    rare = np.where(np.arange(96) == 7, 7, np.arange(96) % 6)
    monkeypatch.setattr(scenes[0], "labels", lambda label: rare)
    with pytest.raises(ValueError, match=r"label 'count', target: the training set .*; class 7 has 1"):
        evaluate(run_networks(loaded), *scenes, IMAGES, protocols=[name], labels=["count"])
    assert not reads


def test_errors_of_a_protocol_name_label_and_network(loaded, scenes):
    specs = [{"name": "attentive", "num_heads": 5}]
    with pytest.raises(ValueError) as error:
        evaluate(run_networks(loaded), *scenes, IMAGES, protocols=specs, labels=["shape"])
    expected = "protocol 'attentive', label 'shape', target: num_heads (=5) must divide the width (=16)"
    assert str(error.value) == expected


def test_defaults_of_logistic_work_for_few_images(scenes):
    """1 % of 96 scenes is one image of each class."""
    rows = evaluate([PIXELS], *scenes, IMAGES, protocols=["logistic"], labels=["count"])
    assert [(row.title, row.validation is None) for row in rows] == [
        ("logistic 1%", True),
        ("logistic 10%", True),
        ("logistic", False),
    ]


def test_shared_samples_are_counted(scenes):
    """Shards are compared by digest, not by name."""
    train, test = scenes
    assert (shared_samples(train, train), shared_samples(train, test)) == (96, 0)
    shards = [dict(part.shards[0], file=f"shard-00000{k}.tar") for k, part in enumerate(scenes)]
    mixed = type("Mixed", (), {"shards": shards})
    assert shared_samples(train, mixed) == 48


def test_shards_whose_classes_differ(scenes, scene_shards, tmp_path):
    other = scene_shards(tmp_path / "other", 4, seed=0)
    other.classes["shape"] = ("cube", "sphere")
    with pytest.raises(ValueError) as error:
        evaluate([PIXELS], scenes[0], other, IMAGES)
    assert str(error.value) == (
        f"label (='shape') must have the same classes in both: {scenes[0].path} has 8 (sphere, cube, cylinder, cone, "
        f"ring, ...), {other.path} has 2 (cube, sphere)"
    )


def test_test_shards_may_lack_the_last_classes(scenes):
    """Classes of foreign shards are the numbers that occur. Training shards may not lack classes."""
    train, test = (copy.copy(part) for part in scenes)
    most = min(int(test.labels("shape").max()), len(train.classes["shape"]) - 2)
    test.classes = {"shape": tuple(map(str, range(most + 1)))}
    train.classes = {"shape": tuple(map(str, range(8)))}
    test._labels = np.minimum(test._labels[:, -1:], most)
    train._labels = train._labels[:, -1:]
    (row,) = evaluate([PIXELS], train, test, IMAGES, protocols=["knn"])
    assert 0 <= row.accuracy <= 1
    with pytest.raises(ValueError, match=r"label \(='shape'\) must have the same classes in both"):
        evaluate([PIXELS], test, train, IMAGES, protocols=["knn"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": ["taget"]}, "encoders (='taget') must be of target, context; did you mean 'target'?"),
        ({"encoders": ["target", "target"]}, "encoders (=target, target) must be different ones"),
        ({"baselines": ["random"]}, "baselines (='random') must be of untrained, pixels, patches."),
    ],
)
def test_run_networks_rejects_bad_names(loaded, options, message):
    with pytest.raises(ValueError) as error:
        run_networks(loaded, **options)
    assert str(error.value) == message


def test_labels_follow_their_images(scenes, tmp_path):
    """A network that knows the label of each image is always right: labels stay with their images."""
    train, _ = scenes
    images = torch.cat([b.images for b in eval_batches(train, ImageOptions(image_size=(16, 16)))])
    code = {images[i].numpy().tobytes(): label for i, label in enumerate(train.labels("count"))}
    assert len(code) == len(train)

    def oracle(batch, wanted):
        # the image of zeros that gives the shape of features has no label
        return [torch.eye(8)[[code.get(image.numpy().tobytes(), 0) for image in batch]] for _ in wanted]

    rows = evaluate([Network("oracle", oracle)], train, train, replace(IMAGES, batch_size=11), labels=["count"])
    assert [r.accuracy for r in rows] == [1.0, 1.0]
    assert np.isclose(rows[0].standard_error, 0.0)


def test_layers_that_the_encoder_does_not_have(loaded, scenes):
    with pytest.raises(ValueError) as error:
        evaluate(run_networks(loaded), *scenes, IMAGES, layers="last5")
    assert str(error.value) == (
        "protocol 'logistic', target: layers (='last5') needs 5 layers, but the encoder has 4; --layers last fits "
        "any encoder"
    )


def test_a_protocol_of_its_own_layers_on_a_shallow_encoder(tiny_config, scenes):
    from jepa_kit.config import config_from_dict
    from jepa_kit.evaluation.feature_sources import config_networks

    raw = tiny_config.to_dict()
    raw["encoder"]["depth"] = 2
    networks = config_networks(config_from_dict(raw))
    with pytest.raises(ValueError, match=r"needs 4 .* has 2; --protocol '{name: linear, layers: \[last\]}' fits any"):
        evaluate(networks, *scenes, IMAGES, protocols=["linear"])


class Counted(FeatureStore):
    """A store that fails the test if features are extracted."""

    def extract(self, *args, **kwargs):
        raise AssertionError("features were computed")


@pytest.mark.parametrize("protocol", ["knn", "logistic", "linear", "attentive", "finetune"])
def test_a_label_of_one_class_is_rejected_before_features_are_extracted(loaded, scenes, monkeypatch, protocol):
    train, test = scenes
    networks = run_networks(loaded)
    one = {"count": np.zeros(len(train), dtype=np.int64)}
    monkeypatch.setattr(
        train, "labels", lambda label: one[label] if label in one else ShardDataset.labels(train, label)
    )
    with pytest.raises(
        ValueError, match=r"label \(='count'\) must have samples of at least 2 classes in .*those of 1; --"
    ):
        evaluate(networks, train, test, IMAGES, protocols=[protocol], store=Counted())
    monkeypatch.undo()
    some = train.labels("count").copy()
    some[some == test.labels("count")[0]] = (test.labels("count")[0] + 1) % 8
    monkeypatch.setattr(train, "labels", lambda label: some)
    with pytest.raises(ValueError, match=r"label \(='count'\): .* has samples of '\d', and .* none"):
        evaluate(networks, train, test, IMAGES, protocols=[protocol], labels=["count"], store=Counted())


def test_shards_without_masks(scenes, monkeypatch):
    monkeypatch.setattr(scenes[1], "has_masks", False)
    with pytest.raises(ValueError) as error:
        evaluate([pixel_network(4)], *scenes, IMAGES, protocols=["dense"])
    assert str(error.value) == f"protocol 'dense' needs masks, and the shards in {scenes[1].path} carry none"


def test_the_table_of_several_kinds():
    rows = [
        row("target", "mask", 0.5, protocol="dense"),
        row("target", "mask", 0.25, protocol="dense", metric="mIoU", chance=0.1),
        row("target", "count", 0.4, protocol="logistic", variant="1%", draws=3, standard_error=0.02),
        row("untrained", "count", 0.3, protocol="linear", layers="last, last4"),
    ]
    assert format_table(rows).splitlines() == [
        "| protocol    | features                       | width | mask       | mask mIoU  | count      |",
        "| ----------- | ------------------------------ | ----- | ---------- | ---------- | ---------- |",
        "| dense       | target encoder                 | 16    | 50.0 ± 1.0 | 25.0 ± 1.0 |            |",
        "| logistic 1% | target encoder                 | 16    |            |            | 40.0 ± 2.0 |",
        "| linear      | untrained, best of last, last4 | 16    |            |            | 30.0 ± 1.0 |",
        "|             | chance                         |       | 12.5       | 10.0       | 12.5       |",
    ]
