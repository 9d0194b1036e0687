import json
from dataclasses import replace

import pytest

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.config.check import check_part
from jepa_kit.evaluation.protocols import PROTOCOLS
from jepa_kit.studies.identity import (
    baseline_digest,
    cell_digest,
    digest,
    essentials,
    evaluation_digest,
    part_essentials,
)

DATA = {"digest": "d" * 8, "samples": 20}


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(x) for x in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["quickstart", "mae/quick", "dino/quick", "data2vec/quick"])
def test_defaults_and_the_order_of_keys_change_no_digest(name):
    config = load_config(name, ["train.precision=float32"])
    written_out = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(reversed_keys(written_out)) == config
    wanted = cell_digest(config, DATA)
    assert cell_digest(config_from_dict(written_out), DATA) == wanted
    assert cell_digest(config_from_dict(reversed_keys(written_out)), DATA) == wanted


def test_options_of_the_machine_change_no_digest(tiny):
    wanted = cell_digest(tiny("train.precision=float32"), DATA)
    for text in (
        "train.output_dir=elsewhere",
        "train.log_every=3",
        "train.tensorboard=false",
        "data.num_workers=3",
        "data.shards=/elsewhere",
        "checkpoint.keep=7",
        "train.activation_checkpointing=true",
    ):
        assert cell_digest(tiny("train.precision=float32", text), DATA) == wanted, text


def test_everything_else_does(tiny):
    config = tiny("train.precision=float32")
    found = {cell_digest(config, DATA), cell_digest(config, {"digest": "other", "samples": 20})}
    others = (
        "train.seed=1",
        "train.precision=bf16",
        "train.epochs=9",
        "train.accumulate=2",
        "train.init_from=weights.pt",
        "encoder.depth=3",
        "masker.num_targets=3",
        "optim.lr=2e-3",
        "optim.start_lr=1e-5",
        "loss=[{name: smooth_l1, weight: 2}]",
        "data.transforms=[{name: random_resized_crop, scale: [0.5, 1.0]}]",
        "data.views=[{masked: true, image_size: 32}]",
        "target_update.momentum=[0.9, 0.99]",
    )
    for text in others:
        found.add(cell_digest(tiny("train.precision=float32", text), DATA))
    assert len(found) == 2 + len(others)


def test_what_equals_a_default_is_left_out(tiny):
    found = essentials(tiny("masker.num_targets=4", "optim.lr=1e-3", "train.precision=float32"))
    assert found["masker"] == {"name": "multiblock"}
    assert found["optim"] == {"warmup_epochs": 1.0}
    assert "seed" not in found["train"]
    assert found["loss"] == [{"name": "smooth_l1"}, {"name": "cosine", "weight": 0.5}]


def test_a_file_of_imports_is_known_by_its_text(tiny, tmp_path):
    first, moved = tmp_path / "parts_a.py", tmp_path / "other" / "parts_b.py"
    moved.parent.mkdir()
    first.write_text("x = 1\n")
    moved.write_text("x = 1\n")
    config = tiny("train.precision=float32")
    found = [cell_digest(replace(config, imports=(str(file),)), DATA) for file in (first, moved)]
    moved.write_text("x = 2\n")
    found.append(cell_digest(replace(config, imports=(str(moved),)), DATA))
    assert found[0] == found[1] != found[2]


def test_a_file_of_weights_is_known_by_its_contents(tiny, tmp_path):
    wanted = {}
    for name, content in {"a.pt": b"1", "b.pt": b"1", "c.pt": b"2", "run/a.pt": b"1", "run2/a.pt": b"2"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        path = tmp_path / (name if "/" not in name else name.partition("/")[0])
        wanted[name] = cell_digest(tiny(f"train.init_from={path}"), DATA)
    assert wanted["a.pt"] == wanted["b.pt"] != wanted["c.pt"]
    assert len({wanted["a.pt"], wanted["run/a.pt"], wanted["run2/a.pt"]}) == 3
    missing = tiny("train.init_from=no/such.pt")
    assert essentials(missing)["train"]["init_from"] == "no/such.pt"


def test_a_baseline_depends_on_images_and_for_an_untrained_network_on_the_encoder(tiny):
    config, deeper = tiny("train.precision=float32"), tiny("train.precision=float32", "encoder.depth=3")
    assert baseline_digest("pixels", config) == baseline_digest("pixels", deeper)
    assert baseline_digest("untrained", config) != baseline_digest("untrained", deeper)
    assert baseline_digest("untrained", config) != baseline_digest("pixels", config)
    finer = tiny("train.precision=float32", "encoder.patch_size=2")
    assert baseline_digest("pixels", config) == baseline_digest("pixels", finer)
    assert baseline_digest("pixels", config, of_patches=True) != baseline_digest("pixels", finer, of_patches=True)
    faster = tiny("train.precision=float32", "optim.lr=2e-3", "train.epochs=4")
    assert baseline_digest("untrained", config) == baseline_digest("untrained", faster)


def test_an_evaluation_depends_on_its_options_labels_and_data():
    shards = {"train": {"digest": "a"}, "test": {"digest": "b"}}
    core = {
        text: part_essentials(PROTOCOLS, check_part("p", spec, PROTOCOLS, []))
        for text, spec in {
            "knn": {"name": "knn"},
            "default": {"name": "knn", "pooling": "mean"},
            "other": {"name": "knn", "neighbours": [5]},
        }.items()
    }
    wanted = evaluation_digest(core["knn"], "last", 0, ["a", "b"], shards)
    assert evaluation_digest(core["default"], "last", 0, ["b", "a"], shards) == wanted
    others = {
        evaluation_digest(core["other"], "last", 0, ["a", "b"], shards),
        evaluation_digest(core["knn"], "last4", 0, ["a", "b"], shards),
        evaluation_digest(core["knn"], "last", 1, ["a", "b"], shards),
        evaluation_digest(core["knn"], "last", 0, None, shards),
        evaluation_digest(core["knn"], "last", 0, ["a", "b"], {**shards, "test": {"digest": "c"}}),
    }
    assert len(others | {wanted}) == 6


def test_a_digest_is_of_values():
    assert digest({"a": (1, 2), "b": 1.0}) == digest({"b": 1.0, "a": [1, 2]})
    assert len(digest({})) == 12
