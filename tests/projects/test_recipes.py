"""Every project's small config trains, resumes bit for bit and is evaluated; the whole of dev/recipe_matrix.py is slow.

A new project is covered by its configs/quick.yaml alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import Recipe
from jepa_kit.planning.flops import count_flops
from jepa_kit.registry import RECIPES

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("recipe_matrix", ROOT / "dev" / "recipe_matrix.py")
matrix = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(matrix)
CONFIGS = matrix.quick_configs()
QUICK = ("core", "train", "resume", "telemetry", "eval_net")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards and runs of all projects."""
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_trains_resumes_and_is_evaluated(name, folder, monkeypatch):
    counted = []  # for one of its three runs

    def count_once(*arguments):
        counted or counted.append(count_flops(*arguments))
        return counted[0]

    monkeypatch.setattr("jepa_kit.planning.flops.count_flops", count_once)
    project = matrix.Project(name, CONFIGS[name], folder, steps=8)
    cells = matrix.trial(project, QUICK)
    assert isinstance(build_recipe(project.config("base")), Recipe)
    assert not [cell for cell in cells.items() if cell[1].startswith("no:")], cells


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_does_all_that_a_run_can_do(name, tmp_path):
    cells = matrix.trial(matrix.Project(name, CONFIGS[name], tmp_path), list(matrix.COLUMNS))
    print(matrix.table({name: cells}))
    assert not [cell for cell in cells.items() if cell[1].startswith("no:")], cells


def test_every_recipe_of_the_projects_has_a_small_config():
    modules = [p.parent.name for p in ROOT.glob("projects/*/recipe.py")]
    for name in modules:
        importlib.import_module(f"projects.{name}.recipe")
    for name in RECIPES.names():
        if RECIPES.get(name).__module__.startswith(("jepa_kit.", "projects.")):
            assert isinstance(RECIPES.get(name), type)
    assert set(modules) <= set(CONFIGS)
