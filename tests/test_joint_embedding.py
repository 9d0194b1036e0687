"""The recipe of views that has no target network: its loss is that of the views and their mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.encoders import ViT
from jepa_kit.encoders.pooling import pooled
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.heads import MLPHead
from jepa_kit.joint_embedding import JointEmbedding
from jepa_kit.losses import L2, SIGReg, SmoothL1
from jepa_kit.structures import Progress, View

IMAGES = 4


def recipe(head: bool = True, **options) -> JointEmbedding:
    torch.manual_seed(0)
    encoder = ViT(image_size=(8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=2, class_token=True)
    losses = [("l2", L2(), 0.9), ("sigreg", SIGReg(embed_dim=8, out_dim=5 if head else 8, slices=6), 0.1)]
    own = MLPHead(in_dim=8, hidden=6, out_dim=5, norm="batch") if head else None
    return JointEmbedding(encoder=encoder, losses=losses, head=own, **options)


def views(*sides: int) -> list[View]:
    return [View(torch.randn(IMAGES, 3, s, s, generator=torch.Generator().manual_seed(k))) for k, s in enumerate(sides)]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("centre", [None, 2])
def test_the_loss_is_that_of_each_view_and_the_mean(head, centre):
    network = recipe(head, centre=centre)
    images = views(8, 8, 4)
    progress = Progress(step=7, seed=3)
    out = network(*images, progress=progress)
    z = torch.cat([pooled(network.encoder, view.images) for view in images])
    z = (network.head(z) if head else z).unflatten(0, (3, IMAGES))  # [V, B, D]
    distance = (z - z[:centre].mean(0)).square().mean()
    sigreg = network.losses["sigreg"]
    statistic = sigreg.compare(z.transpose(0, 1), sigreg.directions(progress, z))
    torch.testing.assert_close(out.terms["l2"], distance)
    torch.testing.assert_close(out.terms["sigreg"], statistic)
    torch.testing.assert_close(out.loss, 0.9 * distance + 0.1 * statistic)
    assert out.prediction is None


def test_the_mean_has_its_gradient():
    network = recipe()
    network.losses, network.weights = nn.ModuleDict({"l2": L2()}), {"l2": 1.0}
    z = torch.randn(3 * IMAGES, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: network.compare(rows, rows, 3).loss, [z])


def test_every_parameter_is_trained():
    network = recipe()
    network(*views(8, 8)).loss.backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_a_config_without_a_head():
    raw = {
        "recipe": {"name": "joint_embedding"},
        "encoder": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
        "loss": [{"name": "smooth_l1"}, {"name": "sigreg", "of": "context"}],
        "data": {"image_size": 16, "views": [{"count": 2}]},
    }
    network = build_recipe(config_from_dict(raw))
    assert (network.head, network.losses["sigreg"].width) == (None, 16)
    network = build_recipe(config_from_dict({**raw, "head": {"name": "mlp", "hidden": 8, "out_dim": 4}}))
    assert network.losses["sigreg"].width == 16  # of the encoder, as ``of`` says
    with pytest.raises(ConfigError, match=r"recipe: centre \(=0\) must be at least 1 view"):
        build_recipe(config_from_dict({**raw, "recipe": {"name": "joint_embedding", "centre": 0}}))
    with pytest.raises(ConfigError, match="target_update is a slot that the recipe 'joint_embedding' does not have"):
        config_from_dict({**raw, "target_update": {"name": "ema"}})


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"centre \(=3\) must be at most the number of views \(=2\)"):
        recipe(centre=3)(*views(8, 8))
    encoder = nn.Identity()
    with pytest.raises(ValueError, match=r"losses \(=\[\]\) must contain at least one term"):
        JointEmbedding(encoder=encoder, losses=[])
    with pytest.raises(ValueError, match=r"losses \(=\['l2', 'l2'\]\) must have different names"):
        JointEmbedding(encoder=encoder, losses=[("l2", L2(), 1.0), ("l2", SmoothL1(), 1.0)])
