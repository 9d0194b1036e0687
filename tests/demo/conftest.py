import json
import subprocess

import pytest
from demo_cases import HERE, NODE, STATIC, make_recipe

from jepa_kit.config import config_from_dict
from jepa_kit.data.shards.writing import write_index, write_shard
from jepa_kit.data.sources.scenes import Scenes
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint

TINY = {
    "masker": {"name": "random"},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
    "predictor": {"name": "vit", "width": 8, "depth": 2, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
    "data": {"image_size": [24, 32], "num_workers": 0, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    "optim": {"warmup_epochs": 0},
    "train": {"batch_size": 4, "epochs": 1, "precision": "float32", "device": "cpu"},
}
"""A grid of 6 x 8 patches."""


@pytest.fixture
def tiny_config():
    """Make the config of a small network, with overrides."""
    return lambda *overrides: config_from_dict(TINY, overrides)


@pytest.fixture
def node():
    """Run a script of this folder in Node with a JSON value as its input; return the value that it prints."""
    if NODE is None:
        pytest.skip("needs Node.js, which runs the page's JavaScript outside a browser")

    def run(script, value):
        command = [NODE, str(HERE / script), STATIC.as_uri()]
        done = subprocess.run(command, input=json.dumps(value), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of shards with 32 scenes of 24 x 32 pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    source = Scenes(num_scenes=32, size=(24, 32), seed=0)
    info, rows = write_shard(str(folder / "shard-000000.tar"), [source.sample(i) for i in range(32)])
    write_index(str(folder), [info], [rows], classes=source.classes, refused=[], made_by={})
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run folder with a checkpoint of random weights, and its recipe."""
    folder, config = tmp_path_factory.mktemp("run"), config_from_dict(TINY)
    recipe = make_recipe(config)
    state = recipe.state_dict()
    versions = {"data": {"samples": 8, "digest": ""}, "versions": {}, "optimizer": {}}
    save_checkpoint(folder, Checkpoint(step=3, model=state, config=config.to_dict(), **versions))
    return folder, recipe
