"""Small encoders in every format, made from the fixture in the released layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jepa_kit.config import config_from_dict
from jepa_kit.interop.formats import convert
from jepa_kit.interop.weights import Architecture, EncoderWeights, Provenance

HEADS = 4
"""Of the fixture; its width and depth are no known size's."""

NAMES = {
    "official": "a.pth.tar",
    "jepa_kit": "a.pt",
    "hf": "a",
    "timm": "a.timm.safetensors",
    "safetensors": "a.safetensors",
    "onnx": "a.onnx",
}


@pytest.fixture(scope="session")
def released(fixtures):
    return fixtures / "released_layout.pth.tar"


@pytest.fixture(scope="session")
def recorded(fixtures):
    """Images and masks, and what encoder, target encoder and predictor of the release give."""
    return load_file(fixtures / "released_layout_outputs.safetensors")


@pytest.fixture(scope="session")
def converted(released, tmp_path_factory):
    """Format -> a file with the target encoder of the fixture (official and jepa_kit: with all parts)."""
    folder = tmp_path_factory.mktemp("formats")
    for format, name in NAMES.items():
        convert(released, folder / name, to=format, num_heads=HEADS)
    return {format: folder / name for format, name in NAMES.items()}


@pytest.fixture
def make_weights():
    """An encoder with random weights: every norm and bias too, so that a swapped or dropped one shows."""

    def make(seed=0, encoder="target", dtype=torch.float32, licence=None, **sizes) -> EncoderWeights:
        shape = {
            "image_size": (32, 32),
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "mlp_hidden": 40,
            **sizes,
        }
        architecture = Architecture(**shape)
        random = torch.Generator().manual_seed(seed)
        state = {
            name: torch.randn(value.shape, generator=random).mul(0.3).to(dtype)
            for name, value in architecture.build().state_dict().items()
        }
        provenance = Provenance(encoder=encoder, source="a test", step=3, licence=licence)
        return EncoderWeights(state=state, architecture=architecture, provenance=provenance)

    return make


@pytest.fixture
def released_content(released):
    """What the fixture holds, to be changed."""
    return torch.load(released, weights_only=True)


@pytest.fixture
def saved(tmp_path):
    """Saves a content with torch; the path."""

    def save(content, name="changed.pth.tar") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def tiny(shards, tmp_path_factory):
    """Makes the config of a run of 6 steps of 4 images that takes a second; each has a folder of its own."""

    def make(*overrides):
        raw = {
            "masker": {"name": "multiblock"},
            "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
            "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
            "target": {"name": "representation"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema", "momentum": [0.9, 1.0]},
            "data": {"image_size": 16, "num_workers": 0, "shards": str(shards)},
            "optim": {"warmup_epochs": 1},
            "train": {
                "batch_size": 4,
                "epochs": 2,
                "steps_per_epoch": 3,
                "precision": "float32",
                "log_every": 1,
                "device": "cpu",
                "output_dir": str(tmp_path_factory.mktemp("run")),
            },
        }
        return config_from_dict(raw, overrides)

    return make
