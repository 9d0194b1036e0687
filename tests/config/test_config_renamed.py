"""Old names of options and parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_kit.config import config_from_dict, load_config, modernize
from jepa_kit.config.check import SECTIONS
from jepa_kit.config.renamed import OPTIONS, PARTS, RELEASED_CROP
from jepa_kit.data.transforms import build_pipeline
from jepa_kit.registry import TRANSFORMS
from jepa_kit.rng import Stream, uniforms

Write = Callable[..., Path]
Problems = Callable[..., list[str]]

OLD = """\
train:
  checkpoint: sharded
  checkpoint_dir: elsewhere
  checkpoint_every: 5
  keep_checkpoints: 3
  keep_every: 10
  bad_numbers: skip
  bad_numbers_limit: 7
data:
  transforms: [{name: centre_crop}, {name: colour_jitter, p: 0.8}, {name: grey}, {name: solarise}]
"""
NEW = """\
train: {on_nonfinite: skip, nonfinite_limit: 7}
checkpoint: {format: sharded, dir: elsewhere, every: 5, keep: 3, keep_every: 10}
data:
  transforms: [{name: center_crop}, {name: color_jitter, p: 0.8}, {name: grayscale}, {name: solarize}]
"""


def lay_over(write: Write, text: str, *overrides: str) -> Any:
    write(name="valid.yaml")
    return load_config(write(f"_BASE_: valid.yaml\n{text}", "over.yaml"), overrides)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_names_mean_the_new_ones(write: Write) -> None:
    with pytest.warns(FutureWarning, match=r"train\.checkpoint_every is now checkpoint\.every; the next version"):
        old = lay_over(write, OLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert old == lay_over(write, NEW)


SHIPPED = sorted(Path(__file__).parents[2].glob("projects/*/configs/*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_shipped_configs_have_new_names(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(file)


def test_every_new_name_exists() -> None:
    for new in filter(None, OPTIONS.values()):
        section, key = new.split(".")
        assert key in SECTIONS[section].__dataclass_fields__
    for old in OPTIONS:
        section, key = old.split(".")
        assert key not in SECTIONS[section].__dataclass_fields__
    assert set(PARTS["data.transforms"].values()) <= set(TRANSFORMS.names())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_override_counts_over_a_base_whatever_name_either_uses(write: Write) -> None:
    assert lay_over(write, "train: {checkpoint_every: 5}", "checkpoint.every=6").checkpoint.every == 6
    assert lay_over(write, "checkpoint: {every: 5}", "train.checkpoint_every=6").checkpoint.every == 6
    write("_BASE_: valid.yaml\ntrain: {checkpoint_every: 5, bad_numbers: skip}", "middle.yaml")
    config = load_config(write("_BASE_: middle.yaml\ncheckpoint: {every: 7, keep: 4}", "top.yaml"))
    assert (config.checkpoint.every, config.checkpoint.keep, config.train.on_nonfinite) == (7, 4, "skip")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_names_in_one_place(problems: Problems) -> None:
    assert problems("train: {checkpoint_every: 5}\ncheckpoint: {every: 5}") == [
        "train.checkpoint_every (=5) is now checkpoint.every, which is given too: remove train.checkpoint_every"
    ]
    assert problems("", "train.bad_numbers=skip", "train.on_nonfinite=skip") == [
        "train.bad_numbers (='skip') is now train.on_nonfinite, which is given too: remove train.bad_numbers"
    ]
    assert problems("train: {bad_numbers: x}")[0].startswith("train.on_nonfinite (='x') must be one of 'stop',")
    assert problems("checkpoint: 3\ntrain: {keep_every: 3}")[0].startswith("train.keep_every is not an option")


def test_a_warning_is_shown_once(write: Write) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            lay_over(write, "train: {keep_checkpoints: 3}")
    assert [str(one.message) for one in caught] == [
        "train.keep_checkpoints is now checkpoint.keep; the next version will not read the old name"
    ]


def old_resolved(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a resolved config as the version before the new names wrote it; transforms are a crop and a flip."""
    old = config | {"data": dict(config["data"]), "train": dict(config["train"])}
    checkpoint = old.pop("checkpoint")
    for path, new in OPTIONS.items():
        if new is None:
            old["data"]["label"] = None
            continue
        section, key = new.split(".")
        source = checkpoint if section == "checkpoint" else old["train"]
        old["train"][path.split(".")[1]] = source.pop(key) if section == "train" else source[key]
    crop, *flips = old["data"].pop("transforms")
    old["data"] |= {"transforms": None, "crop_scale": crop["scale"], "crop_ratio": crop["ratio"]}
    old["data"]["flip"] = flips[0]["p"] if flips else 0.0
    return old


@pytest.mark.parametrize(
    "transforms", ["", "data.transforms=[{name: random_resized_crop, scale: [0.5, 1]}, {name: horizontal_flip}]"]
)
def test_a_config_that_a_run_wrote_earlier(write: Write, tmp_path: Path, transforms: str) -> None:
    """It is read without a warning, from a checkpoint too, and compares equal, so that the run can be resumed."""
    config = load_config(write(), ["train.on_nonfinite=skip", "checkpoint.keep=5", *filter(None, [transforms])])
    old = old_resolved(config.to_dict())
    torch.save({"model": {}, "config": old}, tmp_path / "checkpoint.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_dict(old) == config
        assert load_config(tmp_path / "checkpoint.pt") == config
        assert config_from_dict(modernize(old)).to_dict() == config.to_dict()
        new = config_from_dict(config.to_dict()).to_dict()
        assert repr(modernize(old)["data"]["transforms"]) == repr(new["data"]["transforms"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("{crop_scale: [0.5, 1], flip: 0.25}", (), [{"scale": (0.5, 1.0)}, {"p": 0.25}]),
        ("{crop_ratio: [1, 1], flip: 0}", (), [{"ratio": (1.0, 1.0)}]),
        ("{crop_scale: [0.5, 1], crop_ratio: null}", ("data.crop_scale=null",), [{}]),
        ("{crop_scale: [0.5, 1]}", ("data.flip=0.5",), [{"scale": (0.5, 1.0)}, {"p": 0.5}]),
        ("{flip: 0.5}", ("data.flip=0.25", "data.crop_scale=[0.2, 1]"), [{"scale": (0.2, 1.0)}, {"p": 0.25}]),
        (
            "{transforms: [{name: flip, p: 1.0}, {name: random_resized_crop, ratio: [1, 2]}]}",
            ("data.crop_scale=[0.2, 1]",),
            [{"p": 1.0}, {"scale": (0.2, 1.0), "ratio": (1.0, 2.0)}],
        ),
    ],
)
def test_short_keys_change_the_list(
    write: Write, text: str, overrides: tuple[str, ...], expected: list[dict[str, Any]]
) -> None:
    found = lay_over(write, f"data: {text}", *overrides).data.transforms
    flip = {"name": "horizontal_flip", "p": 0.5}
    assert list(found) == [(flip if "p" in part else RELEASED_CROP) | part for part in expected]


def test_flips_of_either_direction(write: Write) -> None:
    """They have the names of torchvision, and the random numbers that they had before: stream FLIP, lanes 0 and 1."""
    flips = "[{name: resize}, {name: flip, p: 0.3}, {name: flip, direction: vertical}]"
    with pytest.warns(FutureWarning) as caught:
        config = lay_over(write, f"data: {{transforms: {flips}}}")
    assert [str(one.message).partition(";")[0] for one in caught] == [
        "data.transforms: 'flip' is now 'horizontal_flip'",
        "data.transforms: 'flip' is now 'vertical_flip'",
    ]
    assert list(config.data.transforms)[1:] == [
        {"name": "horizontal_flip", "p": 0.3},
        {"name": "vertical_flip", "p": 0.5},
    ]
    draws = build_pipeline(config.data.transforms, image_size=(8, 8)).draws(np.arange(5), seed=3, epoch=1)
    for lane in range(2):
        expected = uniforms(Stream.FLIP, np.arange(5), 1, seed=3, epoch=1, attempt=lane)
        np.testing.assert_array_equal(draws[:, lane : lane + 1], expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_short_keys_that_fit_no_list(problems: Problems) -> None:
    assert problems("data: {transforms: [{name: resize}], crop_scale: [0.5, 1]}") == [
        "data.crop_scale (=[0.5, 1]) must be left out if data.transforms is given"
    ]
    assert problems("data: {transforms: [{name: resize}]}", "data.crop_scale=[0.5, 1]") == [
        "data.crop_scale (=[0.5, 1]) needs a random_resized_crop in data.transforms"
    ]
    assert problems("data: {flip: x}") == ["data.transforms[1].p (='x') must be a float"]


def test_an_option_that_did_nothing_is_dropped_if_it_is_null(problems: Problems) -> None:
    (problem,) = problems("data: {label: count}")
    assert problem.startswith("data.label is not an option")
    (problem,) = problems("data: {label: null}\ntrain: {epochs: 0}")
    assert problem == "train.epochs (=0) must be at least 1"
