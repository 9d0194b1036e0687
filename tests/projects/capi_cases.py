"""What the tests of CAPI share, and what two processes of test_capi.py compute, each with half of the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_kit.distributed.collectives import process_group, read_environment, wrap
from jepa_kit.encoders import ViT
from jepa_kit.heads import Prototypes
from jepa_kit.losses import CrossEntropy
from jepa_kit.maskers import Subset
from jepa_kit.predictors import CrossPredictor
from jepa_kit.structures import MaskBatch, View
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget
from projects.capi.recipe import CAPI


def recipe(weight: float = 1.0, **options: Any) -> CAPI:
    torch.manual_seed(0)
    encoder = ViT(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    capi = CAPI(
        encoder=encoder,
        predictor=CrossPredictor(embed_dim=16, out_dim=16, grid=(4, 4), width=8, depth=1, num_heads=2),
        target=RepresentationTarget(embed_dim=16, norm="none"),
        head=Prototypes(in_dim=16, out_dim=5, learned_scale=True),
        losses=[("cross_entropy", CrossEntropy(temperature=0.12, average="patches"), weight)],
        target_update=EMA(),
        **options,
    )
    return capi.double()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks(count: int) -> MaskBatch:
    masker = Subset(grid=(4, 4), masker={"name": "kept_block"}, fraction=0.4)
    return masker(np.arange(count), seed=0, epoch=0)


if __name__ == "__main__":
    world = read_environment()
    whole = recipe()
    whole(View(images(6), masks(6))).loss.backward()
    with process_group(world, torch.device("cpu")):
        part = recipe()
        view = View(images(6), masks(6)).split([0, 3, 6])[world.rank]
        forward = wrap(part, torch.device("cpu"))
        forward(view).loss.backward()
    for (name, p), q in zip(part.named_parameters(), whole.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12, msg=name)
