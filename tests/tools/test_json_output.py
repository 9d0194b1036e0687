"""Every tool with --json prints one JSON document on stdout and nothing else; messages and progress go to stderr."""

import contextlib
import functools
import importlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_convert_config import SETTINGS

from jepa_kit.arguments import json_alone
from jepa_kit.config import config_from_dict
from jepa_kit.engine import step as update
from jepa_kit.training import train

ROOT = Path(__file__).parents[2]
NO_RESULT = {"train_net", "demo"}
"""Their results are files: a run folder, with run.json and metrics.jsonl for programs; a page."""
RUN = {
    "masker": {"name": "multiblock"},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema", "momentum": [0.9, 1.0]},
    "data": {"image_size": 16, "num_workers": 0},
    "optim": {"warmup_epochs": 0.5},
    "train": {"batch_size": 8, "epochs": 1, "steps_per_epoch": 3, "precision": "float32", "device": "cpu"},
}


def write_images(folder, count, seed):
    rng = np.random.default_rng(seed)
    for k in range(count):
        place = folder / ("cat", "dog")[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 128, (20, 24, 3), dtype=np.uint8) + np.uint8(100 * (k % 2))
        Image.fromarray(image).save(place / f"{k:03d}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a run on them whose second step is not finite, a study and a released config."""
    folder = tmp_path_factory.mktemp("json")
    write_images(folder / "photos/train", 64, 0)
    write_images(folder / "photos/val", 32, 1)
    raw = {**RUN, "data": {**RUN["data"], "shards": str(folder / "photos/train")}}
    config = {**raw, "train": {**RUN["train"], "output_dir": str(folder / "run"), "on_nonfinite": "skip"}}
    with pytest.MonkeyPatch.context() as patch:
        step_function = update.train_step

        def train_step(jepa, optimizer, hyper, views, *, progress, **options):
            if progress.step == 1:
                views = [replace(views[0], images=views[0].images * math.nan)]
            return step_function(jepa, optimizer, hyper, views, progress=progress, **options)

        patch.setattr(update, "train_step", train_step)
        train(config_from_dict(config))
    (folder / "base.yaml").write_text(yaml.safe_dump(raw))
    study = {
        "base": "base.yaml",
        "factors": {"depth": [{}, {"name": "deep", "encoder.depth": 3}]},
        "seeds": [0],
        "train_shards": str(folder / "photos/train"),
        "test_shards": str(folder / "photos/val"),
        "labels": ["class"],
        "protocols": ["knn"],
        "baselines": ["pixels"],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "released.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


COMMANDS = {
    "runs": "{0}",
    "eval_net": "--checkpoint {0}/run --protocol knn --baselines pixels --test-shards {0}/photos/val",
    "eval_net --list": "--list",
    "compare": "{0}/run",
    "compare --curves": "{0}/run --curves {0}/curves.png",
    "health": "--checkpoint {0}/run --images 16",
    "mask_report": "--config-file {0}/run --draws 64 --images-per-batch 32 --output-dir {0}/masks",
    "plan_run": "--config-file {0}/run --gpus 1,2 --device a100",
    "make_shards": "{0}/photos/val {0}/shards --workers 1",
    "make_shards --verify": "--verify {0}/shards",
    "ablate --list": "{0}/study.yaml --list",
    "ablate --dry-run": "{0}/study.yaml --dry-run --runs {0}/runs",
    "ablate --report": "{0}/study.yaml --report",
    "convert_checkpoint": "--to safetensors {0}/run {0}/encoder.safetensors",
    "convert_config": "{0}/released.yaml --ranks 16",
    "replay_step": "{0}/run/bad_step_00000001/rank_0000.pt",
    "visualize": "--checkpoint {0}/run --images 32 --decoder-images 64 --decoder-steps 1 --output {0}/pictures",
}


def test_every_tool_has_the_option():
    tools = {file.stem for file in (ROOT / "tools").glob("*.py")} - NO_RESULT
    assert {name.partition(" ")[0] for name in COMMANDS} == tools
    for name in tools:
        assert "\n  --json " in importlib.import_module(f"jepa_kit.tools.{name}").parser().format_help()


@pytest.fixture(scope="module")
def printed(place):
    """Returns what a command prints, (status, stdout, stderr), and runs it once."""

    @functools.cache
    def run(name):
        tool = importlib.import_module(f"jepa_kit.tools.{name.partition(' ')[0]}")
        out, err = io.StringIO(), io.StringIO()
        if name == "make_shards --verify":
            run("make_shards")
        if name.startswith("compare"):
            run("eval_net")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = tool.main([*COMMANDS[name].format(place).split(), "--json"])
        return status, out.getvalue(), err.getvalue()

    return run


KEYS = {
    "runs": "run",
    "eval_net": "rows",
    "eval_net --list": "example",
    "compare": "mean",
    "compare --curves": "curves",
    "health": "health",
    "mask_report": "reports",
    "plan_run": "plans",
    "make_shards": "folders",
    "make_shards --verify": "problems",
    "ablate --list": "state",
    "ablate --dry-run": "tflop",
    "ablate --report": "table",
    "convert_checkpoint": "written",
    "convert_config": "config",
    "replay_step": "found",
    "visualize": "verdict",
}


DRAWS = "visualize"
"""Takes seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == DRAWS else name for name in COMMANDS]
)
def test_stdout_is_json(printed, name):
    status, out, err = printed(name)
    assert status == (3 if name == "replay_step" else 0), err
    content = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert KEYS[name] in (content[0] if isinstance(content, list) else content)


def test_the_text_is_not_printed_with_it(printed):
    assert "opening " in printed("make_shards")[2]
    assert json.loads(printed("make_shards")[1])["folders"][0]["samples"] == 32
    assert json.loads(printed("compare")[1])[0]["protocol"] == "knn"
    (entry,) = json.loads(printed("runs")[1])
    assert (entry["state"], entry["step"], entry["steps"]) == ("finished", 3, 3)


def test_numbers_that_json_lacks(capsys):
    with json_alone(True) as show:
        print("a message of a library")
        show("text", {1: [math.nan, -math.inf, 0.5], "path": Path("a"), "none": None, "yes": True})
    found = capsys.readouterr()
    assert json.loads(found.out) == {"1": [None, None, 0.5], "path": "a", "none": None, "yes": True}
    assert found.err == "a message of a library\n"
    with json_alone(False) as show:
        show("text", {})
    assert capsys.readouterr().out == "text\n"
