"""The wheel outside a clone: tools as modules, configs by name, and commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

import jepa_kit

ROOT = Path(__file__).resolve().parents[2]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy, so that the clone gets no build folder."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("jepa_kit", "projects", "reference"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", copy / "out", copy)
    (found,) = (copy / "out").glob("jepa_kit-*.whl")
    return found


@pytest.mark.slow
def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entries = ConfigParser()
        entries.read_string(archive.read(f"jepa_kit-{jepa_kit.__version__}.dist-info/entry_points.txt").decode())
    kinds = {".py", ".yaml", ".js"}
    files = [f for top in ("jepa_kit", "projects") for f in (ROOT / top).rglob("*.*") if f.suffix in kinds]
    in_wheel = {f.relative_to(ROOT).as_posix().replace("projects/", "jepa_kit/projects/", 1) for f in files}
    assert in_wheel <= names
    assert {f"jepa_kit/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / "reference").rglob("*.*")} <= names
    assert {name.split("/")[0] for name in names} == {"jepa_kit", f"jepa_kit-{jepa_kit.__version__}.dist-info"}
    commands = dict(entries["console_scripts"])
    assert len(commands) == len(list((ROOT / "tools").glob("*.py")))
    for command, value in commands.items():
        module, _, function = value.partition(":")
        assert command.startswith("jepa-")
        assert callable(getattr(import_module(module), function))


@pytest.mark.slow
def test_training_and_evaluation(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip("install", "--no-deps", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*words: str, status: int = 0) -> str:
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def tool(name: str, *words: str, status: int = 0) -> str:
        return run(sys.executable, "-m", f"jepa_kit.tools.{name}", *words, status=status)

    where = run(sys.executable, "-c", "import jepa_kit; print(jepa_kit.__file__)")
    assert where.strip() == str(site / "jepa_kit" / "__init__.py")
    assert "python -m jepa_kit.tools.train_net --config-file ijepa/NAME " in tool("train_net", "--help")
    assert run(str(site / "bin" / "jepa-train"), "--version") == f"jepa_kit {jepa_kit.__version__}\n"
    assert "or one of these names: beit/in1k_vitb16" in tool("train_net", "--config-file", "quick", status=2)
    for name, seed in (("train", "0"), ("val", "1")):
        tool("make_shards", "synthetic:scenes", f"shards/{name}", "--num-scenes", "64", "--seed", seed)
    words = ["data.shards=shards/train", "train.batch_size=32", "train.epochs=1", "optim.warmup_epochs=0"]
    small = ["encoder.depth=2", "predictor.depth=1", "train.device=cpu", "data.num_workers=0"]
    tool("train_net", "--config-file", "quickstart", "--output-dir", "run", *words, *small)
    assert len((here / "run" / "metrics.jsonl").read_text().splitlines()) >= 1
    table = tool("eval_net", "--checkpoint", "run", "--protocol", "knn", "--layers", "last", "--baselines", "none")
    assert "knn" in table
    code = "import jepa_kit as j; print(j.list_configs('ijepa/quick*'), len(j.evaluate('run', 'knn', baselines=[])))"
    assert run(sys.executable, "-c", code).endswith("['ijepa/quickstart'] 3\n")
    assert "usage" in run(sys.executable, "-m", "jepa_kit.projects.ijepa.quickstart", "--help")
    assert "usage" in run(sys.executable, "-m", "jepa_kit.projects.ijepa.check_parity", "--help")
