"""NEPA: predictions depend on earlier patches alone, and the loss is the cosine to the next patch's embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kit.config import Config, load_config
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.recipe import JEPA
from jepa_kit.structures import MaskBatch, PatchSets, View
from projects.nepa.parts import NextPatch, Sequence

CONFIGS = Path(__file__).parents[2] / "projects/nepa/configs"


def small() -> Config:
    sizes = ["encoder.embed_dim=24", "encoder.depth=2", "encoder.num_heads=2", "encoder.patch_size=4"]
    return load_config(CONFIGS / "quick.yaml", [*sizes, "data.image_size=16"])


def recipe() -> JEPA:
    torch.manual_seed(0)
    built = build_recipe(small())
    assert isinstance(built, JEPA)
    return built.double()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks(count: int = 3) -> MaskBatch:
    return build_masker(small())(np.arange(count), seed=0, epoch=0)


def test_all_patches_are_shown_and_all_but_the_first_predicted() -> None:
    found = Sequence(grid=(4, 5))(np.array([7, 3]), seed=0, epoch=1)
    assert found.context.lengths.whole
    assert [x.tolist() for x in found.context.split()] == [list(range(20))] * 2
    assert [x.tolist() for x in found.targets.split()] == [list(range(1, 20))] * 2
    assert found.context_of.tolist() == found.targets.image.tolist() == [0, 1]


def test_a_patch_changes_its_target_and_later_predictions_alone() -> None:
    """The prediction of patch t is made from patches 0 to t - 1, as in the paper's equation of z_(t + 1)."""
    nepa, whole = recipe(), images(1)
    before = nepa.predict(View(whole, masks(1)))
    for k in (0, 3, 6, 15):
        row, column = divmod(k, 4)
        changed = whole.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
        after = nepa.predict(View(changed, masks(1)))
        moved = [
            ((a - b).abs().amax(1) > 1e-9).tolist()
            for a, b in ((before.prediction, after.prediction), (before.target, after.target))
        ]
        assert moved[0] == [t > k for t in range(1, 16)]
        assert moved[1] == [t == k for t in range(1, 16)]


def test_an_encoder_that_is_not_causal_sees_what_it_predicts() -> None:
    nepa, whole = recipe(), images(1)
    nepa.encoder.causal = False  # type: ignore[assignment]
    before = nepa.predict(View(whole, masks(1))).prediction
    assert (
        (nepa.predict(View(whole + F.pad(torch.ones(4, 4), (12, 0, 12, 0)), masks(1))).prediction - before) != 0
    ).all()


def test_the_loss_is_that_of_plain_maths() -> None:
    """1 - cosine of the output at patch t with a linear map of the pixels of patch t + 1, in numpy."""
    nepa = recipe()
    out = nepa(View(images(), masks()))
    encoder: Any = nepa.encoder
    proj = encoder.patch_embed.proj
    weight, bias = proj.weight.detach().numpy().reshape(24, -1), proj.bias.detach().numpy()
    pixels = images().numpy().reshape(3, 3, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(3, 16, -1)
    embedded = pixels @ weight.T + bias  # [B, N, D]: no positions, because rotary ones are in the attention
    output = encoder(images()).detach().numpy().reshape(3, 16, 24)
    ours, theirs = output[:, :-1], embedded[:, 1:]
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert out.loss.item() == pytest.approx(1 - cosine.mean(), abs=1e-12)


def test_targets_carry_no_gradient() -> None:
    """The gradient is that of a loss whose targets are constants, so the embedding learns as an input alone."""
    nepa, view = recipe(), View(images(), masks())
    nepa(view).loss.backward()
    found = {name: p.grad for name, p in nepa.named_parameters()}
    other = recipe()
    embedded = other.targets_at(view.images, masks().targets).detach()
    output = other.encoder(view.images).unflatten(0, (3, 16))[:, :-1].flatten(0, 1)
    (1 - F.cosine_similarity(output, embedded, dim=-1)).mean().backward()
    for name, p in other.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-12)
        assert p.grad.any() or name.endswith("qkv.bias"), name


def test_with_gaps_the_last_patch_before_the_target_counts() -> None:
    contexts, targets = ([0, 2, 5], [1, 3, 4]), ([1, 4, 6], [2, 15], [3])
    found = MaskBatch(
        PatchSets.pack([torch.tensor(x) for x in contexts]),
        PatchSets.pack([torch.tensor(x) for x in targets], torch.tensor([0, 1, 0])),
        (4, 4),
        torch.tensor([0, 1, 0]),
    )
    tokens = torch.arange(6.0)[:, None].expand(6, 24)
    assert NextPatch(embed_dim=24, out_dim=24)(tokens, found)[:, 0].tolist() == [0, 1, 2, 3, 5, 1]


@pytest.mark.parametrize(
    "contexts",
    [torch.tensor([[3, 4, 5], [0, 1, 2]]), torch.tensor([[0, 5, 4], [0, 1, 2]])],
    ids=["nothing is before", "another order"],
)
def test_masks_of_another_kind_are_refused(contexts: Tensor) -> None:
    target = PatchSets.from_padded(torch.tensor([[2], [5]]))
    found = MaskBatch(PatchSets.from_padded(contexts), target, (4, 4), torch.arange(2))
    message = r"needs masker \{name: sequence\}: patches of a context must be in raster order, and one of them before"
    with pytest.raises(ValueError, match=message):
        NextPatch(embed_dim=24, out_dim=24)(torch.zeros(6, 24), found)


def test_the_target_has_the_width_of_the_encoder() -> None:
    with pytest.raises(ValueError, match=r"out_dim \(=48\) of the target must be the encoder's width \(=24\)"):
        NextPatch(embed_dim=24, out_dim=48)


def test_the_config_has_the_settings_of_the_release() -> None:
    config = load_config(CONFIGS / "in1k_vitb14.yaml")
    assert config.optim.lr == pytest.approx(3e-4 * config.train.batch_size / 256)
    assert config.optim.warmup_epochs == 0.025 * config.train.epochs
    with torch.device("meta"):
        encoder: Any = build_recipe(config).encoder
    assert (encoder.grid, encoder.causal, encoder.rotary_base) == ((16, 16), True, 100.0)
