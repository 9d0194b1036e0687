"""V-JEPA 2.1 against plain float64 maths: sequences, distances, loss, gradients; what health sees; every message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.count_operators import CountOperators, Phase
from benchmarks.fake_cuda import as_if_on_hopper, on_fake_cuda
from jepa_kit.config import load_config
from jepa_kit.encoders.positions import rotary_angles
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.maskers import MultiGroup
from jepa_kit.structures import MaskBatch, PatchSets, Progress, View
from projects.vjepa21.parts import distances, sequences
from projects.vjepa21.recipe import DenseJEPA

CONFIGS = Path(__file__).parents[2] / "projects/vjepa21/configs"
GRID, HEADS, WIDTH = (4, 5), 2, 24
SMALL = [
    "encoder.embed_dim=24",
    "encoder.depth=3",
    "encoder.num_heads=2",
    "predictor.width=24",
    "predictor.num_heads=2",
]
SMALL += ["predictor.layers=[1, 3]", "target.layers=[2, 3]", "data.image_size=[32, 40]"]


def ragged_masks() -> MaskBatch:
    """Two images: two contexts of the first, one of the second; sets of other lengths; some patches are in none."""
    context = PatchSets.pack([torch.tensor(x) for x in ([0, 3, 9, 12], [15], [1, 2, 19])], torch.tensor([0, 0, 1]))
    sets = [[1, 2], [4, 5, 6, 18], [7], [3, 8, 17]]
    targets = PatchSets.pack([torch.tensor(x) for x in sets], torch.tensor([0, 1, 0, 0]))
    return MaskBatch(context, targets, GRID, torch.tensor([0, 2, 1, 0]))


def make_recipe(*options: str) -> Any:
    torch.manual_seed(0)
    recipe = build_recipe(load_config(CONFIGS / "quick.yaml", [*SMALL, *options])).double()
    for name, p in recipe.named_parameters():
        if not name.startswith("target_encoder"):
            torch.nn.init.normal_(p, std=0.3)
    return recipe


def make_images() -> Tensor:
    return torch.randn(2, 3, 32, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels 2i and 2i + 1 of x [h, L, d] by angles [L, d], which differ within a pair."""
    (a, b), (cos, sin) = (x[..., ::2], x[..., 1::2]), (angles.cos(), angles.sin())
    first, second = a * cos[:, ::2] - b * sin[:, ::2], b * cos[:, 1::2] + a * sin[:, 1::2]
    return torch.stack([first, second], dim=-1).flatten(-2)


def plain_predictions(predictor: Any, levels: list[Tensor], masks: MaskBatch) -> list[tuple[Tensor, Tensor]]:
    """For each target set, the predictions of its context and of its hidden patches, by one plain pass."""
    vit = predictor.vit
    fused = F.linear(torch.cat(levels, 1), predictor.fc1.weight, predictor.fc1.bias)
    fused = F.linear(F.gelu(fused), predictor.fc2.weight, predictor.fc2.bias)
    tokens, seen = fused.split(masks.context.lengths.on_host), masks.context.split()
    table = rotary_angles(WIDTH // HEADS, GRID, 10000.0, fused, "rotary_video")
    found = []
    for own, c in zip(masks.targets.split(), masks.context_of.tolist(), strict=True):
        number = int(c == 1)  # the second context of image 0 has the second mask token
        known = F.linear(tokens[c], vit.embed.weight, vit.embed.bias)
        x = torch.cat([known, vit.mask_token[number].expand(len(own), -1)])
        angles = torch.cat([table[seen[c]], table[own]])
        for block in vit.blocks:
            y = F.layer_norm(x, (WIDTH,), block.norm1.weight, block.norm1.bias, 1e-6)
            q, k, v = (
                F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
            )
            scores = turned(q, angles) @ turned(k, angles).mT / (WIDTH // HEADS) ** 0.5
            x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(F.layer_norm(x, (WIDTH,), block.norm2.weight, block.norm2.bias, 1e-6))
        x = F.linear(F.layer_norm(x, (WIDTH,), vit.norm.weight, vit.norm.bias, 1e-6), vit.proj.weight, vit.proj.bias)
        found.append((x[: len(known)], x[len(known) :]))
    return found


def plain_loss(recipe: Any, images: Tensor, masks: MaskBatch, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss by its formula, and its two terms: means of a set, of an image's sets, of images."""
    levels = recipe.encoder.forward_layers(images, masks.context, layers=(1, 3))
    outputs = recipe.target_encoder.forward_layers(images, layers=(2, 3))
    every = torch.cat([F.layer_norm(x, (24,)) for x in outputs], 1).detach().view(2, 20, 48)
    hidden_terms, visible_terms = [], []
    pairs = zip(plain_predictions(recipe.predictor, levels, masks), masks.targets.split(), strict=True)
    for s, ((seen, hidden), own) in enumerate(pairs):
        image, context = int(masks.targets.image[s]), masks.context.split()[int(masks.context_of[s])]
        hidden_terms.append((hidden - every[image][own]).abs().mean())
        grid = np.ones(GRID, dtype=bool)
        grid.flat[own.numpy()] = False
        distance = torch.from_numpy(ndimage.distance_transform_edt(grid)).flatten()[context]
        # Patch 3 is in a context and in a set that is predicted from it.
        visible_terms.append(((seen - every[image][context]).abs().mean(1) / distance.clamp(min=1).sqrt()).mean())
    hidden, visible = (of_images(masks, terms) for terms in (hidden_terms, visible_terms))
    return hidden + weight * visible, hidden, visible


def of_images(masks: MaskBatch, values: list[Tensor]) -> Tensor:
    """The mean of a value of each target set, over the sets of an image, then over images."""
    of_image: list[list[Tensor]] = [[], []]
    for image, value in zip(masks.targets.image.tolist(), values, strict=True):
        of_image[image].append(value)
    return torch.stack([torch.stack(own).mean() for own in of_image]).mean()


def test_distances_are_euclidean() -> None:
    """Against scipy's distance transform, which gives 0 to the hidden patches themselves."""
    rng = np.random.default_rng(0)
    for h, w in ((4, 5), (7, 1), (9, 16)):
        hidden = rng.random((6, h, w)) < rng.uniform(0.05, 0.9, (6, 1, 1))
        hidden[:, h // 2, 0] = True
        targets = PatchSets.from_mask(hidden.reshape(6, -1), np.arange(6))
        masks = MaskBatch(PatchSets.pack([torch.tensor([0])] * 6), targets, (h, w), torch.arange(6))
        expected = np.stack([ndimage.distance_transform_edt(~own) for own in hidden])
        np.testing.assert_allclose(distances(masks).view(6, h, w), expected, rtol=1e-6)


def test_sequences_are_the_context_then_the_hidden_patches() -> None:
    masks = ragged_masks()
    parts, context = sequences(masks), masks.context.split()
    of = masks.context_of.tolist()
    together = [[*context[c].tolist(), *own.tolist()] for c, own in zip(of, masks.targets.split(), strict=True)]
    assert [x.tolist() for x in parts.every.targets.split()] == together
    assert [x.tolist() for x in parts.visible.targets.split()] == [context[c].tolist() for c in of]
    assert parts.every.targets.hidden is not None
    assert parts.every.targets.hidden.nonzero().flatten().tolist() == parts.hidden.tolist()
    assert torch.equal(parts.every.targets.index[parts.hidden], masks.targets.index)
    assert sorted([*parts.hidden.tolist(), *parts.seen.tolist()]) == list(range(parts.every.targets.num_patches))
    for own in (parts.every, parts.visible):  # what was made without checks passes them
        MaskBatch(own.context, own.targets, own.grid, own.context_of)
        assert torch.equal(own.targets.image, masks.targets.image)


@pytest.mark.parametrize("where", [0.0, 0.15, 0.7])
def test_the_loss_is_its_formula(where: float) -> None:
    recipe, images, masks = make_recipe(), make_images(), ragged_masks()
    out = recipe(View(images, masks), progress=Progress(where=where))
    weight = {0.0: 0.0, 0.15: 0.5 * (0.15 - 0.111) / 0.111, 0.7: 0.5}[where]
    total, hidden, visible = plain_loss(recipe, images, masks, weight)
    assert out.terms.keys() == {"l1", "visible"}
    # The distances are float32.
    for ours, theirs in ((out.loss, total), (out.terms["l1"], hidden), (out.terms["visible"], visible)):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-7)
    names, parameters = zip(*((n, p) for n, p in recipe.named_parameters() if p.requires_grad), strict=True)
    mine, plain = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (out.loss, total))
    for name, a, b in zip(names, mine, plain, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_a_gradient_by_finite_differences() -> None:
    recipe, view = make_recipe(), View(make_images(), ragged_masks())
    chosen = [recipe.predictor.fc1.bias, recipe.predictor.vit.mask_token, recipe.encoder.blocks[0].mlp.fc1.bias]

    def loss() -> Tensor:
        return recipe(view, progress=Progress(where=1.0)).loss

    for p, gradient in zip(chosen, torch.autograd.grad(loss(), chosen), strict=True):
        flat, values = p.data.view(-1), []
        for sign in (1, -1):
            flat[5] += sign * 1e-6
            values.append(loss().item())
            flat[5] -= sign * 1e-6
        assert gradient.view(-1)[5].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_health_and_pictures_see_hidden_patches_alone() -> None:
    """``predict`` has the masks of the view, and the predictions of the training step at their places."""
    recipe, view = make_recipe(), View(make_images(), ragged_masks())
    found, step = recipe.predict(view), recipe(view).prediction
    for prediction in (found, step):
        assert prediction.masks is view.masks
        assert len(prediction.prediction) == view.masks.targets.num_patches
    torch.testing.assert_close(found.prediction, step.prediction, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.target, step.target, rtol=0, atol=1e-12)
    assert torch.equal(found.target, recipe.targets_at(view.images, view.masks.targets))


def test_the_host_never_waits_for_the_device() -> None:
    """A forward pass on fake CUDA tensors, with the masks that training has: those of the host, moved."""
    masks = MultiGroup(grid=GRID)(np.arange(3), seed=0, epoch=0)
    moved = masks.map_tensors(lambda x: x)  # what is derived from masks needs real numbers on the host
    recipe = make_recipe().float()
    with as_if_on_hopper(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_device = moved.map_tensors(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        view = View(torch.empty(3, 3, 32, 40, device="cuda"), on_device)
        with CountOperators() as counter:
            on_fake_cuda(recipe)(view, progress=Progress(where=0.5))
    total = sum(counter.phases.values(), Phase())
    assert total.kernels > 100
    assert total.syncs == 0


def test_positions_that_are_added() -> None:
    recipe = make_recipe("predictor.positions=sincos")
    view = View(make_images(), ragged_masks())
    torch.testing.assert_close(recipe.predict(view).prediction, recipe(view).prediction.prediction, rtol=0, atol=1e-12)


def test_the_weight_warms_up() -> None:
    recipe = make_recipe("recipe.warmup=[0.2, 0.6]", "recipe.visible_weight=0.8")
    assert [recipe.weight(x) for x in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([0, 0, 0.2, 0.8, 0.8])
    assert make_recipe("recipe.warmup=[0.0, 0.0]").weight(0.0) == 0.5
    assert [make_recipe("recipe.warmup=[0.5, 0.5]").weight(x) for x in (0.2, 0.5)] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["recipe.visible_weight=-1"], r"visible_weight \(=-1.0\) must be at least 0 and finite"),
        (["recipe.warmup=[0.5, 0.2]"], r"warmup \(=\(0.5, 0.2\)\) must be two fractions of training, in \[0, 1\]"),
        (["loss={name: cross_entropy}"], r"losses \(=\['cross_entropy'\]\) must be distances, such as 'l1'"),
        (["predictor.layers=[]"], r"layers \(=\(\)\) must be different numbers of blocks, at least one"),
        (["predictor.layers=[1, 1]"], r"layers \(=\(1, 1\)\) must be different numbers of blocks, at least one"),
        (["predictor.layers=[1, 9]"], r"layers \(=\(1, 9\)\) must be numbers of blocks, from 1 to"),
    ],
)
def test_refuses(options: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        make_recipe(*options)


def test_another_predictor_is_refused() -> None:
    recipe = make_recipe()
    with pytest.raises(ValueError, match="predictor must predict visible patches, as 'dense' does"):
        DenseJEPA(
            encoder=recipe.encoder,
            predictor=recipe.predictor.vit,
            target=recipe.target,
            losses=[("l1", recipe.losses["l1"], 1.0)],
            target_update=recipe.target_update,
        )


def test_a_view_without_masks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the view \(masks=None\) must have masks"):
        make_recipe()(View(make_images()))


def test_settings_of_the_source() -> None:
    """Those of arXiv 2603.14482, with a user's reading of the warm-up."""
    config = load_config(CONFIGS / "in1k_vitl16.yaml")
    assert config.recipe.options == {"visible_weight": 0.5, "warmup": (0.111, 0.222)}
    assert config.slots["target_update"].options["momentum"] == (0.99925, 0.99925)
    levels = config.slots["target"].options["layers"]
    assert len(levels) == 4
    assert config.slots["predictor"].options["layers"] == levels
    assert config.slots["masker"].options["num_targets"] == (8, 2)
