"""Configs by name, and parts of projects, in a clone and in an installation without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_kit.config import load_config, shipped
from jepa_kit.config.shipped import find_config, shipped_configs
from jepa_kit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_every_config_of_a_project_has_a_name() -> None:
    files = {path.stem: path for path in ROOT.glob("projects/*/configs/*.yaml")}
    assert {"quickstart", "released_in1k_vith14"} <= files.keys()
    assert set(shipped_configs().values()) == set(ROOT.glob("projects/*/configs/*.yaml"))
    assert load_config("quickstart") == load_config("ijepa/quickstart") == load_config(files["quickstart"])


def test_names_that_two_projects_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/configs/base", "b/configs/base", "b/configs/other", "b/other/no"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").touch()
    monkeypatch.setattr(shipped, "PROJECTS", str(tmp_path))
    names = ("a/configs/base", "b/configs/base", "b/configs/other")
    assert shipped_configs() == dict(
        zip(("a/base", "b/base", "b/other"), (tmp_path / f"{n}.yaml" for n in names), strict=True)
    )
    for name, file in (("b/base", names[1]), ("other", names[2]), ("b/other", names[2])):
        assert find_config(name, "") == str(tmp_path / f"{file}.yaml")
    assert find_config("base", "") == "base"  # of which project?


def test_a_name_that_no_config_has() -> None:
    names = "does not exist; .*, or one of these names: .*ijepa/cifar10_quick, .*vjepa21/quick"
    for name, hint in (("unlike", ""), ("ijepa/in1k_vitb", r"; did you mean 'ijepa/in1k_vitb16'\?")):
        with pytest.raises(ConfigError, match=f"{name}' {names}{hint}$"):
            load_config(name)
    with pytest.raises(ConfigError, match=r"in1k_vitb.yaml' does not exist; a config is .* or a checkpoint$"):
        load_config("in1k_vitb.yaml")


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config("quickstart", ["train.seed=7"]).save(tmp_path)
    (tmp_path / "config.yaml").rename("quickstart")
    assert load_config("quickstart").train.seed == 7


def test_a_base_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("_BASE_: quickstart\ntrain: {seed: 7}\n")
    assert load_config(tmp_path / "mine.yaml") == load_config("quickstart", ["train.seed=7"])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with jepa_kit as in a wheel, and a project with two modules."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jepa_kit", tmp_path / "site" / "jepa_kit", ignore=without)
    project = tmp_path / "site" / "jepa_kit" / "projects" / "mine"
    (project / "configs").mkdir(parents=True)
    shutil.copy(ROOT / "projects/ijepa/configs/quickstart.yaml", project / "configs" / "base.yaml")
    (project / "configs" / "mine.yaml").write_text(
        "_BASE_: base\nimports: [projects.mine.masker]\nmasker: {name: mine}\n"
    )
    (project / "base.py").write_text("from jepa_kit.maskers import Random\n")
    (project / "masker.py").write_text(
        "from jepa_kit.registry import MASKERS\nfrom .base import Random\n"
        "@MASKERS.register('mine')\nclass Mine(Random):\n    pass\n"
    )
    return tmp_path / "site"


def run(site: Path, code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.integration
def test_parts_of_a_project_without_a_clone(site: Path, tmp_path: Path) -> None:
    code = """
from jepa_kit.config import config_from_dict, load_config
from jepa_kit.config.imports import find_source, ships_with_project
from jepa_kit.registry import MASKERS
config = load_config("mine")
print(config.imports, MASKERS.get("mine").__module__, find_source("projects.mine.masker").name)
assert config_from_dict(config.to_dict(), trust_imports=False) == config
print([ships_with_project(name) for name in ("projects.mine.masker", "projects.mine.other", "projects.foreign")])
"""
    (site / "projects").mkdir()  # of another package
    (site / "projects" / "foreign.py").touch()
    assert run(site, code, tmp_path).splitlines() == [
        "('projects.mine.masker',) jepa_kit.projects.mine.masker masker.py",
        "[True, False, False]",
    ]
    (site / "projects" / "mine").mkdir()
    (site / "projects" / "mine" / "masker.py").touch()  # it would be imported
    printed = run(
        site,
        "from jepa_kit.config.imports import ships_with_project; print(ships_with_project('projects.mine.masker'))",
        tmp_path,
    )
    assert printed == "False\n"
