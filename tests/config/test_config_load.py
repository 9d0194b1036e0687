"""Files, bases and overrides."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.config.load import merge
from jepa_kit.errors import ConfigError

Write = Callable[..., Path]
Problems = Callable[..., list[str]]


def refused(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_yaml_file(write: Write) -> None:
    config = load_config(write())
    assert config.data.image_size == (32, 32)
    assert config.slots["masker"].name == "blocks"
    assert config.slots["masker"].options == {"num_targets": 4, "scale": (0.1, 0.2), "overlap": False}
    assert [(part.name, part.options, weight) for part, weight in config.losses] == [("l2", {}, 1.0)]
    assert list(config.slots) == ["masker", "encoder", "predictor", "target", "target_update"]


def test_a_relative_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.chdir(path.parent)
    assert load_config(path.name) == load_config(path)


def test_a_run_folder(write: Write) -> None:
    path = write()
    assert load_config(path.parent) == load_config(path)


def test_a_checkpoint(write: Write, tmp_path: Path) -> None:
    config = load_config(write(), ["masker.num_targets=7"])
    path = tmp_path / "step_10.pth"
    torch.save({"model": {"w": torch.ones(3)}, "config": config.to_dict(), "step": 10}, path)
    assert load_config(path) == config
    assert load_config(path, ["masker.num_targets=8"]).slots["masker"].options["num_targets"] == 8


TAKES = "a config is a YAML file, a run folder or a checkpoint"


def test_a_missing_file(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    assert refused(path) == f"{path!r} does not exist; {TAKES}"


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    path = str(tmp_path)
    assert refused(path) == f"the folder {path!r} is not a run folder: it has no config.yaml; {TAKES}"


def test_yaml_errors_name_the_file(write: Write) -> None:
    path = write("masker: {name: [}")
    assert refused(path).startswith(f"{path}: 1 mistake\n  line 1, column 17: not YAML: while parsing a flow node")
    path = write("data: {image_size: 3}\ndata: {}")
    assert refused(path) == f"{path}: 1 mistake\n  line 2, column 1: 'data' is already given in line 1"


@pytest.mark.parametrize(("text", "kind"), [("", "nothing"), ("- a", "a list"), ("vit", "a str"), ("3", "a int")])
def test_a_file_without_a_mapping(write: Write, text: str, kind: str) -> None:
    message = f"the file has {kind}, but a config is a mapping with keys such as masker"
    assert refused(write(text)).endswith(message)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n")
    assert refused(path).endswith(f"neither text nor a checkpoint that torch.save wrote; {TAKES}")


def test_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"encoder": {}, "epoch": 3}, path)
    message = "the checkpoint has no config (it has entries encoder, epoch); give the YAML file of its run"
    assert refused(path).endswith(message)
    torch.save(torch.ones(3), path)
    assert refused(path).endswith("the checkpoint has no config (it has a Tensor); give the YAML file of its run")


class Unsafe:
    pass


def test_a_checkpoint_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"config": {}, "model": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    assert "the checkpoint cannot be read: " in refused(path)
    torch.save({"config": Unsafe()}, path)
    with pytest.raises(ConfigError, match=r"the checkpoint cannot be read: it names .*Unsafe") as caught:
        load_config(path)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)


def test_merge() -> None:
    base = {
        "masker": {"name": "a", "x": 1, "deep": {"p": 1, "q": 2}},
        "encoder": {"name": "e", "x": 1},
        "loss": [{"name": "l2"}],
        "optim": {"lr": 1, "betas": [1, 2]},
    }
    over = {
        "masker": {"name": "a", "y": 2, "deep": {"q": 3}},
        "encoder": {"name": "f"},
        "loss": [{"name": "l1"}],
        "optim": {"betas": [3]},
        "train": {"seed": 1},
    }
    before = repr(base), repr(over)
    assert merge(base, over) == {
        "masker": {"name": "a", "x": 1, "y": 2, "deep": {"p": 1, "q": 3}},
        "encoder": {"name": "f"},
        "loss": [{"name": "l1"}],
        "optim": {"lr": 1, "betas": [3]},
        "train": {"seed": 1},
    }
    assert (repr(base), repr(over)) == before


@pytest.mark.parametrize(
    ("over", "merged"),
    [
        ({"loss": {"weight": 2}}, {"name": "l2", "beta": 1, "weight": 2}),
        ({"loss": {"name": "l2", "weight": 2}}, {"name": "l2", "beta": 1, "weight": 2}),
        ({"loss": {"name": "l1"}}, {"name": "l1"}),
        ({"loss": [{"name": "l2"}]}, [{"name": "l2"}]),
        ({"loss": None}, None),
    ],
)
def test_merge_of_a_loss(over: dict[str, object], merged: object) -> None:
    assert merge({"loss": {"name": "l2", "beta": 1}}, over)["loss"] == merged


def test_a_name_outside_the_slots_does_not_replace() -> None:
    """Only a slot is replaced whole."""
    assert merge({"data": {"name": "a", "x": 1}}, {"data": {"name": "b"}}) == {"data": {"name": "b", "x": 1}}
    deep = merge({"masker": {"o": {"name": "a", "x": 1}}}, {"masker": {"o": {"name": "b"}}})
    assert deep == {"masker": {"o": {"name": "b", "x": 1}}}


def test_bases_chain_and_are_relative_to_their_file(write: Write) -> None:
    write(name="base/lowest.yaml")
    write("_BASE_: lowest.yaml\nmasker: {num_targets: 5}\ntrain: {seed: 1}", "base/middle.yaml")
    top = write("_BASE_: base/middle.yaml\ntrain: {seed: 2}\nencoder: {name: net, width: 3}", "top.yaml")
    config = load_config(top)
    assert config.slots["masker"].options["num_targets"] == 5
    assert config.train.seed == 2
    assert config.slots["encoder"].options["width"] == 3


def test_a_base_may_be_absolute_or_a_run_folder(write: Write) -> None:
    base = write(name="run/config.yaml")
    for place in (base, base.parent, "run"):
        assert load_config(write(f"_BASE_: {place}\n", "top.yaml")) == load_config(base)


def test_another_name_leaves_nothing_of_the_base(write: Write) -> None:
    write()
    config = load_config(write("_BASE_: config.yaml\nmasker: {name: scattered}", "top.yaml"))
    assert config.slots["masker"].options == {"ratio": 0.6}


def test_a_base_that_does_not_exist(write: Write) -> None:
    top = write("_BASE_: none.yaml", "top.yaml")
    assert refused(top) == f"{str(top.parent / 'none.yaml')!r}, the _BASE_ of {str(top)!r}, does not exist; {TAKES}"


@pytest.mark.parametrize("value", ["3", "[a.yaml]", "null", "''"])
def test_a_base_that_is_not_a_path(write: Write, value: str) -> None:
    assert "must be the path of a config, relative to this file" in refused(write(f"_BASE_: {value}"))


def test_bases_that_go_round(write: Write) -> None:
    a, b = write("_BASE_: sub/../b.yaml", "a.yaml"), write("_BASE_: a.yaml", "b.yaml")
    (a.parent / "sub").mkdir()
    assert refused(a).endswith(f"_BASE_ goes round in a circle: {a} -> {b} -> {a}")
    assert refused(write("_BASE_: c.yaml", "c.yaml")).count("c.yaml -> ") == 1


def test_overrides(write: Write) -> None:
    config = load_config(
        write(),
        [
            "masker.num_targets=8",
            "masker.scale=[0.2, 0.4]",
            "target_update={name: none}",
            "optim.lr=1e-2",
            "train.output_dir=runs/a=b",
            "data.cache=null",
            "loss.weight=0.5",
            "train.seed=1",
            "train.seed=2",
        ],
    )
    assert config.slots["masker"].options == {"num_targets": 8, "scale": (0.2, 0.4), "overlap": False}
    assert config.slots["target_update"].name == "none"
    assert config.optim.lr == 0.01
    assert config.train.output_dir == "runs/a=b"
    assert config.losses[0][1] == 0.5
    assert config.train.seed == 2


def test_an_override_of_a_slot_follows_the_rule_of_bases(write: Write) -> None:
    path = write()
    assert load_config(path, ["masker={name: scattered, ratio: 0.4}"]).slots["masker"].options == {"ratio": 0.4}
    assert load_config(path, ["masker.name=scattered"]).slots["masker"].options == {"ratio": 0.6}
    kept = load_config(path, ["masker={name: blocks, overlap: true}"]).slots["masker"].options
    assert kept == {"num_targets": 4, "scale": (0.1, 0.2), "overlap": True}


def test_the_order_of_a_name_and_its_options_does_not_matter(write: Write) -> None:
    overrides = ["masker.ratio=0.4", "masker.name=scattered"]
    one, two = (load_config(write(), order) for order in (overrides, overrides[::-1]))
    assert one == two
    assert one.slots["masker"].options == {"ratio": 0.4}


def test_an_option_that_its_override_leaves_without_a_part_is_told(problems: Problems) -> None:
    assert problems("", "masker.num_targets=8", "masker.name=scattered") == [
        "masker.num_targets is not an option of 'scattered'; it belongs to 'blocks'. It takes: ratio"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.seed", "override 'train.seed' must be key=value, such as masker.num_targets=8"),
        ("--resume", "override '--resume' must be key=value, such as masker.num_targets=8"),
        ("=3", "override '=3' must be key=value, such as masker.num_targets=8"),
        ("train..seed=3", "override 'train..seed=3' must be key=value, such as masker.num_targets=8"),
        ("train seed=3", "override 'train seed=3' must be key=value, such as masker.num_targets=8"),
        ("train.seed=", "override 'train.seed=' has no value; write train.seed=null for none"),
        ("_BASE_=a.yaml", "override '_BASE_=a.yaml': _BASE_ belongs in a file; give that file as --config-file"),
        (
            "masker={name: [}",
            "override 'masker={name: [}': line 1, column 9: not YAML: while parsing a flow node from line 1, "
            "expected the node content, but found '}'",
        ),
        (
            "masker={name: a, name: b}",
            "override 'masker={name: a, name: b}': line 1, column 11: 'name' is already given in line 1",
        ),
        ("train.seeds=3", "train.seeds is not an option; did you mean 'seed'? It takes: batch_size,"),
        ("optim.lr=fast", "optim.lr (='fast') must be a float"),
        ("masker.grid=[2, 2]", "masker.grid is supplied by the recipe (data.image_size over encoder.patch_size); take"),
        ("masker.name.x=1", "masker.name: {'x': 1} is not a registered masker"),
    ],
)
def test_a_wrong_override(problems: Problems, override: str, line: str) -> None:
    found = problems("", override)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_an_override_inside_a_list(problems: Problems) -> None:
    line = "override 'loss.weight=2': loss is a list here; override it whole, loss=[...]"
    assert problems("loss: [{name: l2}]", "loss.weight=2") == [line]
    assert problems("", "loss=[{name: l2}]", "loss.weight=2") == [line]


def test_a_scientific_number_is_a_float(write: Write) -> None:
    path = write(write().read_text() + "optim: {lr: 1e-2, eps: 1E-9}\n")
    assert (load_config(path).optim.lr, load_config(path).optim.eps) == (1e-2, 1e-9)


def test_a_dict_is_not_changed(write: Write) -> None:
    raw = load_config(write()).to_dict()
    before = repr(raw)
    config_from_dict(raw, ["masker.num_targets=9", "optim.lr=0.5"])
    assert repr(raw) == before


def test_paths_as_text_and_as_pathlib(write: Write) -> None:
    path = write()
    assert load_config(os.fspath(path)) == load_config(path)


def test_errors_can_be_pickled(write: Write) -> None:
    """A launcher's worker hands its error back."""
    with pytest.raises(ConfigError) as caught:
        load_config(write("maskr: {}"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.problems == caught.value.problems
    assert re.match(r".*: 8 mistakes\n", str(copy))
