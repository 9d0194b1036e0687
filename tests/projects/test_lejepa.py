"""LeJEPA: SIGReg and the whole loss against recorded numbers; I-JEPA with SIGReg is I-JEPA but for two slots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regulariser_recordings as recordings

from jepa_kit.config import load_config
from projects.lejepa.check import main

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "methods" / "sigreg"


def test_recorded_numbers(capsys):
    assert main([str(FIXTURE), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    assert all(quantity in printed for quantity in ("weights", "call2/per_slice", "call1/gradient", "lejepa: gradient"))
    assert "not read" not in printed


def test_other_settings_and_a_wrong_one(tmp_path):
    path = recordings.sigreg(tmp_path / "other")
    assert main([str(path), "--tolerance", "1e-12"]) == 0
    content = json.loads(path.with_suffix(".json").read_text())
    content["meta"]["lamb"] = 0.2
    path.with_suffix(".json").write_text(json.dumps(content))
    assert main([str(path)]) == 1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("ijepa_sigreg_in1k_vitb16", "in1k_vitb16"), ("ijepa_sigreg_quick", "quickstart")],
)
def test_sigreg_replaces_the_moving_average_and_nothing_else(ours, theirs):
    mine = load_config(ROOT / f"projects/lejepa/configs/{ours}.yaml").to_dict()
    base = load_config(ROOT / f"projects/ijepa/configs/{theirs}.yaml").to_dict()
    assert mine["target_update"] == {"name": "tied", "stop_gradient": True}
    distance, regulariser = mine["loss"]
    assert distance == base["loss"]
    assert (regulariser["name"], regulariser["of"], regulariser["projector"]) == ("sigreg", "context", None)
    for config in (mine, base):
        del config["loss"], config["target_update"], config["train"]["output_dir"]
        if theirs == "quickstart":
            del config["train"]["epochs"], config["data"]["shards"]
    assert mine == base


def test_the_weights_add_up_to_one():
    for name in ("in1k_vits16", "quick"):
        config = load_config(ROOT / f"projects/lejepa/configs/{name}.yaml")
        assert sum(weight for _, weight in config.losses) == pytest.approx(1)
        assert "target_update" not in config.slots
