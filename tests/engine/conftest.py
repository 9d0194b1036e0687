import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepa_kit.config import config_from_dict
from jepa_kit.data.shards.writing import Sample, write_index, write_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture
def torchrun(tmp_path):
    """Runs a script in several processes, one thread each; fails with what they printed."""

    def run(processes, script, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, str(script), *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

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
