"""The configs and overrides that projects/ijepa/README.md names: each builds, with as many parameters as it says."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.from_config import build_masker, build_recipe

PROJECT = Path(__file__).parents[2] / "projects/ijepa"
README = (PROJECT / "README.md").read_text()

SHAPES = {
    "released_in1k_vith14": ((14, 1280, 32, 5120), (384, 12)),
    "released_in1k_vith16_448": ((16, 1280, 32, 5120), (384, 12)),
    "released_in22k_vith14": ((14, 1280, 32, 5120), (384, 12)),
    "released_in22k_vitg16": ((16, 1408, 40, 6144), (384, 16)),
    "in1k_vitl16": ((16, 1024, 24, 4096), (384, 12)),
    "in1k_vitb16": ((16, 768, 12, 3072), (384, 6)),
    "in1k_vits16": ((16, 384, 12, 1536), (384, 6)),
    "own_images_small": ((16, 384, 12, 1536), (384, 6)),
    "corrected_in1k_vitb16": ((16, 768, 12, 3072), (384, 6)),
    "hearsay_vitb16": ((16, 768, 12, 3072), (768, 4)),
    "cifar10_vit4": ((4, 192, 6, 768), (96, 3)),
    "cifar10_quick": ((4, 96, 4, 384), (48, 2)),
    "quickstart": ((8, 96, 4, 384), (48, 2)),
}
"""Config -> the encoder's patch size, width, blocks and MLP, and the predictor's width and blocks (MLP 4 widths)."""


def blocks(width: int, depth: int, hidden: int) -> int:
    """Parameters of so many blocks and a last norm: two norms, q, k, v and the projection, two maps of the MLP."""
    attention = 4 * (width * width + width)
    mlp = 2 * width * hidden + hidden + width
    return depth * (4 * width + attention + mlp) + 2 * width


def overrides() -> list[list[str]]:
    """What the lines of "Ablations are overrides" change, each in the config that its first command names."""
    block = README.partition("## Ablations are overrides")[2].partition("\n## ")[0]
    lines = [line.strip() for line in block.replace("\\\n", "").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith(("...", "python"))]
    assert len(commands) > 15
    return [[word for word in words if "=" in word] for words in commands]


@pytest.mark.parametrize("changes", overrides(), ids=" ".join)
def test_every_override_of_the_readme_builds(changes: list[str]) -> None:
    config = load_config(PROJECT / "configs/in1k_vitb16.yaml", changes)
    build_masker(config)
    with torch.device("meta"):
        build_recipe(config)


def test_every_config_is_counted() -> None:
    assert set(SHAPES) == {file.stem for file in (PROJECT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("stem", SHAPES)
def test_parameters_are_those_of_the_shapes_and_of_the_readme(stem: str) -> None:
    (patch, width, depth, hidden), (own, own_depth) = SHAPES[stem]
    encoder = 3 * patch * patch * width + width + blocks(width, depth, hidden)
    maps = width * own + own + own * width + width  # from the encoder's width and back
    predictor = maps + own + blocks(own, own_depth, 4 * own)  # and a mask token
    config = load_config(PROJECT / f"configs/{stem}.yaml")
    encoder += width * config.slots["encoder"].options["mask_token"]
    with torch.device("meta"):
        jepa = build_recipe(config)
    assert [sum(p.numel() for p in net.parameters()) for net in (jepa.encoder, jepa.predictor)] == [encoder, predictor]
    row = next(line for line in README.splitlines() if line.startswith(f"| [{stem}]"))
    assert f"| {encoder / 1e6:.1f} M / {predictor / 1e6:.1f} M |" in row
