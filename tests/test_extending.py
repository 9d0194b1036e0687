"""Every example of docs/extending.md is complete: it trains, and it fulfils the contract of its slot."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from jepa_kit.config import load_config
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.registry import RECIPES, SLOTS
from jepa_kit.tools import make_shards
from jepa_kit.training import train

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FILES: dict[str, str] = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
CONFIGS = [name for name in FILES if name.endswith(".yaml")]
SMALL = ["train.batch_size=8", "train.epochs=2", "train.steps_per_epoch=2", "train.log_every=1", "data.num_workers=0"]


def test_the_page_has_every_example():
    assert CONFIGS == ["base.yaml", "checkerboard.yaml", "spread.yaml", "mean_colour.yaml", "siamese.yaml"]
    assert {f"{Path(name).stem}.py" for name in CONFIGS[1:]} == FILES.keys() - set(CONFIGS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "train"
    assert make_shards.main(["synthetic:scenes", str(folder), "--num-scenes", "16", "--image-size", "64"]) == 0
    return folder


@pytest.fixture
def registries(monkeypatch):
    """What the examples register is gone after the test."""
    for registry in (RECIPES, *SLOTS.values()):
        registry.import_members()
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("registries")
def test_an_example_trains(name, shards, tmp_path):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    paths = [f"data.shards={shards}", f"train.output_dir={tmp_path / 'run'}", "train.device=cpu"]
    folder = train(load_config(tmp_path / name, [*SMALL, *paths, "train.precision=float32"]))
    losses = [line["loss"] for line in read_metrics(folder)]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
