"""The figures of the README: they are small, and the masks in them are masks that I-JEPA allows."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

DEV = Path(__file__).parents[2] / "dev"


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEV))
    return importlib.import_module("draw_figure")


def test_the_figure_is_drawn(figure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ijepa.png"
    monkeypatch.setattr(sys, "argv", ["draw_figure.py", str(path)])
    assert figure.main() == 0
    assert path.stat().st_size < 150_000
    picture = Image.open(path).convert("RGBA")
    assert picture.getpixel((0, 0))[3] == 0, "outside the round corners it is transparent, for dark pages"
    assert min(picture.getpixel((picture.width // 2, 12))) > 240, "and the card is light"
    colours = np.unique(np.asarray(picture.convert("RGB").resize((160, 80))).reshape(-1, 3), axis=0)
    assert len(colours) > 1000, "with a picture on it"


def test_the_context_has_no_patch_of_a_target(figure: ModuleType) -> None:
    sample = figure.Sample()
    targets = [{(t + r, x + c) for r in range(h) for c in range(w)} for t, x, h, w in sample.blocks]
    assert len(targets) == 4
    assert not set.union(*targets) & sample.context
    assert all(0 <= row < 14 and 0 <= column < 14 for row, column in set.union(*targets))


@pytest.mark.parametrize("encoders", [2, 3])
def test_the_strip_of_a_quickstart_is_drawn(
    figure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoders: int
) -> None:
    """With the features of a run and of an untrained network, and with those of a reference run too."""
    random = np.random.default_rng(0)
    noise = {}
    for name, rows in (("masks.png", 2), ("patch_pca.png", 1 + encoders)):
        picture = np.full((200 * rows + 40, 1560, 3), 255, dtype=np.uint8)
        picture[5:20, 700:900:3] = 0  # a heading
        noise[name] = random.integers(0, 255, (rows, 8, 150, 150, 3), dtype=np.uint8)
        for row, column in np.ndindex(rows, 8):
            y, x = 40 + 200 * row, 30 + 190 * column
            picture[y : y + 150, x : x + 150] = noise[name][row, column]
            picture[y + 160 : y + 170, x : x + 100 : 4] = 0  # a caption
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 9, "loss": 0.5}\n')
    rows = [
        {"protocol": "logistic", "network": network, "label": label, "accuracy": 0.5, "chance": 0.1}
        | {"options": {"pooling": "mean"}}
        for network in ("target", "untrained", "pixels", "patches")
        for label in ("count", "distance", "shape")
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    path = tmp_path / "strip.png"
    monkeypatch.setattr(sys, "argv", ["draw_quickstart.py", str(tmp_path), str(path)])
    strip = importlib.import_module("draw_quickstart")
    assert strip.main() == 0
    assert Image.open(path).size == (1600, 376)
    for name, panels in noise.items():
        assert np.array_equal(np.array(strip.panels(tmp_path / name)), panels)
    monkeypatch.setattr(sys, "argv", ["draw_quickstart.py", str(tmp_path), str(path), "--pooling", "quarters"])
    with pytest.raises(SystemExit, match=r"results.json has no rows of the protocol logistic with pooling 'quarters'"):
        strip.main()
