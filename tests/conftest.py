"""What every test gets: one thread a process, plots without a display, repeatable hypothesis, skips without a GPU."""

from __future__ import annotations

import os

# Before torch is imported: two test processes with threads of their own each slow one another down on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("datasets", "hypothesis", "onnx", "onnxruntime", "scipy", "simplejpeg", "submitit", "transformers")
"""What a developer's environment has beside jepa_kit's own needs. A machine with a GPU may lack some of it: tests that
do without it run there all the same, and the rest is left out and named."""

if find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("repeatable")

LACKING = {name for name in OPTIONAL if find_spec(name) is None}
left_out: dict[str, set[str]] = {}


def imported(module: Path) -> set[str]:
    """Return the packages that a module, and those beside it that it imports, import at their top."""
    found = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    beside = [module.with_name(f"{name}.py") for name in found]
    return found.union(*(imported(other) for other in beside if other.exists()))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not LACKING or not collection_path.match("test_*.py"):
        return None
    lacking = LACKING & imported(collection_path)
    if lacking:
        left_out[str(collection_path.relative_to(ROOT))] = lacking
    return True if lacking else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out:
        lacking = ", ".join(sorted(set().union(*left_out.values())))
        terminalreporter.write_line(f"left out for lack of {lacking}: {', '.join(sorted(left_out))}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if not marks & {"integration", "slow", "gpu"}:
            item.add_marker(pytest.mark.unit)
        if "gpu" in marks and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of small files of numbers."""
    return ROOT / "tests" / "fixtures"
