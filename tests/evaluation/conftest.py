import pytest
import torch

from jepa_kit.config import config_from_dict
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import write_index, write_shard
from jepa_kit.data.sources.scenes import Scenes
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.from_config import build_recipe
from jepa_kit.tools import make_shards

TINY = {
    "masker": {"name": "multiblock"},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 4},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
    "data": {"image_size": 16, "num_workers": 0, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    "optim": {"warmup_epochs": 0},
    "train": {"batch_size": 4, "epochs": 1, "precision": "float32", "device": "cpu", "seed": 11},
}


@pytest.fixture
def tiny_config():
    return config_from_dict(TINY)


@pytest.fixture
def tiny_run(tmp_path, tiny_config):
    """A run folder of two checkpoints (steps 2 and 5), and the JEPA of the later one; its encoders differ."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (2, 5):
        torch.manual_seed(step)
        jepa = build_recipe(tiny_config).eval()
        torch.nn.init.normal_(jepa.target_encoder.blocks[0].attn.proj.weight)
        held = Checkpoint(
            step=step,
            model=jepa.state_dict(),
            optimizer={},
            config=tiny_config.to_dict(),
            versions={},
            data={"samples": 8, "digest": ""},
        )
        save_checkpoint(folder, held)
    return folder, jepa


@pytest.fixture(scope="session")
def scene_shards():
    """Writes shards of scenes of 20 x 16 pixels."""

    def write(folder, samples, *, seed):
        source = Scenes(num_scenes=samples, size=(20, 16), seed=seed)
        folder.mkdir()
        half = samples // 2
        parts = [
            write_shard(str(folder / f"shard-{k:06d}.tar"), [source.sample(i) for i in numbers])
            for k, numbers in enumerate((range(half), range(half, samples)))
        ]
        infos, rows = zip(*parts, strict=True)
        write_index(str(folder), infos, rows, classes=source.classes, refused=[], made_by={})
        return ShardDataset(folder)

    return write


@pytest.fixture(scope="session")
def scenes(tmp_path_factory, scene_shards):
    """Training and test shards with the labels count, distance and shape."""
    folder = tmp_path_factory.mktemp("scenes")
    return scene_shards(folder / "train", 96, seed=0), scene_shards(folder / "val", 40, seed=1)


@pytest.fixture(scope="session")
def masked_scenes(tmp_path_factory):
    """Shards of scenes of 16 x 16 pixels, with masks."""
    folder = tmp_path_factory.mktemp("masked")
    parts = {"train": (96, 0), "val": (40, 1)}
    for name, (samples, seed) in parts.items():
        options = ["--num-scenes", samples, "--image-size", 16, "--seed", seed, "--masks"]
        assert make_shards.main(["synthetic:scenes", str(folder / name), *map(str, options)]) == 0
    return ShardDataset(str(folder / "train")), ShardDataset(str(folder / "val"))
