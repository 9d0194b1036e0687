"""``data.transforms``: a list of parts inside a section, and the short keys that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_kit.config import Config, DataConfig, config_from_dict, load_config
from jepa_kit.config.sections import CROP_DEFAULTS
from jepa_kit.data.transforms import RandomResizedCrop
from jepa_kit.errors import ConfigError

Load = Callable[..., Config]


@pytest.fixture
def load(write: Callable[..., Path]) -> Load:
    """A valid config with a text laid over it, and overrides."""

    def make(text: str = "", overrides: tuple[str, ...] = ()) -> Config:
        base = write(name="valid.yaml")
        return load_config(write(f"_BASE_: {base.name}\n{text}", "over.yaml"), overrides)

    return make


def test_every_mistake_is_told_at_once(problems: Callable[..., list[str]]) -> None:
    transforms = "[{name: random_resized_crp}, {name: flip, pp: 0.5, p: x}, {p: 1}, {name: resize, image_size: 3}]"
    assert problems(f"data: {{image_size: 32, transforms: {transforms}, max_pixels: 0}}") == [
        "data.transforms[0].name: 'random_resized_crp' is not a registered transform; did you mean "
        "'random_resized_crop'? Registered: centre_crop, colour_jitter, flip, gaussian_blur, grey, "
        "random_resized_crop, resize, solarise",
        "data.transforms[1].pp is not an option of 'flip'; did you mean 'p'? It takes: p, direction",
        "data.transforms[1].p (='x') must be a float",
        "data.transforms[2].name is missing. Registered: centre_crop, colour_jitter, flip, gaussian_blur, grey, "
        "random_resized_crop, resize, solarise",
        "data.transforms[3].image_size is supplied by the recipe (data.image_size); take it out",
        "data.max_pixels (=0) must be at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transforms: 3", "data.transforms (=3) must be a list, each a mapping of a str to any value or null"),
        ("transforms: []", "data.transforms (=()) must be a list of at least one"),
        (
            "transforms: [{name: flip}]",
            "data.transforms (=['flip']) must hold one that sets the size: centre_crop, random_resized_crop, resize",
        ),
        (
            "{transforms: [{name: resize}], crop_scale: [0.5, 1]}",
            "data.crop_scale (=(0.5, 1.0)) must be left out, or null, where transforms are given: "
            "'random_resized_crop' has it there",
        ),
        (
            "{transforms: [{name: resize}], flip: 0}",
            "data.flip (=0.0) must be left out, or null, where transforms are given: 'flip' has it there",
        ),
        ("decoder: quick", "data.decoder (='quick') must be one of 'pillow', 'fast'"),
    ],
)
def test_messages(problems: Callable[..., list[str]], text: str, message: str) -> None:
    assert problems(f"data: {text if text.startswith('{') else '{' + text + '}'}") == [message]


def test_options_are_written_out_and_read_again(load: Load) -> None:
    config = load("data: {transforms: [{name: random_resized_crop, scale: [0.2, 1]}, {name: flip}]}")
    data = config.to_dict()["data"]
    assert data["transforms"] == [
        {"name": "random_resized_crop", "scale": [0.2, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "bilinear"},
        {"name": "flip", "p": 0.5, "direction": "horizontal"},
    ]
    assert (data["crop_scale"], data["crop_ratio"], data["flip"]) == (None, None, None)
    assert config_from_dict(config.to_dict()) == config


def test_the_short_keys_have_the_release_s_defaults(load: Load) -> None:
    config = load("")
    data = config.to_dict()["data"]
    assert (data["transforms"], data["crop_scale"], data["flip"]) == (None, [0.3, 1.0], 0.0)
    assert config_from_dict(config.to_dict()) == config
    assert load("data: {crop_scale: null}") == config
    crop = RandomResizedCrop(image_size=(8, 8))
    assert {"crop_scale": crop.scale, "crop_ratio": crop.ratio, "flip": 0.0} == CROP_DEFAULTS


def test_short_keys_of_a_base_are_taken_out_with_null(load: Load) -> None:
    config = load(
        "data: {crop_scale: [0.5, 1], crop_ratio: null}", ("data.transforms=[{name: resize}]", "data.crop_scale=null")
    )
    assert [part["name"] for part in config.data.view] == ["resize"]


def test_a_section_made_in_python() -> None:
    with pytest.raises(ConfigError, match=r"crop_scale .* must be left out"):
        DataConfig(image_size=(8, 8), transforms=[{"name": "resize"}], crop_scale=(0.5, 1.0))
