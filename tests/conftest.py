"""What every test gets: one thread a process, plots without a display, repeatable hypothesis, skips without a GPU."""

from __future__ import annotations

import os

# Before torch is imported: two test processes with threads of their own each slow one another down on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]


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
