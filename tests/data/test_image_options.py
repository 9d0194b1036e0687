"""ImageOptions: ranges, and values from a config."""

import pytest

from jepa_kit.config import DataConfig
from jepa_kit.data.image_options import ImageOptions


def test_options_of_a_config():
    data = DataConfig(image_size=(24, 16), decoder="fast", max_pixels=999, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    options = ImageOptions.from_config(data, batch_size=3, num_workers=1, precision="bf16")
    assert vars(options) == {
        "image_size": (24, 16),
        "batch_size": 3,
        "num_workers": 1,
        "decoder": "fast",
        "max_pixels": 999,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "precision": "bf16",
    }


def test_defaults_are_those_of_a_config():
    assert ImageOptions(image_size=(8, 8)) == ImageOptions.from_config(DataConfig(image_size=(8, 8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size (=0) must be at least 1"),
        ({"num_workers": -1}, "num_workers (=-1) must be at least 0"),
        ({"precision": "fp16"}, "precision (='fp16') must be one of 'float32', 'tf32', 'bf16'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError) as error:
        ImageOptions(image_size=(8, 8), **options)
    assert str(error.value) == message
