from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import jepa_kit
from jepa_kit.config import config_from_dict, load_config, versions
from jepa_kit.config.load import parse_yaml
from jepa_kit.config.resolved import _git
from jepa_kit.errors import ConfigError
from jepa_kit.registry import RECIPES, REQUIRED, SLOTS, located

Write = Callable[..., Path]

OVERRIDES = [
    "masker.scale=[0, 1]",
    "encoder={name: net, layers: [1, 2], per_layer: {a: 1, b: 1e-3}, width: 3}",
    "loss=[{name: l2}, {name: huber, weight: 2}]",
    "data.image_size=[32, 48]",
    "data.shards='1e-3/no: x'",
    "optim.clip_grad=1",
    "optim.lr=1",
]


@pytest.mark.parametrize("overrides", [[], OVERRIDES])
def test_a_resolved_config_reads_back_equal(write: Write, tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(write(), overrides)
    assert config_from_dict(config.to_dict()) == config
    assert config_from_dict(parse_yaml(config.to_yaml(), "resolved")) == config
    assert config.save(tmp_path / "new/run") == str(tmp_path / "new/run/config.yaml")
    again = load_config(tmp_path / "new/run")
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_a_resolved_config_writes_every_default_out(write: Write) -> None:
    resolved = load_config(write(), OVERRIDES[:4]).to_dict()
    assert resolved["masker"] == {"name": "blocks", "num_targets": 4, "scale": [0.0, 1.0], "overlap": False}
    assert resolved["encoder"]["per_layer"] == {"a": 1.0, "b": 0.001}
    assert resolved["encoder"]["size"] == "tiny"
    assert resolved["loss"] == [{"name": "l2", "weight": 1.0}, {"name": "huber", "beta": 1.0, "weight": 2.0}]
    assert resolved["data"]["transforms"][0]["scale"] == [0.3, 1.0]
    assert resolved["train"]["epochs"] == 300
    sections = ["data", "optim", "train", "checkpoint", "evaluate", "versions"]
    assert list(resolved) == ["recipe", *RECIPES.slots("jepa"), *sections]


def test_a_single_loss_stays_a_mapping(write: Write) -> None:
    assert load_config(write()).to_dict()["loss"] == {"name": "l2", "weight": 1.0}


def test_a_square_may_be_written_as_one_number(write: Write) -> None:
    assert load_config(write()).data.image_size == (32, 32)
    assert load_config(write(), ["data.image_size=[8, 16]"]).data.image_size == (8, 16)


def test_a_checkpoint_can_hold_it(write: Write, tmp_path: Path) -> None:
    torch.save(load_config(write(), OVERRIDES[:4]).to_dict(), tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True) == load_config(write(), OVERRIDES[:4]).to_dict()


def test_what_is_handed_out_is_not_shared(write: Write) -> None:
    config = load_config(write())
    config.to_dict()["masker"]["scale"].append(3)
    assert config.to_dict()["masker"]["scale"] == [0.1, 0.2]


def test_versions() -> None:
    found = versions()
    assert found["jepa_kit"] == jepa_kit.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert set(found) <= {"jepa_kit", "torch", "python", "git_commit", "numpy", "xformers"}


def test_versions_of_a_source_are_kept_and_not_compared(write: Write) -> None:
    text = write().read_text()
    config = load_config(write(text + "versions: {torch: 1.0.0, unheard_of: x}\n"))
    assert config.written_by == {"torch": "1.0.0", "unheard_of": "x"}
    assert config.to_dict()["versions"] == versions()
    plain = load_config(write(text))
    assert plain.written_by == {}
    assert plain == config


def test_versions_of_a_base_are_not_those_of_the_file(write: Write) -> None:
    write(write().read_text() + "versions: {torch: 1.0.0}\n", "base.yaml")
    assert load_config(write("_BASE_: base.yaml", "top.yaml")).written_by == {}


def test_the_commit_is_the_checkout_s(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert _git(tmp_path, "describe", "--always") is None
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-m", "a")
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    clean = _git(tmp_path, *describe)
    assert clean == _git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "a").write_text("b")
    assert _git(tmp_path, *describe) == f"{clean}-dirty"
    assert _git(tmp_path / "none", *describe) is None


def refuse(error: Exception) -> None:
    raise error


def test_located_names_the_slot_and_keeps_the_cause() -> None:
    cause = ValueError("num_targets (=0) must be at least 1")
    with (
        pytest.raises(ConfigError, match=r"^masker: num_targets \(=0\) must be at least 1$") as caught,
        located("masker"),
    ):
        refuse(cause)
    assert caught.value.__cause__ is cause
    with pytest.raises(TypeError, match=r"^loss\[1\]: no") as mistyped, located("loss[1]"):
        refuse(TypeError("no"))
    assert mistyped.value.__cause__ is not None
    with pytest.raises(KeyError, match="other"), located("masker"):
        refuse(KeyError("other"))
    with located("masker"):
        pass


WRITTEN: dict[type, object] = {int: 8, float: 0.5, str: "x", bool: True}
"""A value for a required option of a part that we do not know."""


def settings(slot: str, name: str) -> dict[str, object]:
    options = SLOTS[slot].options(name).values()
    return {"name": name} | {o.name: WRITTEN[o.annotation] for o in options if o.default is REQUIRED}


@pytest.mark.integration
def test_every_registered_part_is_valid_with_its_defaults() -> None:
    # of jepa_kit alone: in a process of many tests there are parts of projects, too
    ours = {
        slot: [name for name in SLOTS[slot].names() if SLOTS[slot].get(name).__module__.startswith("jepa_kit.")]
        for slot in RECIPES.slots("jepa")
    }
    first = {slot: settings(slot, names[0]) for slot, names in ours.items()}
    for slot, names in ours.items():
        for name in names:
            config = config_from_dict({"data": {"image_size": 64}} | first | {slot: settings(slot, name)})
            assert config_from_dict(parse_yaml(config.to_yaml(), name)) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/try #2", "runs/try #2"),
        ("#2", "#2"),
        ("runs/#2", "runs/#2"),
        ("a#b", "a#b"),
        ('"runs/try #2"', "runs/try #2"),
        ("'runs/try #2'", "runs/try #2"),
        ("  runs/x  ", "runs/x"),
    ],
)
def test_a_hash_is_no_comment_in_an_override(write: Write, text: str, expected: str) -> None:
    assert load_config(write(), [f"train.output_dir={text}"]).train.output_dir == expected


@pytest.mark.parametrize("text", ["'a' #2", "[a, b] # c", "{name: random} #x"])
def test_nothing_after_an_override_is_dropped(write: Write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"follows the value; quote the whole if it is part of it"):
        load_config(write(), [f"data.shards={text}"])


def test_of_repeated_overrides_the_last_counts(write: Write) -> None:
    config = load_config(write(), ["optim.lr=3e-3", "optim={lr: 1e-3}", "optim.lr=5e-4"])
    assert config.optim.lr == 5e-4
    assert load_config(write(), ["optim.lr=5e-4", "optim={lr: 1e-3}"]).optim.lr == 1e-3


@pytest.mark.parametrize("key", ["optim.lr", "train.batch_size", "data.timeout"])
def test_ints_that_no_float_is_near(write: Write, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} \(=1000.*\) must be a"):
        load_config(write(), [f"{key}=1{'0' * 400}"])


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 20_000, "1" * 5_000])
def test_values_that_no_reader_can_take(write: Write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"nested too deeply for a config|not a value of a config|not YAML"):
        load_config(write(), [f"train.seed={text}"])
