"""The quickstart on few scenes: its results, what it keeps and refuses, and how it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jepa_kit.config import load_config
from jepa_kit.engine.logging.curves import Beside, Panel, plot_curves
from jepa_kit.evaluation.features import load_run
from jepa_kit.evaluation.patch_codes import PatchOptions
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.tools import make_shards
from projects.ijepa import quickstart as quickstart_module
from projects.ijepa.quickstart import READ, main, make_data, margins, validation_parts

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


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a minute for the baseline, the choice of penalties and the page."""
    few = PatchOptions(side=8, stride=8, size=(64, 64), centroids=10)
    monkeypatch.setattr(PatchOptions, "for_images", lambda image_size: few)
    one_setting = {"penalties": [0.01], "cuts": [1e-3]}
    protocols = [one if isinstance(one, str) else {**one, **one_setting} for one in quickstart_module.PROTOCOLS]
    monkeypatch.setattr(quickstart_module, "PROTOCOLS", protocols)
    for name, value in (("PAGE_IMAGES", 32), ("DECODER_IMAGES", 32), ("DECODER_STEPS", 1)):
        monkeypatch.setattr(quickstart_module, name, value)


@pytest.mark.integration
@pytest.mark.usefixtures("_quick")
def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Beside] = []

    def plot_beside(run: Path, panels: Sequence[Panel], beside: Beside) -> Path | None:
        drawn.append(beside)
        return plot_curves(run, panels, beside)

    monkeypatch.setattr(quickstart_module, "plot_curves", plot_beside)
    # Options and overrides in any order.
    assert quickstart(tmp_path, TINY[0], *SMALL, *TINY[1:]) == 0
    printed = capsys.readouterr().out
    assert "frozen features on 64 test scenes" in printed
    assert "done: " in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    asked = {(r["network"], r["protocol"], r["options"]["pooling"], r["label"]) for r in rows}
    assert asked == {
        (network, *protocol, label)
        for network in ("target", "untrained", "pixels", "patches")
        for protocol in (("logistic", "mean"), ("logistic", "quarters"), ("knn", "mean"))
        for label in ("count", "distance", "shape")
    }
    widths = {(r["network"], r["pooling"]): r["width"] for r in rows if r["protocol"] == "logistic"}
    compared_alike = {"target": 4 * 24, "untrained": 4 * 24, "patches": 10}  # four layers, ten centroids
    for network, width in compared_alike.items():
        assert (widths[network, "mean"], widths[network, "quarters"]) == (width, 4 * width)
    for file, sentence in READ.items():
        assert (tmp_path / file).stat().st_size > 1000
        assert f"{tmp_path / file}\n      {sentence[:60]}" in printed
    lines = re.findall(r"^  .*: [+-]\d+\.\d ± .* against (untrained|pixels), .* against patches$", printed, re.M)
    assert len(lines) == 9
    (beside,) = drawn
    assert re.fullmatch(r"reference:ijepa_scenes, of [\d,]+ updates", beside.name)
    with Image.open(tmp_path / "patch_pca.png") as picture:
        assert picture.height / picture.width == pytest.approx(4 / 8, abs=0.1), "image, target, untrained, reference"
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


def test_the_reference_run(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_config("quickstart").data
    encoder = quickstart_module.reference(data)
    assert encoder is not None
    assert encoder.about.startswith("target encoder of reference:ijepa_scenes")
    assert quickstart_module.reference(replace(data, image_size=(32, 32))) is None, "it was trained on other images"
    assert quickstart_module.reference(replace(data, mean=(0.5, 0.5, 0.5))) is None
    monkeypatch.setattr(quickstart_module, "reference_names", list)
    assert quickstart_module.reference(data) is None, "it does not ship with jepa_kit"


@pytest.mark.integration
@pytest.mark.usefixtures("_quick")
def test_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last quarter of the training shards is left out of training, and the test shards of everything."""
    options = ["--num-scenes", "128", "--image-size", "64", "--samples-per-shard", "32"]
    assert make_shards.main(["synthetic:scenes", str(tmp_path / "shards/train"), *options]) == 0
    made = tmp_path / "shards/train", tmp_path / "nothing"
    monkeypatch.setattr(quickstart_module, "make_data", lambda *_, **__: made)
    monkeypatch.setattr(quickstart_module, "draw", lambda *_: None)
    monkeypatch.setattr(quickstart_module, "PROTOCOLS", ("knn",))
    assert quickstart(tmp_path, "--validation", *TINY) == 0
    printed = capsys.readouterr().out
    assert "frozen features on 32 validation scenes" in printed
    content = json.loads((tmp_path / "validation/results.json").read_text())
    assert content["data"]["test_samples_in_train"] == 0
    assert (content["data"]["train"]["samples"], content["data"]["test"]["samples"]) == (96, 32)
    run = load_run(tmp_path / "validation/run")
    assert run.data is not None
    assert (run.step, run.data["samples"]) == (3, 96)
    assert not (tmp_path / "results.json").exists()
    alone = tmp_path / "alone"
    assert make_shards.main(["synthetic:scenes", str(alone), "--num-scenes", "4", "--image-size", "16"]) == 0
    with pytest.raises(ValueError, match=r"^--validation needs at least 2 shards, and .*alone has 1: .* above that$"):
        validation_parts(alone)


def test_margins() -> None:
    def row(network: str, accuracy: float, label: str = "shape", **more: Any) -> Row:
        fixed: dict[str, Any] = dict.fromkeys(("layers", "pooling", "seed", "validation"))
        numbers = {"width": 1, "chance": 0.1, "classes": 8, "n_train": 9, "n_test": 9, "settings": {}}
        options = {"protocol": "knn", "standard_error": 0.03, "label": label, **more}
        return Row(network=network, accuracy=accuracy, **fixed, **numbers, **options)

    rows = [row("target", 0.5), row("untrained", 0.4), row("pixels", 0.45, standard_error=0.04), row("patches", 0.7)]
    others = [row(name, 0.9, variant="pooling=quarters") for name in ("target", "untrained", "pixels", "patches")]
    assert margins([*rows, *others])[0] == "knn, shape: +5.0 ± 5.0 against pixels, -20.0 ± 4.2 against patches"
    assert margins([*rows, *others])[1].startswith("knn pooling=quarters, shape: +0.0 ± 4.2 against untrained, ")


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
    metrics, end = tmp_path / "run/metrics.jsonl", time.monotonic() + 600

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
