"""MAE: the check of the project passes on the recording, sees faults, and configs have the paper's settings."""

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
from projects.mae import check

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/fixtures/methods/mae"


def test_the_recording_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(FIXTURE)]) == 0
    out = capsys.readouterr().out
    assert "not read" not in out
    for quantity in ("class token", "encoder", "target", "prediction", "loss", "gradients", "losses", "final weights"):
        assert f"\n{quantity} " in out


def test_differences_are_those_of_rounding() -> None:
    report = Report()
    check.check(Recorded(FIXTURE), report)
    assert max(largest for name, largest, _, _ in report.rows if name != "position tables") < 1e-9


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-5, "encoder"),
        ("norm_pix_loss", False, "target"),
        ("num_heads", 2, "encoder"),
        ("decoder_num_heads", 2, "prediction"),
        ("warmup_epochs", 2, "learning rates"),
        ("weight_decay", 0.5, "final weights"),
        ("no_weight_decay", ["cls_token"], "weight decay"),
        ("optimizer", "AdamW(betas=(0.9,0.99), eps=1e-8)", "losses"),
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


def test_an_optimizer_without_betas_is_refused(tmp_path: Path) -> None:
    meta = json.loads(FIXTURE.with_suffix(".json").read_text())["meta"]
    with pytest.raises(ValueError, match=r"optimizer \(='SGD'\) of the recording must begin AdamW"):
        check.config_of({**meta, "optimizer": "SGD"})


def test_the_check_builds_the_config_of_the_project() -> None:
    """Parts and options of the recording are those of in1k_vitb16.yaml, but for sizes and initial weights."""
    sizes = {"size", "patch_size", "embed_dim", "width", "depth", "num_heads", "init", "mlp_ratio"}
    recording = check.config_of(Recorded(FIXTURE).meta)
    shipped = load_config(ROOT / "projects/mae/configs/in1k_vitb16.yaml")
    for slot, part in shipped.slots.items():
        other = recording.slots[slot]
        assert part.name == other.name
        assert {k: v for k, v in part.options.items() if k not in sizes} == {
            k: v for k, v in other.options.items() if k not in sizes
        }
    assert recording.losses == shipped.losses
    for key in ("counting", "betas", "weight_decay", "start_lr", "final_lr", "clip_grad"):
        assert getattr(recording.optim, key) == getattr(shipped.optim, key)


def test_the_config_has_the_sizes_of_the_paper() -> None:
    config = load_config(ROOT / "projects/mae/configs/in1k_vitb16.yaml")
    with torch.device("meta"):
        recipe = build_recipe(config)
    masker = build_masker(config)
    assert masker(np.zeros(1, dtype=int), seed=0, epoch=0).context.num_patches == 49
    counts = [sum(p.numel() for p in net.parameters()) for net in (recipe.encoder, recipe.predictor)]
    # the released checkpoint has 111,907,840 numbers, of which 197 * (768 + 512) are position tables
    assert sum(counts) == 111_907_840 - 197 * (768 + 512)
    readme = (ROOT / "projects/mae/README.md").read_text()
    assert f"| {counts[0] / 1e6:.1f} M / {counts[1] / 1e6:.1f} M |" in readme


def test_the_quick_config_learns_one_batch() -> None:
    config = load_config(ROOT / "projects/mae/configs/quick.yaml")
    torch.manual_seed(0)
    recipe = build_recipe(config)
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 4, 4), size=(64, 64), mode="bilinear")
    view = View(images, build_masker(config)(np.arange(8), seed=0, epoch=0))
    optimizer = build_optimizer(recipe, betas=config.optim.betas)
    losses = [train_step(recipe, optimizer, Hyper(1e-3, 0.05, 1.0), [view]).loss.item() for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
