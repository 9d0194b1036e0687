"""A masker, a loss and a target from one file outside the package, by ``imports:``, through the ordinary tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jepa_kit.registry import LOSSES, MASKERS, TARGETS
from jepa_kit.tools import make_shards, train_net

PARTS = '''
import numpy as np
import torch
from torch import nn

from jepa_kit.registry import LOSSES, MASKERS, TARGETS
from jepa_kit.structures import MaskBatch, PatchSets


@MASKERS.register("left_half")
class LeftHalf:
    """The left columns are context, the right ones are one target."""

    def __init__(self, *, grid: tuple[int, int], columns: int = 2) -> None:
        self.grid, self.columns = grid, columns

    def __call__(self, samples, *, seed: int, epoch: int, step: int = 0) -> MaskBatch:
        h, w = self.grid
        number = torch.arange(h * w).view(h, w)
        left, right = number[:, : self.columns].flatten(), number[:, self.columns :].flatten()
        b = len(samples)
        sets = [PatchSets.from_padded(x.repeat(b, 1)) for x in (left, right)]
        return MaskBatch(*sets, self.grid, torch.arange(b))


@TARGETS.register("mean_colour")
class MeanColour(nn.Module):
    """The mean of each channel of a patch."""

    needs_encoder = False
    out_dim = 3

    def __init__(self, *, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images, patches, encoder):
        pooled = nn.functional.avg_pool2d(images, self.patch_size)
        return patches.gather(pooled.flatten(2).mT)


@LOSSES.register("charbonnier")
class Charbonnier(nn.Module):
    """sqrt(error^2 + eps^2), mean over the width."""

    def __init__(self, *, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, prediction):
        error = prediction.prediction - prediction.target
        return prediction.mean((error.square() + self.eps**2).sqrt().mean(-1))
'''

CONFIG = """
imports: [my_parts.py]
masker: {{name: left_half, columns: 3}}
encoder: {{name: vit, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}}
predictor: {{name: vit, width: 16, depth: 1, num_heads: 2}}
target: {{name: mean_colour}}
loss: [{{name: charbonnier, eps: 0.01}}, {{name: l1, weight: 0.5}}]
target_update: {{name: none}}
data: {{image_size: 32, shards: {shards}, num_workers: 0}}
optim: {{warmup_epochs: 0}}
train: {{batch_size: 4, epochs: 1, steps_per_epoch: 2, precision: float32, log_every: 1, output_dir: {run}}}
"""


@pytest.mark.integration
def test_parts_from_a_file_of_ones_own_train(tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(PARTS)
    shards, run = tmp_path / "shards", tmp_path / "run"
    made = ["synthetic:scenes", str(shards), "--num-scenes", "8", "--image-size", "32", "--workers", "1"]
    assert make_shards.main(made) == 0
    config = tmp_path / "my_run.yaml"
    config.write_text(CONFIG.format(shards=shards, run=run))
    try:
        assert train_net.main(["--config-file", str(config)]) == 0
    finally:
        for registry, name in ((MASKERS, "left_half"), (TARGETS, "mean_colour"), (LOSSES, "charbonnier")):
            registry._obj_map.pop(name, None)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert all(0 < record["loss"] < 10 for record in records)
