"""Figures are drawn by Agg, whatever MPLBACKEND is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, sys
from jepa_kit.plotting import Figure, matplotlib, save_figure
figure = Figure()
figure.subplots().plot([1, 2])
path = save_figure(figure, sys.argv[1], dpi=50)
assert path.read_bytes().startswith(b"\\x89PNG")
assert os.environ["MPLBACKEND"] == sys.argv[2]
print(matplotlib.rcParams._get("backend"))
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("backend", "kept"), [("module://no_such_package.backend", True), ("svg", True), ("nonsense", False)]
)
def test_any_backend(backend, kept, tmp_path):
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.png"), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == backend) == kept  # what the user asked for, if matplotlib knows it


def test_matplotlib_is_imported_in_one_place():
    found = {
        str(file.relative_to(ROOT))
        for folder in ("jepa_kit", "tools", "projects", "dev", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        if any(
            line.split()[:2] in (["import", "matplotlib"],) or line.strip().startswith("from matplotlib")
            for line in file.read_text().splitlines()
        )
    }
    assert found == {"jepa_kit/plotting.py"}
