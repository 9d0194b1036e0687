"""What every test gets: one thread a process, plots without a display, repeatable hypothesis, skips without a GPU."""

from __future__ import annotations

import os

# Before torch is imported: two test processes with threads of their own each slow one another down on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["no_proxy"] = "127.0.0.1"  # the servers of tests, where a proxy is set

import ast
import io
import subprocess
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import bare_runs, run_ranks, start_server

from jepa_kit.config import config_from_dict
from jepa_kit.data.shards.writing import Sample, write_index, write_shard
from jepa_kit.engine.estimate import estimate_step
from jepa_kit.engine.logging.curves import plot_curves
from jepa_kit.random_state import seeded

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "datasets",
    "hypothesis",
    "mkdocs",
    "onnx",
    "onnxruntime",
    "scipy",
    "simplejpeg",
    "submitit",
    "transformers",
)
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
        if marks & {"slow", "gpu"}:
            item.fixturenames.append("whole_runs")
        if "gpu" in marks and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random numbers of a test do not depend on those before it, which are others each time with several workers."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[None]:
    """Nor do those of a fixture that several tests share, and of the test that makes it."""
    if fixturedef.scope == "function":
        return (yield)
    with seeded(zlib.crc32(f"{request.node.nodeid} {fixturedef.argname}".encode())):
        return (yield)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def short_runs():
    """Runs do only what their numbers need, unless a test is slow, needs a GPU or asks for ``whole_runs``."""
    with pytest.MonkeyPatch.context() as patch:
        bare_runs(patch)
        yield


@pytest.fixture
def whole_runs(monkeypatch):
    """Runs of this test do all that those of users do."""
    monkeypatch.setattr("jepa_kit.engine.train.plot_curves", plot_curves)
    monkeypatch.setattr("jepa_kit.engine.train.estimate_step", estimate_step)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of small files of numbers."""
    return ROOT / "tests" / "fixtures"


@pytest.fixture
def torchrun(tmp_path):
    """Runs a script under torchrun, one thread each; fails with what the processes printed."""

    def run(processes, script, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, str(script), *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def rank_server():
    """Starts the process that ranks fork from."""
    start_server(ROOT)


@pytest.fixture
def ranks(rank_server, tmp_path, tmp_path_factory):
    """Runs a script as ``torchrun`` does, several times as fast; returns what the processes printed."""

    def run(processes, script, *arguments):
        return run_ranks(processes, script, arguments, tmp_path, tmp_path_factory.mktemp("ranks") / "printed.txt")

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """20 small images in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    parts = []
    for shard in range(2):
        samples = []
        for number in range(10):
            buffer = io.BytesIO()
            colours = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((24, 20)).save(buffer, "PNG")
            samples.append(Sample(f"{shard}-{number}", "png", buffer.getvalue()))
        parts.append(write_shard(str(folder / f"shard-{shard:06d}.tar"), samples))
    infos, rows = zip(*parts, strict=True)
    write_index(str(folder), infos, rows, classes={}, refused=[], made_by={})
    return folder


@pytest.fixture
def tiny(shards, tmp_path):
    """Makes the config of a run of 6 steps of 4 images that takes a second."""

    def make(*overrides):
        raw = {
            "masker": {"name": "multiblock"},
            "encoder": {
                "name": "vit",
                "embed_dim": 16,
                "depth": 2,
                "num_heads": 2,
                "patch_size": 4,
                "drop_path": 0.3,
            },
            "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
            "target": {"name": "representation"},
            "loss": [{"name": "smooth_l1"}, {"name": "cosine", "weight": 0.5}],
            "target_update": {"name": "ema", "momentum": [0.9, 1.0]},
            "data": {"image_size": 16, "num_workers": 0, "shards": str(shards)},
            "optim": {"warmup_epochs": 1},
            "train": {
                "batch_size": 4,
                "epochs": 2,
                "steps_per_epoch": 3,
                "precision": "float32",
                "log_every": 1,
                "device": "cpu",
                "output_dir": str(tmp_path / "run"),
            },
        }
        return config_from_dict(raw, overrides)

    return make
