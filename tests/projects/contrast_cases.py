"""What two processes of test_contrast_processes.py compute, each with half of the images, against one with all."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from jepa_kit.distributed.collectives import process_group, read_environment
from jepa_kit.heads import MLPHead, Prototypes
from jepa_kit.joint_embedding import JointEmbedding
from jepa_kit.losses import L2
from jepa_kit.recipe import Recipe
from jepa_kit.registry import LOSSES
from jepa_kit.structures import View
from jepa_kit.target_updates import EMA
from projects.moco.recipe import MoCo, MoCoV3
from projects.msn.recipe import MSN
from projects.simclr.recipe import SimCLR

IMAGES, WIDTH = 6, 5
EXACT = {"rtol": 0, "atol": 1e-11}


class Rows(nn.Module):
    """An encoder whose images are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: torch.Tensor, patches: None = None) -> torch.Tensor:
        return self.linear(rows)


def head(norm: str = "batch") -> MLPHead:
    return MLPHead(in_dim=WIDTH, hidden=7, out_dim=WIDTH, norm=norm)


def joint_embedding(name: str, centre: int | None) -> JointEmbedding:
    """LeJEPA and VISReg, and the like with VICReg."""
    options = {"of": "prediction", "invariance": 0.0} if name == "vicreg" else {"slices": 3}
    regulariser = LOSSES.build(name, options, embed_dim=WIDTH, out_dim=WIDTH)
    return JointEmbedding(
        encoder=Rows(), head=head(), losses=[("l2", L2(), 0.9), (name, regulariser, 0.1)], centre=centre
    )


MAKERS: dict[str, tuple[int, Callable[[], Recipe]]] = {
    "simclr": (3, lambda: SimCLR(encoder=Rows(), head=head())),
    "moco": (2, lambda: MoCo(encoder=Rows(), head=head("none"), target_update=EMA(), queue=9)),
    "moco_v3": (
        2,
        lambda: MoCoV3(
            encoder=Rows(),
            head=head(),
            prediction_head=head(),
            target_update=EMA(),
            freeze_patch_embed=False,
        ),
    ),
    "msn": (
        3,
        lambda: MSN(
            encoder=Rows(),
            head=head(),
            prototype_head=Prototypes(in_dim=WIDTH, out_dim=4),
            target_update=EMA(),
            entropy=0.5,
        ),
    ),
    **{
        name: (3, lambda name=name, centre=centre: joint_embedding(name, centre))
        for name, centre in (("vicreg", None), ("sigreg", None), ("visreg", 2))
    },
}


def run(name: str, images: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loss of two steps on some images, the gradients of both, and the buffers after them."""
    views, make = MAKERS[name]
    torch.manual_seed(0)
    recipe = make().double()
    noise = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(2):
        x = torch.randn(views, IMAGES, WIDTH, dtype=torch.float64, generator=noise)
        losses.append(recipe(*[View(view[images]) for view in x]).loss)
        losses[-1].backward()
    gradients = {key: p.grad for key, p in recipe.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), gradients, dict(recipe.named_buffers())


if __name__ == "__main__":
    alone = {name: run(name, slice(None)) for name in MAKERS}
    world = read_environment()
    with process_group(world, torch.device("cpu")):
        for name, (losses, gradients, buffers) in alone.items():
            half = slice(0, IMAGES // 2) if world.rank == 0 else slice(IMAGES // 2, None)
            own_losses, own_gradients, own_buffers = run(name, half)
            for value in (own_losses, *own_gradients.values()):
                dist.all_reduce(value)
                value /= 2
            torch.testing.assert_close(own_losses, losses, **EXACT)
            torch.testing.assert_close(own_gradients, gradients, **EXACT)
            torch.testing.assert_close(own_buffers, buffers, **EXACT)
