"""What two processes of test_regularisers.py compute, each with a part of the images, against one with all."""

from typing import Any

import torch
import torch.distributed as dist

from jepa_kit.distributed.collectives import process_group, read_environment
from jepa_kit.registry import LOSSES
from jepa_kit.structures import MaskBatch, PatchSets, Prediction

IMAGES, SETS, WIDTH = 6, 2, 5
HEAD = {"name": "mlp", "hidden": 7, "out_dim": 4, "norm": "batch"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vicreg": ("vicreg", {"projector": HEAD}),
    "vicreg of the context": ("vicreg", {"of": "context", "invariance": 0.0}),
    "sigreg": ("sigreg", {"slices": 3, "projector": HEAD}),
    "visreg": ("visreg", {"slices": 3, "projector": HEAD}),
    "visreg of the context": ("visreg", {"of": "context", "slices": 3}),
}


def masks(images: int) -> MaskBatch:
    """Each image has one context of two patches, and two target sets of one patch, which follow those of the others."""
    context = PatchSets.from_padded(torch.tensor([[0, 1]] * images))
    targets = PatchSets.from_padded(torch.tensor([[2]] * SETS * images), torch.arange(images).repeat(SETS))
    return MaskBatch(context, targets, (2, 2), torch.arange(images).repeat(SETS))


def run(case: str, images: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of some of the images, and gradients of the map before it, of the projector, and its buffers."""
    name, options = CASES[case]
    torch.manual_seed(0)
    loss = LOSSES.build(name, options, embed_dim=WIDTH, out_dim=WIDTH).double()
    before = torch.nn.Linear(WIDTH, WIDTH).double()
    x, y, context = (torch.randn(2, IMAGES, WIDTH, dtype=torch.float64)[:, images].flatten(0, 1) for _ in range(3))
    count = len(x) // SETS
    value = loss(Prediction(before(x), y, before(context), masks(count)))
    value.backward()
    named = [*before.named_parameters(), *loss.named_parameters()]
    return value.detach(), {key: p.grad for key, p in named if p.grad is not None}


if __name__ == "__main__":
    alone = {case: run(case, slice(None)) for case in CASES}
    world = read_environment()
    with process_group(world, torch.device("cpu")):
        for case, (value, gradients) in alone.items():
            own, own_gradients = run(case, slice(0, 2) if world.rank == 0 else slice(2, None))
            torch.testing.assert_close(own, value, rtol=0, atol=1e-12)
            for key, gradient in own_gradients.items():
                dist.all_reduce(gradient)
                torch.testing.assert_close(gradient / 2, gradients[key], rtol=0, atol=1e-12)
