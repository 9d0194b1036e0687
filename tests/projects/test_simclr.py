"""SimCLR against recorded numbers of two other implementations, and against plain maths."""

from __future__ import annotations

import json
from pathlib import Path

import contrast_recordings as recordings
import pytest
import torch

from jepa_kit.encoders import ViT
from jepa_kit.heads import MLPHead
from jepa_kit.structures import View
from projects.simclr.check import main
from projects.simclr.recipe import SimCLR

FIXTURE = Path(__file__).parents[1] / "fixtures" / "methods" / "simclr"


def recipe(temperature: float = 0.5) -> SimCLR:
    torch.manual_seed(0)
    encoder = ViT(image_size=(8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=2, class_token=True)
    return SimCLR(encoder=encoder, head=MLPHead(in_dim=8, hidden=6, out_dim=5), temperature=temperature)


def views(*sizes: int) -> list[View]:
    return [View(torch.randn(3, 3, s, s, generator=torch.Generator().manual_seed(k))) for k, s in enumerate(sizes)]


def test_recorded_numbers(capsys):
    assert main([str(FIXTURE), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    assert all(quantity in printed for quantity in ("2 views: loss", "3 views: gradient"))
    assert "not read" not in printed


def test_other_settings_and_a_wrong_one(tmp_path):
    path = recordings.simclr(tmp_path / "other")
    assert main([str(path), "--tolerance", "1e-12"]) == 0
    meta = {"meta": {"batch_size": 3, "temperature": 0.4}}
    path.with_suffix(".json").write_text(json.dumps(meta))
    assert main([str(path)]) == 1


def test_rows_that_are_no_views(tmp_path, capsys):
    path = recordings.simclr(tmp_path / "other")
    path.with_suffix(".json").write_text(json.dumps({"meta": {"batch_size": 4, "temperature": 0.5}}))
    assert main([str(path)]) == 2
    assert "z has 6 rows, which is no multiple of batch_size (=4)" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(8, 8), (8, 4, 8)])
def test_the_loss_of_views_is_that_of_their_class_tokens_projections(sizes):
    simclr = recipe()
    images = views(*sizes)
    out = simclr(*images)
    tokens = [simclr.encoder.forward_tokens(view.images)[0].prefix[:, 0] for view in images]
    wanted = recordings.nt_xent(simclr.head(torch.cat(tokens)), 3, 0.5)
    torch.testing.assert_close(out.loss, wanted)
    assert out.terms == {"nt_xent": out.loss}
    out.loss.backward()
    for module in (simclr.encoder.patch_embed, simclr.head):
        assert all(p.grad.any() for p in module.parameters())


def test_half_precision_does_not_round_the_cosines():
    simclr = recipe(temperature=0.01)
    z = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = simclr.nt_xent(z, 2)
    torch.testing.assert_close(rounded, simclr.nt_xent(z, 2), rtol=0, atol=0)


def test_temperature_of_zero():
    with pytest.raises(ValueError, match=r"temperature \(=0.0\) must be above 0"):
        recipe(temperature=0.0)
