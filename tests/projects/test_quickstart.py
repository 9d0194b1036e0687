"""The quickstart on few scenes: its results, what it keeps and refuses, and how it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jepa_kit.evaluation.patch_codes import PatchOptions
from projects.ijepa.quickstart import main, make_data

SMALL = ["--train-scenes", "96", "--test-scenes", "64"]
TINY = [
    "encoder.embed_dim=24",
    "predictor.width=24",
    "train.epochs=1",
    "train.batch_size=32",
    "train.precision=float32",
]


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests were started in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def quickstart(folder: Path, *arguments: str) -> int:
    return main(["--output-dir", str(folder), *arguments])


@pytest.mark.integration
def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = PatchOptions(side=8, stride=8, size=(64, 64), centroids=10)  # not a minute for the baseline
    monkeypatch.setattr(PatchOptions, "for_images", lambda image_size: few)
    # Options and overrides in any order.
    assert quickstart(tmp_path, TINY[0], *SMALL, *TINY[1:]) == 0
    printed = capsys.readouterr().out
    assert "frozen features on 64 test scenes" in printed
    assert "done: " in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    asked = {(r["network"], r["protocol"], r["label"]) for r in rows}
    assert asked == {
        (network, protocol, label)
        for network in ("target", "untrained", "pixels", "patches")
        for protocol in ("logistic", "knn")
        for label in ("count", "distance", "shape")
    }
    for file in ("masks.png", "patch_pca.png", "run/curves.png"):
        assert (tmp_path / file).stat().st_size > 1000
    assert len(list((tmp_path / "run").glob("checkpoint_*3.pt"))) == 1  # 96 scenes, 32 at a time
    # What is there is kept.
    index = tmp_path / "shards/train/index.json"
    before = index.stat().st_mtime_ns
    make_data(tmp_path / "shards", train_scenes=96, test_scenes=64, image_size=(64, 64))
    assert "shards/train is complete" in capsys.readouterr().out
    assert index.stat().st_mtime_ns == before
    # other scenes than those in the folder
    for arguments, message in (
        (
            ["--train-scenes", "97"],
            "shards/train has 96 scenes of 64x64, seed 0, not 97 scenes of 64x64, seed 0: remove",
        ),
        (["--test-scenes", "65"], "shards/test has 64 scenes of 64x64, seed 1000003, not 65 scenes of 64x64, seed"),
        (["data.image_size=96"], "shards/train has 96 scenes of 64x64, seed 0, not 96 scenes of 96x96, seed 0: remove"),
        (["data.image_size=[64,96]"], "shards/train has 96 scenes of 64x64, seed 0, not 96 scenes of 64x96, seed 0:"),
    ):
        assert quickstart(tmp_path, *SMALL, *TINY, *arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert "it, or give another --output-dir" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoder.depth=2"], "layers (='last4') needs 4 layers, but the encoder has 2"),
        (["encoder.num_heads=5"], "num_heads (=5) must divide the width (=96)"),
        (["train.epoch=1"], "train.epoch"),
        (["--train-scenes", "0"], "num_scenes (=0) must be at least 1"),
    ],
)
def test_refusals_come_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart(tmp_path / "q", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_trains(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, end = tmp_path / "run/metrics.jsonl", time.monotonic() + 60

    def stop() -> None:
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert quickstart(tmp_path, *SMALL, *TINY, "train.epochs=1000", "train.log_every=1") == 130
    thread.join()
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"quickstart: stopped after \d+ steps; the same command resumes", last)
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list((tmp_path / "run").glob("checkpoint_*.pt"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_renders(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("jepa_kit.tools.make_shards._make", stop)
    before = signal.getsignal(signal.SIGTERM)
    assert quickstart(tmp_path) == 130
    assert capsys.readouterr().err.splitlines() == ["make_shards: stopped; run the same command to resume"]
    assert signal.getsignal(signal.SIGTERM) == before
