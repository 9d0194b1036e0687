"""tools/mask_report.py as a user meets it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "mask_report.py"

CONFIG = """\
masker: {name: multiblock, edges: released, truncation: released}
encoder: {name: vit, embed_dim: 16, depth: 1, num_heads: 2, patch_size: 4}
predictor: {name: vit, width: 8, depth: 1, num_heads: 2}
target: {name: representation}
loss: {name: smooth_l1}
target_update: {name: ema}
data: {image_size: 32}
"""


@pytest.fixture(scope="module")
def tool() -> Any:
    return importlib.import_module("jepa_kit.tools.mask_report")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    first, second = tmp_path / "released.yaml", tmp_path / "corrected.yaml"
    first.write_text(CONFIG)
    second.write_text("_BASE_: released.yaml\nmasker: {name: multiblock, edges: inclusive, truncation: none}\n")
    return str(first), str(second)


def test_two_side_by_side(tool: Any, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    few = ["--draws", "128", "--images-per-batch", "32", "--output-dir", str(out)]
    assert tool.main(["--config-file", files[0], "--compare", files[1], *few, "train.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "released: " in printed
    assert " ± " in next(line for line in printed.splitlines() if line.startswith("patches in a context  "))
    assert "patches in a target before truncation" in printed
    assert "never context and never target" in printed
    assert "corrected: no warnings" in printed
    content = json.loads((out / "mask_report.json").read_text())
    assert content["overrides"] == ["train.seed=3"]
    released, corrected = content["reports"]
    assert released["images"] == corrected["images"] == 128
    assert released["probability"]["context"]["by_row"][-1] == 0
    assert released["lengths"]["context"]["mean"] < released["lengths"]["context_before_truncation"]["mean"]
    assert corrected["warnings"] == []
    with Image.open(out / "mask_report.png") as picture:
        assert picture.width > 1500


def test_one_with_another_masker(tool: Any, files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ["--draws", "16", "--images-per-batch", "16", "--output-dir", str(out)]
    assert tool.main(["--config-file", files[1], *few, "masker={name: multigroup}"]) == 0
    (report,) = json.loads((out / "mask_report.json").read_text())["reports"]
    assert report["masker"]["num_targets"] == [8, 2]
    assert report["sets_per_image"] == {"context": 2.0, "target": 2.0}


def test_a_report_runs_no_command_of_its_config(
    tool: Any, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mark = tmp_path / "opened"
    few = ["--draws", "16", "--images-per-batch", "16", "--output-dir", str(tmp_path / "out")]
    assert tool.main(["--config-file", files[1], *few, f"data.shards='pipe:touch {mark}'"]) == 0
    assert not mark.exists()
    assert "note: the pictures show synthetic scenes: data.shards (='pipe:touch " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", "-3"], "--draws (=-3) must be at least 1"),
        (["--images-per-batch", "0"], "--images-per-batch (=0) must be at least 1"),
        (["masker.num_targets=0"], "num_targets (=0) must be at least 1"),
        (["masker={name: blok}"], "'blok' is not a registered masker"),
        (["data.shards=nowhere"], "nowhere"),
    ],
)
def test_mistakes_exit_with_2(
    tool: Any, files: tuple[str, str], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main(["--config-file", files[0], "--output-dir", str(tmp_path / "o"), "--draws", "8", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mask_report.py: ")
    assert message in told
