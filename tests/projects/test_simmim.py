"""SimMIM: the check of the project passes on the recording, sees faults, and configs have the paper's settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_kit.config import load_config
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.structures import View
from jepa_kit.trials.recorded import Recorded, Report
from projects.simmim import check

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/fixtures/methods/simmim"


def test_the_recording_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(FIXTURE), "--tolerance", "1e-11"]) == 0
    out = capsys.readouterr().out
    for quantity in ("masked patches", "encoder", "reconstruction", "loss", "gradients"):
        assert f"\n{quantity} " in out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-5, "encoder"),
        ("mask_ratio", 0.4, "masked patches"),
        ("mask_patch_size", 8, "masked patches"),
    ],
)
def test_another_setting_is_seen(tmp_path: Path, key: str, value: Any, failed: str) -> None:
    content = json.loads(FIXTURE.with_suffix(".json").read_text())
    assert key in content["meta"]
    content["meta"][key] = value
    (tmp_path / "other.json").write_text(json.dumps(content))
    shutil.copy(FIXTURE.with_suffix(".safetensors"), tmp_path / "other.safetensors")
    report = Report()
    check.check(Recorded(tmp_path / "other"), report)
    assert failed in report.failed


def test_positions_that_the_recording_lacks_are_an_error(tmp_path: Path) -> None:
    content = json.loads(FIXTURE.with_suffix(".json").read_text())
    content["meta"]["abs_pos"] = True
    (tmp_path / "other.json").write_text(json.dumps(content))
    shutil.copy(FIXTURE.with_suffix(".safetensors"), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor state/\.\.\. 'encoder\.pos_embed' beside"):
        check.check(Recorded(tmp_path / "other"), Report())


def test_the_check_builds_the_config_of_the_project() -> None:
    """Parts and options of the recording are those of in1k_vitb16.yaml, but for sizes and initial weights."""
    sizes = {"size", "patch_size", "embed_dim", "depth", "num_heads", "init", "mlp_ratio", "drop_path"}
    recording = check.config_of(Recorded(FIXTURE).meta)
    shipped = load_config(ROOT / "projects/simmim/configs/in1k_vitb16.yaml")
    for slot in set(shipped.slots) - {"masker"}:
        ours, other = (
            (config.slots[slot].name, {k: v for k, v in config.slots[slot].options.items() if k not in sizes})
            for config in (shipped, recording)
        )
        assert ours == other
    assert recording.losses == shipped.losses


def test_the_config_masks_squares_of_32_pixels() -> None:
    config = load_config(ROOT / "projects/simmim/configs/in1k_vitb16.yaml")
    masks = build_masker(config)(np.arange(4), seed=0, epoch=0)
    assert masks.targets.num_patches == 4 * 120  # 30 of 49 squares, 4 patches each
    hidden = masks.context.hidden
    assert hidden is not None
    squares = hidden.view(4, 7, 2, 7, 2).transpose(2, 3).reshape(4, 49, 4)
    assert torch.equal(squares.any(-1), squares.all(-1))


def test_the_config_has_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        recipe = build_recipe(load_config(ROOT / "projects/simmim/configs/in1k_vitb16.yaml"))
    d, bias = 768, 27 * 27 * 12 + 3 * 12
    blocks = 12 * (12 * d * d + 13 * d + 2 * d)  # and two scales a block
    encoder = 768 * d + d + blocks + 2 * d + bias + 2 * d  # class and mask token
    counts = [sum(p.numel() for p in net.parameters()) for net in (recipe.encoder, recipe.predictor)]
    assert counts == [encoder, d * 768 + 768]
    readme = (ROOT / "projects/simmim/README.md").read_text()
    assert f"| {counts[0] / 1e6:.1f} M / {counts[1] / 1e6:.1f} M |" in readme


def test_the_quick_config_learns_one_batch() -> None:
    config = load_config(ROOT / "projects/simmim/configs/quick.yaml")
    torch.manual_seed(0)
    recipe = build_recipe(config)
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 4, 4), size=(64, 64), mode="bilinear")
    view = View(images, build_masker(config)(np.arange(8), seed=0, epoch=0))
    optimizer = build_optimizer(recipe, betas=config.optim.betas)
    losses = [train_step(recipe, optimizer, Hyper(1e-3, 0.05, 1.0), [view]).loss.item() for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
