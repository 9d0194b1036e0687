"""``data.transforms``: a list of parts inside a section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_kit.config import Config, config_from_dict, load_config
from jepa_kit.data.transforms import RandomResizedCrop

Load = Callable[..., Config]


@pytest.fixture
def load(write: Callable[..., Path]) -> Load:
    """A valid config with a text laid over it, and overrides."""

    def make(text: str = "", overrides: tuple[str, ...] = ()) -> Config:
        base = write(name="valid.yaml")
        return load_config(write(f"_BASE_: {base.name}\n{text}", "over.yaml"), overrides)

    return make


def test_every_mistake_is_told_at_once(problems: Callable[..., list[str]]) -> None:
    transforms = (
        "[{name: random_resized_crp}, {name: horizontal_flip, pp: 0.5, p: x}, {p: 1}, {name: resize, image_size: 3}]"
    )
    assert problems(f"data: {{image_size: 32, transforms: {transforms}, max_pixels: 0}}") == [
        "data.transforms[0].name: 'random_resized_crp' is not a registered transform; did you mean "
        "'random_resized_crop'? Registered: center_crop, color_jitter, gaussian_blur, grayscale, "
        "horizontal_flip, random_resized_crop, resize, solarize, vertical_flip",
        "data.transforms[1].pp is not an option of 'horizontal_flip'; did you mean 'p'? It takes: p",
        "data.transforms[1].p (='x') must be a float",
        "data.transforms[2].name is missing. Registered: center_crop, color_jitter, gaussian_blur, grayscale, "
        "horizontal_flip, random_resized_crop, resize, solarize, vertical_flip",
        "data.transforms[3].image_size is supplied by the recipe (data.image_size); take it out",
        "data.max_pixels (=0) must be at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "transforms: 3",
            "data.transforms (=3) must be a list, each a mapping of a str to any value, or null for the released crop",
        ),
        ("transforms: []", "data.transforms (=()) must be a list of at least one"),
        (
            "transforms: [{name: grayscale}]",
            "data.transforms (=['grayscale']) must have one that sets the size: center_crop, random_resized_crop, "
            "resize",
        ),
        ("decoder: quick", "data.decoder (='quick') must be one of 'pillow', 'fast'"),
    ],
)
def test_messages(problems: Callable[..., list[str]], text: str, message: str) -> None:
    assert problems(f"data: {text if text.startswith('{') else '{' + text + '}'}") == [message]


def test_options_are_written_out_and_read_again(load: Load) -> None:
    config = load("data: {transforms: [{name: random_resized_crop, scale: [0.2, 1]}, {name: horizontal_flip}]}")
    data = config.to_dict()["data"]
    assert data["transforms"] == [
        {"name": "random_resized_crop", "scale": [0.2, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "bilinear"},
        {"name": "horizontal_flip", "p": 0.5},
    ]
    assert config_from_dict(config.to_dict()) == config


def test_the_default_is_the_released_crop(load: Load) -> None:
    config = load("")
    crop = RandomResizedCrop(image_size=(8, 8))
    released = {"name": "random_resized_crop", "scale": crop.scale, "ratio": crop.ratio, "interpolation": "bilinear"}
    assert config.data.transforms == (released,)
    assert config_from_dict(config.to_dict()) == config
    assert load("data: {transforms: null}") == config
