"""dev/make_reference.py: from a finished run and its evaluation to a run that others load by name."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import jepa_kit
from jepa_kit.config import config_from_dict, load_config, shipped
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.errors import CheckpointError
from jepa_kit.evaluation.features import load_run
from jepa_kit.evaluation.patch_codes import PatchOptions
from jepa_kit.evaluation.tables.cost import cost_of
from jepa_kit.evaluation.tables.runs import load
from jepa_kit.tools import compare, eval_net, health, make_shards
from jepa_kit.training import train

DEV = Path(__file__).parents[2] / "dev"
CONFIG: dict[str, Any] = {
    "masker": {"name": "random", "ratio": 0.6},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
    "data": {"image_size": 16, "num_workers": 0},
    "optim": {"warmup_epochs": 0},
    "train": {"batch_size": 32, "epochs": 1, "precision": "float32", "device": "cpu", "log_every": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps; its results are evaluation.json beside it."""
    above = tmp_path_factory.mktemp("run")
    for name, (count, seed) in {"train": (96, 0), "test": (32, 1)}.items():
        options = ["--num-scenes", str(count), "--image-size", "16", "--seed", str(seed)]
        assert make_shards.main(["synthetic:scenes", str(above / "scenes" / name), *options]) == 0
    config = CONFIG | {
        "data": CONFIG["data"] | {"shards": str(above / "scenes/train")},
        "train": CONFIG["train"] | {"output_dir": str(above / "run")},
    }
    train(config_from_dict(config))
    with pytest.MonkeyPatch.context() as patched:
        few = PatchOptions(side=4, stride=4, size=(16, 16), centroids=4)
        patched.setattr(PatchOptions, "for_images", lambda image_size: few)
        output = ["--output", str(above / "evaluation.json")]
        assert eval_net.main(["--checkpoint", str(above / "run"), "--protocol", "knn", *output]) == 0
    return above / "run"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(DEV))
        return importlib.import_module("make_reference")


def words(run: Path, references: Path, *more: str, name: str = "ijepa_tiny") -> list[str]:
    """The command line of the tool."""
    fixed = [
        "--name",
        name,
        "--data",
        "python tools/make_shards.py synthetic:scenes scenes/train",
        "--machine",
        "a test",
    ]
    results = [] if "--evaluation" in more else ["--evaluation", str(run.parent / "evaluation.json")]
    return [str(run), *fixed, *results, "--output", str(references), *more]


@pytest.fixture(scope="module")
def references(tool: ModuleType, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ijepa_tiny, which was made from the run."""
    folder = tmp_path_factory.mktemp("references")
    assert tool.main(words(run, folder)) == 0
    return folder


@pytest.fixture(autouse=True)
def _found_by_name(references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "REFERENCES", str(references))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.integration
def test_the_files_of_a_run(tool: ModuleType, run: Path, references: Path, tmp_path: Path) -> None:
    first = contents(references / "ijepa_tiny")
    files = ["README.md", "config.yaml", "curves.png", "metrics.jsonl", "results.json", "weights.safetensors"]
    assert list(first) == files
    assert tool.main(words(run, tmp_path)) == 0
    assert contents(tmp_path / "ijepa_tiny") == first, "the same run gives the same bytes"
    for name, content in first.items():
        assert str(run.parent).encode() not in content, f"{name} names a folder of this machine"
    card = first["README.md"].decode()
    for text in ("| machine | a test; 1 thread |", "| hours | ", "| knn      | target encoder |", "chance"):
        assert text in card
    assert "| updates | 3 of 32 images, 1 epochs |" in card


@pytest.mark.integration
def test_a_run_is_loaded_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for which in ("target", "context"):
        own, kept = (jepa_kit.load_encoder(place, which) for place in (run, "reference:ijepa_tiny"))
        wanted, found = (one.embed(one.preprocess(images)) for one in (own, kept))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)  # values of order 1, 2**-11 in float16
        assert not torch.equal(found, wanted), "float16 rounds"
    assert kept.about.startswith("context encoder of reference:ijepa_tiny (jepa_kit); ViT of width 16")
    assert kept.provenance.licence == "Apache-2.0"

    own_run, kept_run = load_run(run), load_run("reference:ijepa_tiny")
    assert kept_run.step == own_run.step == 3
    for name, value in own_run.jepa.state_dict().items():
        torch.testing.assert_close(kept_run.jepa.state_dict()[name], value, rtol=2**-11, atol=2**-24)
    config = load_config("reference:ijepa_tiny")
    assert (config.data.shards, config.train.output_dir) == ("scenes/train", "output/ijepa_tiny")

    capsys.readouterr()
    shards = ["--shards", str(run.parent / "scenes/test")]
    assert health.main(["--checkpoint", "reference:ijepa_tiny", "--images", "32", *shards]) == 0
    assert "reference:ijepa_tiny, step 3: " in capsys.readouterr().out
    assert compare.main(["reference:ijepa_tiny", str(run.parent / "evaluation.json")]) == 0, "a line for each"
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| ijepa_tiny")
    assert lines[2].split("|")[3:] == lines[3].split("|")[3:], "with the same figures"


@pytest.mark.integration
def test_tools_do_not_write_into_it(
    run: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(references / "ijepa_tiny")
    train_shards = ["--train-shards", str(run.parent / "scenes/train")]
    evaluation = ["--checkpoint", "reference:ijepa_tiny", "--protocol", "knn", "--baselines", "none", *train_shards]
    assert eval_net.main(evaluation) == 2
    refused = "--output must name a file: --checkpoint (='reference:ijepa_tiny') is not in a folder of yours"
    assert refused in capsys.readouterr().err
    assert eval_net.main([*evaluation, "--output", str(tmp_path / "own.json")]) == 0
    content = json.loads((tmp_path / "own.json").read_text())
    assert content["checkpoint"]["file"] == "reference:ijepa_tiny (weights.safetensors)"
    assert len(content["rows"]) == 3
    visualize = importlib.import_module("jepa_kit.tools.visualize")
    assert visualize.main(["--checkpoint", "reference:ijepa_tiny"]) == 2
    assert "--output must name a folder: " in capsys.readouterr().err
    assert contents(references / "ijepa_tiny") == before


@pytest.mark.integration
def test_the_encoder_alone(
    tool: ModuleType, run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = jepa_kit.load_encoder("reference:ijepa_tiny")
    assert tool.main(words(run, tmp_path, "--encoder-only")) == 0
    monkeypatch.setattr(shipped, "REFERENCES", str(tmp_path))
    alone = jepa_kit.load_encoder("reference:ijepa_tiny")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), encoder.parameters(), strict=True))
    own, whole = (folder / "ijepa_tiny/weights.safetensors" for folder in (tmp_path, references))
    assert own.stat().st_size < 0.6 * whole.stat().st_size
    assert "the evaluated encoder alone" in (tmp_path / "ijepa_tiny/README.md").read_text()
    with pytest.raises(CheckpointError, match=r"the model does not fit the checkpoint; missing: encoder\."):
        load_run("reference:ijepa_tiny")


def test_what_is_refused(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(*more: str, source: Path = run, name: str = "ijepa_tiny") -> str:
        assert tool.main(words(source, tmp_path, *more, name=name)) == 2
        assert not list(tmp_path.rglob("weights.safetensors"))
        return capsys.readouterr().err

    assert "--name (='Scenes') must be METHOD_DATA in lower case, as ijepa_scenes" in message(name="Scenes")
    other = json.loads((run.parent / "evaluation.json").read_text())
    results = tmp_path / "other.json"

    def evaluated(**changes: Any) -> str:
        results.write_text(json.dumps(other | changes))
        return message("--evaluation", str(results))

    assert "other.json evaluates x.pt, not " in evaluated(checkpoint={"file": "x.pt", "sha256": "0", "step": 3})
    rows = [row for row in other["rows"] if row["network"] != "patches"]
    assert "must have the baselines untrained, pixels, patches; missing: patches" in evaluated(rows=rows)
    foreign = other["config"] | {"train": other["config"]["train"] | {"init_from": "/data/first.pt"}}
    assert "the config.train.init_from (='/data/first.pt') is a path of this machine" in evaluated(config=foreign)
    results.write_text(json.dumps(other | {"data": other["data"] | {"decoder": "fast"}}))
    both = message("--evaluation", str(run.parent / "evaluation.json"), str(results))
    assert f"other.json has other data than {run.parent / 'evaluation.json'}" in both

    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    facts = json.loads((longer / "run.json").read_text())
    (longer / "run.json").write_text(json.dumps(facts | {"steps": 9}))
    results = run.parent / "evaluation.json"
    unfinished = message("--evaluation", str(results), source=longer)
    assert f"{longer} is not finished: it has 3 of 9 updates" in unfinished
    monkeypatch.setattr(tool, "MOST", 10_000)
    assert "but at most 0 MB are allowed; --encoder-only keeps the evaluated encoder alone" in message()


def test_thinned_lines_keep_evaluations_and_hours(tool: ModuleType, tmp_path: Path) -> None:
    speeds = np.random.default_rng(0).uniform(10, 20, 5000)
    lines: list[dict[str, float]] = [
        {"step": k, "samples": 8 * (k + 1), "images_per_second": float(speed)} for k, speed in enumerate(speeds)
    ]
    for k in range(99, 5000, 100):
        lines[k]["eval/seconds"] = 1.0
    kept = tool.thinned(lines)
    assert 250 < len(kept) <= tool.LINES
    assert (kept[0]["step"], kept[-1]["step"]) == (0, 4999)
    assert set(range(99, 5000, 100)) <= {line["step"] for line in kept}
    images = np.diff([line["samples"] for line in kept], prepend=0)
    seconds = sum(images / [line["images_per_second"] for line in kept])
    assert seconds == pytest.approx(float((8 / speeds).sum()), rel=1e-5)
    assert [line["step"] for line in tool.thinned(lines[:7])] == list(range(7))
    for line in lines:
        line["eval/seconds"] = 1.0
    often = tool.thinned(lines)
    assert len(often) == tool.LINES
    assert (often[0]["step"], often[-1]["step"]) == (0, 4999)


def test_its_cost_is_that_of_the_run(run: Path, references: Path) -> None:
    (own,), (kept,) = load(run.parent / "evaluation.json"), load("reference:ijepa_tiny")
    mine, theirs = cost_of(own), cost_of(kept)
    assert mine is not None
    assert theirs is not None
    assert tuple(theirs) == pytest.approx(tuple(mine), rel=1e-5)
    assert len(read_metrics(references / "ijepa_tiny")) == 3
