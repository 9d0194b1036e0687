"""Contenders of benchmarks/bench_step.py: all compute our loss from our weights."""

import sys
from pathlib import Path

import pytest
import torch

from jepa_kit.structures import View

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

STAND_IN = {
    "src/__init__.py": "",
    "src/models/__init__.py": "",
    "src/masks/__init__.py": "",
    "src/masks/utils.py": """
import torch
from plain import take

def apply_masks(x, masks):
    return torch.cat([take(x, m) for m in masks])
""",
    "src/models/vision_transformer.py": """
import torch
from torch import nn
from plain import Block, Encoder
from jepa_kit.encoders.positions import sincos_2d
from src.masks.utils import apply_masks

class ReleasedEncoder(Encoder):
    def forward(self, images, masks=None):
        return super().forward(images, None if masks is None else masks[0])

def vit_tiny(patch_size, img_size):
    side = img_size[0] // patch_size
    return ReleasedEncoder((side, side), patch_size, 192, 12, 3)

class Predictor(nn.Module):
    def __init__(self, num_patches, dim, width, depth, heads):
        super().__init__()
        side = int(num_patches**0.5)
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_2d(width, (side, side))[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, z, masks_enc, masks_pred):
        every = self.predictor_pos_embed.repeat(len(z), 1, 1)
        x = self.predictor_embed(z) + apply_masks(every, masks_enc)
        hidden = self.mask_token + apply_masks(every, masks_pred)
        x = torch.cat([x.repeat(len(masks_pred), 1, 1), hidden], dim=1)
        for block in self.predictor_blocks:
            x = block(x, None)
        return self.predictor_proj(self.predictor_norm(x[:, z.shape[1]:]))

def vit_predictor(num_patches, embed_dim, predictor_embed_dim, depth, num_heads):
    return Predictor(num_patches, embed_dim, predictor_embed_dim, depth, num_heads)
""",
}


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import steps

    return steps


def setting(steps, masks):
    return steps.Setting("tiny", 96, 16, 2, masks, "float32", "cpu", "auto", 1)


def ours_and_masks(steps, masks):
    s = setting(steps, masks)
    ours, drawn = steps.make_ours(s), next(steps.make_masks(s))
    with torch.no_grad():
        return s, ours, drawn, ours(View(steps.make_images(s), drawn)).loss


@pytest.mark.parametrize("masks", ["uniform", "ragged"])
@pytest.mark.parametrize("explicit", [True, False])
def test_plain_code_and_its_release_mode(steps, masks, explicit):
    from plain_step import tables

    s, ours, drawn, loss = ours_and_masks(steps, masks)
    with torch.no_grad():
        plain = steps.make_plain(s, ours, explicit=explicit)(steps.make_images(s), *tables(drawn))
    torch.testing.assert_close(plain, loss, rtol=1e-5, atol=0)


def test_the_average_parameter_by_parameter(steps):
    from plain_step import average

    old, new = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * a.double() + 0.1 * b.double() for a, b in zip(old.parameters(), new.parameters(), strict=True)]
    average(old, new, 0.9)
    for a, b in zip(old.parameters(), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


def test_a_checkout_of_the_released_code(steps, tmp_path, monkeypatch):
    """The networks are a stand-in with the names and calls of the release."""
    from step_reference import Reference, uniform_masks

    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    s, ours, drawn, loss = ours_and_masks(steps, "uniform")
    reference = Reference(str(tmp_path), s, ours)
    with torch.no_grad():
        torch.testing.assert_close(reference(steps.make_images(s), *uniform_masks(drawn)), loss, rtol=1e-5, atol=0)
    assert not any(p.requires_grad for p in reference.target_encoder.parameters())


def test_what_is_no_checkout_or_no_uniform_set_is_refused(steps, tmp_path):
    from step_reference import Reference, uniform_masks

    s = setting(steps, "ragged")
    with pytest.raises(ValueError, match=r"no src/models/vision_transformer\.py: it must be a checkout"):
        Reference(str(tmp_path), s, steps.make_ours(s))
    with pytest.raises(ValueError, match="sets of one length: --masks uniform"):
        uniform_masks(next(steps.make_masks(s)))
