"""VISReg against recorded numbers of the released code, and against plain maths."""

from __future__ import annotations

import json
from pathlib import Path

import regulariser_recordings as recordings

from projects.visreg.check import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "methods" / "visreg"


def test_recorded_numbers(capsys):
    assert main([str(FIXTURE), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    assert all(quantity in printed for quantity in ("quantiles", "scale", "shape", "centre", "training: gradient"))
    unread = printed.partition("not read: ")[2].split("\n")[0].split(", ")
    assert all(name.split("/")[0] not in ("z", "full", "directions") for name in unread)


def test_other_settings_and_a_wrong_one(tmp_path):
    path = recordings.visreg(tmp_path / "other")
    assert main([str(path), "--tolerance", "1e-12"]) == 0
    content = json.loads(path.with_suffix(".json").read_text())
    content["meta"]["n_global"] = 3
    path.with_suffix(".json").write_text(json.dumps(content))
    assert main([str(path)]) == 1
