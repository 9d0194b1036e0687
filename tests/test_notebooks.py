"""The notebooks: they run, and what is committed has their outputs."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest
from test_repository import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Return the kinds of what each code cell shows: pictures, tables, text."""
    kinds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not [out for out in cell.outputs if out.output_type == "error"]
            kinds.append(sorted(kind for out in cell.outputs for kind in out.get("data", {})))
    return kinds


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_committed_notebook_has_its_outputs(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert any("image/png" in kinds for kinds in outputs(notebook))
    assert file.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # of the tests; with it, a kernel does not show what pyplot draws
    committed = nbformat.read(file, as_version=4)
    again = nbclient.execute(nbformat.read(file, as_version=4), cwd=str(tmp_path), kernel_name="python3", timeout=600)
    assert outputs(again) == outputs(committed)
