"""The contract of user-defined parts: each way to break it has a message, and the check itself changes nothing."""

import contextlib
import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.encoders import ViT
from jepa_kit.encoders.pooling import pooled
from jepa_kit.engine import build
from jepa_kit.engine.logging.telemetry import MEASURED, read_metrics
from jepa_kit.errors import ContractError
from jepa_kit.from_config import build_masker, build_recipe
from jepa_kit.interfaces import TargetUpdate
from jepa_kit.maskers import Random
from jepa_kit.predictors import ViTPredictor
from jepa_kit.random_state import seeded
from jepa_kit.recipe import Recipe
from jepa_kit.registry import HEADS, RECIPES, SLOTS, TRANSFORMS
from jepa_kit.structures import START, MaskBatch, Output, PatchSets
from jepa_kit.target_updates import EMA
from jepa_kit.targets import RepresentationTarget
from jepa_kit.training import train
from jepa_kit.trials import contract
from jepa_kit.trials.contract import check_parts
from jepa_kit.trials.part_trial import FORMS

CPU = torch.device("cpu")
RAW = {
    "masker": {"name": "random"},
    "encoder": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": {"name": "ema"},
    "data": {"image_size": 16},
    "train": {"precision": "float32", "device": "cpu"},
}
SHIPPED = [
    (slot, name)
    for slot, registry in {**SLOTS, "transform": TRANSFORMS}.items()
    for name in registry.names()
    if registry.get(name).__module__.startswith("jepa_kit.") and name != "cross_entropy"  # needs a target with codes
]


@pytest.fixture
def own():
    """Registers a user's part as ``own`` of a slot, and gives a config with it."""
    with contextlib.ExitStack() as registered:

        def register(slot, part):
            registry = TRANSFORMS if slot == "transform" else SLOTS[slot]
            part.__module__ = "my_parts"
            registry.register("own")(part)
            registered.callback(registry._obj_map.pop, "own", None)
            raw = {**RAW, slot: {"name": "own"}}
            if slot == "encoder":
                raw["encoder"] = {**RAW["encoder"], "name": "own"}
            elif slot == "transform":
                raw.pop("transform")
                raw["data"] = {**RAW["data"], "transforms": [{"name": "random_resized_crop"}, {"name": "own"}]}
            return config_from_dict(raw)

        yield register


@pytest.mark.parametrize(("slot", "name"), SHIPPED)
def test_every_part_of_jepa_kit_keeps_it(slot, name):
    raw = json.loads(json.dumps(RAW))
    if slot == "transform":
        raw["data"]["transforms"] = [{"name": name}]
        if not hasattr(TRANSFORMS.get(name), "window"):
            raw["data"]["transforms"].insert(0, {"name": "random_resized_crop"})
    else:
        known = SLOTS[slot].options(name)
        raw[slot] = {"name": name} | {k: v for k, v in raw.get(slot, {}).items() if k in known}
    if slot == "head":
        options = {"hidden": 8} if name == "mlp" else {}
        raw = two_views(recipe={"name": "two_views"}, head={"name": name, "out_dim": 4, **options})
    if name == "none":
        raw["target"] = {"name": "pixel"}
    if name in ("in_place", "tokens"):
        raw["masker"] = {"name": "in_place"}
        raw["encoder"]["mask_token"] = True
    config = config_from_dict(raw)
    with seeded(config.train.seed):
        jepa = build_recipe(config)
    check_parts(config, CPU, weights_of=jepa.train(), every=True)


# --- recipes and heads ---


class TwoViews(Recipe):
    num_views = (2, 2)
    masked = False

    def __init__(self, *, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__(encoder=encoder)
        self.head = head

    def forward(self, *views, progress=START):
        one, other = (self.head(pooled(self.encoder, view.images)) for view in views)
        loss = (one - other).square().mean()
        return Output(loss, {"distance": loss})


class Forgetful(TwoViews):
    def forward(self, *views, progress=START):
        return super().forward(*views).loss


class Aware(TwoViews):
    """A recipe that reads how the second view was made."""

    def forward(self, *views, progress=START):
        assert views[0].action is None
        assert views[1].action.shape == (len(views[1]), 4 + 5)  # of the crop and of the colours
        return super().forward(*views)


class Wide(nn.Linear):
    out_dim = 5

    def __init__(self, *, in_dim: int) -> None:
        super().__init__(in_dim, 4)


def two_views(**slots):
    """A config of a recipe that compares two views, without masks."""
    raw = {"encoder": RAW["encoder"], "data": {**RAW["data"], "views": [{"count": 2}]}, "train": RAW["train"]}
    return json.loads(json.dumps({**raw, **slots}))


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    registries = ((RECIPES, {"two_views": TwoViews, "forgetful": Forgetful, "aware": Aware}), (HEADS, {"wide": Wide}))
    for registry, parts in registries:
        registry.import_members()
        monkeypatch.setattr(registry, "_obj_map", {**registry._obj_map, **parts})


@pytest.mark.parametrize(
    ("recipe", "head", "message"),
    [
        ("forgetful", "mlp", r"^recipe 'forgetful' gave a Tensor, not a jepa_kit.structures.Output"),
        (
            "two_views",
            "wide",
            r"head 'wide' gave a tensor of shape \[4, 4\] for the output \[N, out_dim\], not \[4, 5\]",
        ),
    ],
)
def test_recipes_and_heads_of_ones_own_are_checked(recipe, head, message):
    options = {"layers": 1, "out_dim": 4} if head == "mlp" else {}
    config = config_from_dict(two_views(recipe={"name": recipe}, head={"name": head, **options}))
    with pytest.raises(ContractError, match=message):
        check_parts(config, CPU)


def test_views_of_a_trial_have_actions():
    transforms = [{"name": "random_resized_crop"}, {"name": "color_jitter"}]
    views = [{"count": 1}, {"count": 1, "action": True, "transforms": transforms}]
    head = {"name": "mlp", "layers": 1, "out_dim": 4}
    config = two_views(recipe={"name": "aware"}, head=head, data={**RAW["data"], "views": views})
    check_parts(config_from_dict(config), CPU)


# --- maskers ---


class OwnMasker(Random):
    def __init__(self, *, grid: tuple[int, int]) -> None:
        super().__init__(grid=grid, ratio=0.5)


class GlobalNumbers(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        return super().__call__(samples, seed=int(np.random.randint(2**31)), epoch=epoch)  # noqa: NPY002


class PythonNumbers(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        return super().__call__(samples, seed=random.getrandbits(31), epoch=epoch)


class TorchNumbers(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        return super().__call__(samples, seed=int(torch.randint(2**31, ())), epoch=epoch)


class Tuple(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        masks = super().__call__(samples, seed=seed, epoch=epoch)
        return masks.context, masks.targets


class NoSeed(OwnMasker):
    def __call__(self, samples, *, epoch, step=0):
        raise AssertionError


class EmptyContext(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        return PatchSets.from_padded(torch.empty(len(samples), 0, dtype=torch.int64))


class NoGrid(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        masks = super().__call__(samples, seed=seed, epoch=epoch)
        return MaskBatch(masks.context, masks.targets, context_of=masks.context_of)


class NoGridAttribute(OwnMasker):
    def __init__(self, *, grid: tuple[int, int]) -> None:
        self.inner = Random(grid=grid, ratio=0.5)

    def __call__(self, *arguments, **options):
        return self.inner(*arguments, **options)


class OtherGrid(OwnMasker):
    def __init__(self, *, grid: tuple[int, int]) -> None:
        super().__init__(grid=(grid[0] * 2, grid[1]))


class Shown(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        masks = super().__call__(samples, seed=seed, epoch=epoch)
        whole = PatchSets.full(len(samples), 16)
        return MaskBatch(whole, masks.targets, masks.grid, masks.context_of)


class FewImages(OwnMasker):
    def __call__(self, samples, *, seed, epoch, step=0):
        return super().__call__(samples[:-1], seed=seed, epoch=epoch)


class Table(OwnMasker):
    """[B, N] where a list of index rows is due."""

    def __call__(self, samples, *, seed, epoch, step=0):
        index = torch.zeros(len(samples), 3, dtype=torch.int64)
        return PatchSets(index, torch.arange(len(samples)), [3] * len(samples))


# --- networks, losses and updates ---


class NumpyNoise(ViT):
    def __init__(self, *, image_size: tuple[int, int], patch_size: int, embed_dim: int, depth: int, num_heads: int):
        super().__init__(
            image_size=image_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )

    def forward(self, images, patches=None):
        return super().forward(images, patches) + np.random.rand()  # noqa: NPY002


class OwnViT(NumpyNoise):
    def forward(self, images, patches=None):
        return ViT.forward(self, images, patches)


class Dense(OwnViT):
    def forward(self, images, patches=None):
        return super().forward(images)


class Mixing(OwnViT):
    """Attends to all patches of an image, and takes those of the context afterwards."""

    def forward(self, images, patches=None):
        tokens = super().forward(images)
        return tokens if patches is None else patches.gather(tokens.unflatten(0, (len(images), -1)))


class NotHiding(OwnViT):
    def forward(self, images, patches=None):
        seen = None if patches is None else dataclasses.replace(patches, hidden=None)
        return super().forward(images, seen)


class TwoLayers(OwnViT):
    def forward_layers(self, images, patches=None, *, layers, norm=True):
        return super().forward_layers(images, patches, layers=layers, norm=norm) * 2


class Unused(OwnViT):
    def __init__(self, *, image_size: tuple[int, int], patch_size: int, embed_dim: int, depth: int, num_heads: int):
        super().__init__(
            image_size=image_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )
        self.head = nn.Linear(2, 2)


class NumpyWeights(OwnViT):
    def __init__(self, *, image_size: tuple[int, int], patch_size: int, embed_dim: int, depth: int, num_heads: int):
        super().__init__(
            image_size=image_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )
        self.norm.weight.data.fill_(np.random.rand())  # noqa: NPY002


class Table_(OwnViT):
    def forward(self, images, patches=None):
        self.pos_embed.mul_(1.01)
        return super().forward(images, patches)


class NoDepth(nn.Module):
    def __init__(self, *, image_size: tuple[int, int], patch_size: int, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        self.grid, self.patch_size, self.embed_dim = (4, 4), patch_size, embed_dim


class Broken(nn.Module):
    def __init__(self, *, image_size: tuple[int, int], patch_size: int, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        self.weight = {}["weight"]


class NoSuper(nn.Module):
    def __init__(self, *, image_size: tuple[int, int], patch_size: int, embed_dim: int, depth: int, num_heads: int):
        self.grid, self.patch_size, self.embed_dim, self.depth = (4, 4), patch_size, embed_dim, depth


class NoModule:
    __init__ = NoSuper.__init__


class Detached(ViTPredictor):
    def __init__(self, *, embed_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(embed_dim=embed_dim, out_dim=out_dim, grid=grid, width=8, depth=1, num_heads=2)

    def forward(self, context, masks):
        return super().forward(context.detach(), masks)


class OwnPredictor(Detached):
    def forward(self, context, masks):
        return ViTPredictor.forward(self, self.before(context), masks)

    def before(self, context):
        return context


class Listed(OwnPredictor):
    """Layers in a list: not trained, and in no checkpoint."""

    def __init__(self, *, embed_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(embed_dim=embed_dim, out_dim=out_dim, grid=grid)
        self.layers = [nn.Linear(embed_dim, embed_dim)]

    def before(self, context):
        return self.layers[0](context)


class Frozen(Listed):
    """A layer in a list that is not trained, whose effect on the first loss is rounded away."""

    def __init__(self, *, embed_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(embed_dim=embed_dim, out_dim=out_dim, grid=grid)
        self.layers = [nn.Linear(embed_dim, embed_dim).requires_grad_(False)]


class Scaled(OwnPredictor):
    """A tensor that should be an nn.Parameter."""

    def __init__(self, *, embed_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(embed_dim=embed_dim, out_dim=out_dim, grid=grid)
        self.scale = torch.ones(embed_dim, requires_grad=True)

    def before(self, context):
        return context * self.scale


class Late(OwnPredictor):
    """A layer that the optimiser does not have."""

    def before(self, context):
        if not hasattr(self, "late"):
            self.late = nn.Linear(context.shape[-1], context.shape[-1])
        return self.late(context)


class Counting(OwnPredictor):
    """A warm-up that a resumed run would begin again."""

    calls = 0

    def before(self, context):
        self.calls += 1
        return context * (1 if self.calls < 100 else 2)


class Lazy(OwnPredictor):
    def __init__(self, *, embed_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(embed_dim=embed_dim, out_dim=out_dim, grid=grid)
        self.before = nn.LazyLinear(embed_dim)


class NarrowPredictor(Detached):
    def forward(self, context, masks):
        return super().forward(context, masks)[:, :-1]


class OwnTarget(RepresentationTarget):
    def __init__(self, *, embed_dim: int) -> None:
        super().__init__(embed_dim=embed_dim)

    def forward(self, images, patches, encoder):
        return super().forward(images, patches, encoder).mean(-1)


class Drawn(OwnTarget):
    """A fixed random projection, which no checkpoint has."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__(embed_dim=embed_dim)
        self.register_buffer("projection", torch.randn(embed_dim, embed_dim), persistent=False)

    def forward(self, images, patches, encoder):
        return RepresentationTarget.forward(self, images, patches, encoder) @ self.projection


class Codes(OwnTarget):
    def forward(self, images, patches, encoder):
        return RepresentationTarget.forward(self, images, patches, encoder).argmax(-1)


class NarrowCodes(Codes):
    def forward(self, images, patches, encoder):
        return super().forward(images, patches, encoder).int()


class LargeCodes(Codes):
    def forward(self, images, patches, encoder):
        return super().forward(images, patches, encoder) + self.out_dim


class InfiniteTarget(OwnTarget):
    def forward(self, images, patches, encoder):
        return RepresentationTarget.forward(self, images, patches, encoder).log()


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, prediction):
        return (prediction.prediction - prediction.target).square().mean(-1)


class RandomLoss(OwnLoss):
    def forward(self, prediction):
        return super().forward(prediction).mean() * torch.rand(())


class Variance(OwnLoss):
    def forward(self, prediction):
        return -super().forward(prediction).mean()


class Wide_(OwnLoss):
    """Values [P, 1], whose product with the weights [P] would be [P, P]."""

    def forward(self, prediction):
        return prediction.mean(super().forward(prediction)[:, None])


class FloatLoss(OwnLoss):
    def forward(self, prediction):
        return super().forward(prediction).mean().item()


class OwnEMA(EMA):
    def __init__(self) -> None:
        super().__init__()

    def momentum(self, where):
        return float("nan")


class Meddling(OwnEMA):
    momentum = EMA.momentum

    def update(self, target_encoder, encoder, momentum):
        with torch.no_grad():
            encoder.norm.weight.zero_()


class Every(OwnEMA):
    """Every hundredth step, counted from the start of the process."""

    momentum = EMA.momentum
    steps = 0

    def update(self, target_encoder, encoder, momentum):
        self.steps += 1
        if self.steps % 100 == 0:
            super().update(target_encoder, encoder, momentum)


class Same(Every):
    """The encoder, not a copy of it."""

    def update(self, target_encoder, encoder, momentum):
        for own, value in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
            own.data = value.data


class WithGraph(Every):
    def update(self, target_encoder, encoder, momentum):
        for own, value in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
            own.lerp_(value, 1 - momentum)


class UpdateNoSuper(nn.Module):
    tied, stop_gradient = False, True

    def __init__(self, *, steps: int = 2) -> None:
        self.steps = steps


# --- transforms ---


class OwnTransform:
    num_draws = 0

    def __init__(self) -> None:
        pass

    def __call__(self, image, draws):
        return image.point(lambda v: v + random.randint(0, 9))


class Array(OwnTransform):
    def __call__(self, image, draws):
        return np.asarray(image)


class GreyImage(OwnTransform):
    def __call__(self, image, draws):
        return image.convert("L")


class Painting(OwnTransform):
    def __call__(self, image, draws):
        image.paste((0, 0, 0), (0, 0, 2, 2))
        return image


class LongAction(OwnTransform):
    action_size = 1

    def action(self, draws, size):
        return [0.0, 1.0]


class InfiniteAction(LongAction):
    def action(self, draws, size):
        return [float("inf")]


class NoDraws(OwnTransform):
    num_draws = 1.5


BREACHES = [
    ("masker", GlobalNumbers, "gave different results in two calls with the same arguments"),
    ("masker", PythonNumbers, "gave different results in two calls"),
    ("masker", TorchNumbers, "gave different results in two calls"),
    ("masker", Tuple, "gave a tuple, not a jepa_kit.structures.MaskBatch"),
    ("masker", NoSeed, r"cannot be called with \(samples, seed=..., epoch=..., step=...\): got an unexpected .*'seed'"),
    ("masker", EmptyContext, "failed in a trial call: ValueError: lengths.* must be at least 1"),
    ("masker", NoGrid, "failed in a trial call: TypeError: .*missing 1 required positional argument: 'grid'"),
    ("masker", NoGridAttribute, r"has the attribute grid None, not \(4, 4\)"),
    ("masker", OtherGrid, r"gave masks of the grid \(8, 4\), but images have \(4, 4\)"),
    ("masker", FewImages, r"gave no context set for image \[3\] of 4"),
    ("masker", Shown, r"gave 8 of the 8 patches of a target .first patch \[\d+\] of image 0. to the context"),
    ("masker", Table, "failed in a trial call: ValueError: index must be a 1-D int64 tensor"),
    ("encoder", NumpyNoise, "gave different results in two calls"),
    ("encoder", Dense, r"gave a tensor of shape \[64, 16\] for the contexts \[P_c, embed_dim\], not \["),
    ("encoder", Mixing, "gave other tokens of a context if pixels outside of the context, or of its hidden patches"),
    ("encoder", TwoLayers, r"gave 2 tensors for one layer of forward_layers"),
    ("encoder", Unused, r"no gradient reaches 2 of \d+ parameters, first encoder.head.weight, with encoder 'own'"),
    ("encoder", NumpyWeights, r"the first weights differ in two builds with one train.seed, first encoder.norm.weight"),
    ("encoder", Table_, "changes its buffer pos_embed, which is not persistent"),
    ("predictor", Detached, "no gradient reaches .* first encoder.patch_embed.* with predictor 'own'"),
    ("predictor", NarrowPredictor, r"gave a tensor of shape \[\d+, 15\] for the predictions \[P_t, out_dim\], not \["),
    ("predictor", Listed, r"a tensor \(of a layer\) of shape \[16, 16\] has a gradient, but is no parameter"),
    ("predictor", Frozen, r"if another build loads the state dict, .* differ, with predictor 'own'.* nn.ModuleList"),
    ("predictor", Scaled, r"a tensor \(scale\) of shape \[16\] has a gradient, but is no parameter of the recipe"),
    ("predictor", Late, r"predictor.late.bias is made in a forward pass, with predictor 'own'"),
    ("predictor", Counting, "changes its attribute calls in each call, and no checkpoint has it"),
    ("target", Drawn, "if another build loads the state dict, .* differ, with target 'own'.* a buffer .* persistent"),
    ("target", OwnTarget, r"gave a tensor of shape \[\d+\] for the targets \[P_t, out_dim\]"),
    ("target", NarrowCodes, r"gave torch.int32 of shape \[\d+\] for the targets: codes must be int64 of shape \["),
    ("target", LargeCodes, r"gave codes from \d+ to \d+, but out_dim \(=\d+\) means 0 to \d+"),
    ("target", InfiniteTarget, "gave values that are not finite for the targets"),
    ("loss", OwnLoss, r"gave a tensor of shape \[\d+\] for the loss \[\], not \[\]"),
    (
        "loss",
        RandomLoss,
        "counts as a distance .* but draws random numbers: a regulariser declares is_distance = False",
    ),
    ("loss", Wide_, r"ValueError: values \(\d+, 1\) must be one number for each of the \d+ target patches"),
    ("loss", Variance, "counts as a distance .* but is -?0 if predictions equal targets, and -"),
    ("loss", FloatLoss, r"gave a float for the loss \[\], not a tensor"),
    ("target_update", OwnEMA, "gave the momentum nan, not a finite number"),
    ("target_update", Meddling, "changed encoder.norm.weight, which the optimiser alone may change"),
    ("target_update", Every, "changes its attribute steps in each call, and no checkpoint has it"),
    ("target_update", Same, "gave a target encoder whose weights are the encoder's own tensors"),
    ("target_update", WithGraph, r"recorded a gradient of target_encoder\S+: decorate update with @torch.no_grad"),
    ("transform", OwnTransform, "gave different results in two calls"),
    ("transform", Array, "gave a ndarray, not a Pillow image"),
    ("transform", GreyImage, "gave an image in mode 'L', not 'RGB'"),
    ("transform", LongAction, r"gave the action \[0.0, 1.0\], not as many finite floats as its action_size \(=1\)"),
    ("transform", InfiniteAction, r"gave the action \[inf\], not as many finite floats"),
    ("transform", Painting, "changed the image that it was given, which other views use too"),
]


@pytest.mark.parametrize(("slot", "part", "message"), BREACHES, ids=[part.__name__ for _, part, _ in BREACHES])
def test_a_breach_is_named(own, slot, part, message):
    config = own(slot, part)
    with seeded(config.train.seed, 7):
        jepa = build_recipe(config).train()
    with pytest.raises(ContractError, match=rf"(?s){message}") as caught:
        check_parts(config, CPU, weights_of=jepa)
    assert f"{slot} 'own'" in str(caught.value)


@pytest.mark.parametrize(
    ("slot", "part", "declaration"), [("masker", Shown, "allow_overlap"), ("encoder", Mixing, "mixes_patches")]
)
def test_what_would_be_a_leak_can_be_meant(own, slot, part, declaration):
    meant = type("Meant", (part,), {declaration: True})
    check_parts(own(slot, meant), CPU)


def test_the_pixels_of_hidden_patches_do_not_reach_an_encoder(own):
    own("encoder", NotHiding)
    raw = {**RAW, "encoder": {**RAW["encoder"], "name": "own"}, "masker": {"name": "in_place"}}
    with pytest.raises(ContractError, match="encoder 'own' gave other tokens of a context if pixels outside"):
        check_parts(config_from_dict({**raw, "predictor": {"name": "tokens"}}), CPU)


@pytest.mark.parametrize("input_norm", ["none", "image"])
def test_statistics_of_the_whole_image_are_no_leak(own, input_norm):
    class Normalising(ViT):
        pass

    raw = own("encoder", Normalising).to_dict()
    raw["encoder"]["input_norm"] = input_norm
    check_parts(config_from_dict(raw), CPU)


def test_a_transform_without_num_draws(own):
    class Plain:
        def __init__(self) -> None: ...

        def __call__(self, image, draws):
            raise AssertionError

    with pytest.raises(ValueError, match=r"transforms\[1\]: 'own' must have the attribute num_draws, how many random"):
        check_parts(own("transform", Plain), CPU)


def test_num_draws(own):
    trial = contract.Trial("transform", "own")
    with pytest.raises(ContractError, match=r"transform 'own' has num_draws \(=1.5\), not a number of at least 0"):
        contract.check_transform(trial, NoDraws())


def test_a_window_of_another_kind():
    class Cropping(OwnTransform):
        def window(self, size, draws):
            return (0, 0, 1, 1)

    with pytest.raises(ContractError, match="gave a tuple as its window"):
        contract.check_transform(contract.Trial("transform", "own"), Cropping())


@pytest.mark.parametrize(
    ("slot", "part", "message"),
    [
        (
            "target_update",
            UpdateNoSuper,
            "target_update: 'own' must be a torch.nn.Module whose constructor calls super()",
        ),
        ("predictor", Lazy, "predictor: 'own' has parameters whose shape is unknown before its first call"),
    ],
)
def test_a_module_that_cannot_be_built(own, slot, part, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_recipe(own(slot, part))


def test_a_recipe_that_cannot_be_built():
    class Unready(TwoViews):
        def __init__(self, *, encoder: nn.Module, head: nn.Module) -> None:
            self.head = head

    class Misnamed(TwoViews):
        def __init__(self, *, encoder: nn.Module, head: nn.Module, target_update: TargetUpdate) -> None:
            Recipe.__init__(self, encoder=encoder, target_update=target_update)
            self.head, self.teacher = head, self.follow("encoder")
            self.teacher_head = self.follow("head")

    RECIPES._obj_map |= {"unready": Unready, "misnamed": Misnamed}
    raw = {"head": {"name": "mlp", "out_dim": 4, "layers": 1}, "recipe": {"name": "unready"}}
    with pytest.raises(ValueError, match="recipe: 'unready' failed in its constructor: AttributeError: cannot assign"):
        build_recipe(config_from_dict(two_views(**raw)))
    raw |= {"recipe": {"name": "misnamed"}, "target_update": {"name": "ema"}}
    with pytest.raises(ValueError, match=r"recipe: 'misnamed' must keep self.follow\('head'\) as self.target_head"):
        build_recipe(config_from_dict(two_views(**raw)))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (NoDepth, "encoder: 'own' must have the attribute depth, which the recipe reads"),
        (Broken, "encoder: 'own' failed in its constructor: KeyError: 'weight'"),
        (NoSuper, "encoder: 'own' must be a torch.nn.Module whose constructor calls super().__init__()"),
        (NoModule, "encoder: 'own' must be a torch.nn.Module whose constructor calls super().__init__()"),
    ],
)
def test_a_part_that_cannot_be_built(own, part, message):
    with pytest.raises(ValueError) as caught:
        build_recipe(own("encoder", part))
    assert str(caught.value) == message


class Brightest(nn.Module):
    """The channel of each patch's first pixel that is brightest: a target of three codes."""

    needs_encoder = False
    out_dim = 3

    def __init__(self):
        super().__init__()

    def forward(self, images, patches, encoder):
        return patches.gather(images[:, :, ::4, ::4].flatten(2).transpose(1, 2)).argmax(1)


def test_a_loss_of_codes(own):
    """It is given codes of images, and no prediction equals them."""
    own("target", Brightest)

    def check(loss):
        config = config_from_dict({**RAW, "target": {"name": "own"}, "loss": {"name": loss}})
        recipe, masks = build_recipe(config), build_masker(config)(np.arange(2), seed=0, epoch=0)
        contract.check_loss(contract.Trial("loss", loss, recipe), recipe, torch.randn(2, 3, 16, 16), masks)

    check("cross_entropy")
    with pytest.raises(ContractError, match="loss 'smooth_l1' failed in a trial call: ValueError: a distance needs"):
        check("smooth_l1")


def test_a_run_ends_before_its_first_step(own, tiny, tmp_path):
    own("masker", GlobalNumbers)
    with pytest.raises(ContractError, match="masker 'own' gave different results"):
        train(tiny("masker={name: own}"))
    assert not (tmp_path / "run").exists()


class Centre(OwnTarget):
    """A part with a buffer that training changes, and dropout."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__(embed_dim=embed_dim)
        self.register_buffer("centre", torch.zeros(embed_dim))
        self.linear = nn.Linear(embed_dim, embed_dim).requires_grad_(False)

    def forward(self, images, patches, encoder):
        s_y = self.linear(RepresentationTarget.forward(self, images, patches, encoder))
        self.centre.lerp_(s_y.detach().mean(0), 0.1)
        return nn.functional.dropout(s_y - self.centre)


def test_losses_are_the_same_with_and_without_the_check(own, tiny, tmp_path, monkeypatch):
    own("masker", OwnMasker)
    own("target", Centre)
    checked = []
    monkeypatch.setattr(build, "check_parts", lambda *a, **k: checked.append(check_parts(*a, **k)))
    parts = ("masker={name: own}", "target={name: own}")
    folders = [train(tiny(*parts, f"train.output_dir={tmp_path / 'with'}"))]
    assert checked == [None]
    monkeypatch.setattr(build, "check_parts", lambda *a, **k: None)
    folders.append(train(tiny(*parts, f"train.output_dir={tmp_path / 'without'}")))
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(f)] for f in folders]
    assert len(lines[0]) == 6
    assert lines[0] == lines[1]


def test_random_states_are_restored(own):
    config = own("target", Centre)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    jepa = build_recipe(config)
    with pytest.raises(ContractError, match="the first weights differ"):  # of another seed
        check_parts(config, CPU, weights_of=jepa)
    torch.set_rng_state(before[0])
    check_parts(config, CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_recipes_of_jepa_kit_cost_nothing(monkeypatch):
    config = config_from_dict(RAW)
    jepa = build_recipe(config)
    monkeypatch.setattr(contract, "trial_recipe", lambda *_: pytest.fail("a recipe was built"))
    check_parts(config, CPU, weights_of=jepa)


@pytest.mark.parametrize("slot", sorted(SLOTS))
def test_a_form_names_the_file_of_the_interface(slot):
    (file,) = re.findall(r"jepa_kit/[\w/]+\.py", FORMS[slot])
    name = "".join(map(str.capitalize, slot.split("_")))
    assert f"class {name}(Protocol)" in (Path(__file__).parents[2] / file).read_text()
