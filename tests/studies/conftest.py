"""A study of networks of 16 dimensions on 96 scenes of 16 x 16 pixels, whose cells take seconds."""

import pytest
import yaml

from jepa_kit.data.shards.writing import write_index, write_shard
from jepa_kit.data.sources.scenes import Scenes

BASE = {
    "masker": {"name": "random", "ratio": 0.5},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
    "data": {"image_size": 16, "num_workers": 0},
    "optim": {"warmup_epochs": 0},
    "train": {"batch_size": 8, "epochs": 1, "device": "cpu", "tensorboard": False, "log_every": 1},
    "checkpoint": {"every": 4},
}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """The folder of training and test shards."""
    folder = tmp_path_factory.mktemp("study_scenes")
    for name, samples, seed in (("train", 96, 0), ("test", 64, 1)):
        source = Scenes(num_scenes=samples, size=(16, 16), seed=seed)
        (folder / name).mkdir()
        info, rows = write_shard(str(folder / name / "shard-000000.tar"), [source.sample(i) for i in range(samples)])
        write_index(str(folder / name), [info], [rows], classes=source.classes, refused=[], made_by={})
    return folder


@pytest.fixture
def write_study(tmp_path, labelled):
    """Writes study.yaml with other values than those here, and the config that is its base; returns its path."""

    def write(config=None, **changes):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, **(config or {})}))
        study = {
            "base": "base.yaml",
            "factors": {
                "ratio": [{"masker": {"ratio": 0.5}}, {"masker": {"ratio": 0.25}}],
                "depth": [{}, {"name": "deep", "encoder.depth": 3}],
            },
            "seeds": [0, 1],
            "train_shards": str(labelled / "train"),
            "test_shards": str(labelled / "test"),
            "labels": ["shape", "count"],
            "protocols": [{"name": "knn", "neighbours": [5], "layers": "last2"}],
            "baselines": ["untrained", "pixels"],
        }
        study = {key: value for key, value in (study | changes).items() if value is not None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return tmp_path / "study.yaml"

    return write
