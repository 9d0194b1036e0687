"""Runs of any recipe that begin from the weights of another run."""

import pytest
import torch
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.errors import CheckpointError
from jepa_kit.from_config import build_recipe
from jepa_kit.interfaces import TargetUpdate
from jepa_kit.interop.formats import read_encoder
from jepa_kit.interop.start import init_from
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES

BASE = {
    "data": {"image_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    "train": {"precision": "float32", "device": "cpu"},
}
ROTARY = {"positions": "rotary"}
VIT = {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
PREFIX = {**VIT, "class_token": True, "registers": 1, "positions": "learned", "layer_scale": 0.1}
CONV = {"name": "conv", "embed_dim": 16, "depth": 2, "kernel": 3, "patch_size": 4}
EMA = {"name": "ema"}
JEPA = {
    "masker": {"name": "multiblock"},
    "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
    "target": {"name": "representation"},
    "loss": {"name": "smooth_l1"},
    "target_update": EMA,
}


@RECIPES.register("with_heads")
class WithHeads(Recipe):
    """A recipe without a predictor, whose head has a follower."""

    num_views = (1, None)
    masked = False

    def __init__(self, *, encoder: nn.Module, head: nn.Module, target_update: TargetUpdate) -> None:
        super().__init__(encoder=encoder, target_update=target_update)
        self.head = head
        self.target_head = self.follow("head")


HEADS = {"recipe": {"name": "with_heads"}, "head": {"name": "mlp", "hidden": 8, "out_dim": 4}, "target_update": EMA}


@pytest.fixture
def written(tmp_path):
    """Return a function that writes the checkpoint of a recipe with random weights: (its file, its state)."""

    def write(raw, seed=1):
        config = config_from_dict({**BASE, **raw})
        torch.manual_seed(seed)
        state = build_recipe(config).state_dict()
        state = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in state.items()}
        return save_checkpoint(tmp_path, Checkpoint(7, state, {}, config.to_dict(), {}, {})), state

    return write


def built(raw):
    torch.manual_seed(0)
    return build_recipe(config_from_dict({**BASE, **raw}))


def parts(state):
    return {name.partition(".")[0] for name in state}


def same(jepa, state, part, other=None):
    own = {name: x for name, x in jepa.state_dict().items() if name.startswith(f"{part}.")}
    assert own
    return all(torch.equal(x, state[name.replace(part, other or part, 1)]) for name, x in own.items())


@pytest.mark.parametrize("raw", [{"encoder": PREFIX, **HEADS}, {"encoder": CONV, **HEADS}, {"encoder": CONV, **JEPA}])
def test_all_parts_of_the_same_recipe(raw, written):
    file, state = written(raw)
    jepa = built(raw)
    start = init_from(jepa, file)
    assert jepa.state_dict().keys() == state.keys()
    assert all(same(jepa, state, part) for part in parts(state))
    assert not any(line.startswith("not in the file") for line in start.lines)
    if raw["encoder"] is CONV:
        assert start.lines[0] == f"weights: conv of {file}; step 7; licence not stated"
        assert start.lines[1] == "note: names and shapes of weights are compared, but no options that these do not show"
    else:
        assert start.lines[0].startswith(f"weights: context encoder of {file.name} (jepa_kit); ViT of width 16")
        assert "class_token True" in start.lines[0]


@pytest.mark.parametrize(("theirs", "ours"), [(HEADS, JEPA), (JEPA, HEADS)])
@pytest.mark.parametrize("encoder", [PREFIX, CONV])
def test_encoders_of_another_recipe(theirs, ours, encoder, written):
    file, state = written({"encoder": encoder, **theirs})
    jepa = built({"encoder": encoder, **ours})
    first = built({"encoder": encoder, **ours}).state_dict()
    lines = init_from(jepa, file).lines
    name = theirs.get("recipe", {"name": "jepa"})["name"]
    assert f"note: the file is of the recipe {name!r}: only its encoders are loaded" in lines
    others = sorted(parts(first) - {"encoder", "target_encoder"})
    assert lines[-1] == f"not in the file, newly initialised: {', '.join(others)}"
    assert same(jepa, state, "encoder")
    assert same(jepa, state, "target_encoder")
    assert all(same(jepa, first, part) for part in others)


def test_followers_that_the_file_lacks_begin_as_what_they_follow(written):
    file, state = written({"encoder": VIT, **HEADS, "target_update": {"name": "none"}})
    assert parts(state) == {"encoder", "head"}
    jepa = built({"encoder": VIT, **HEADS})
    init_from(jepa, file)
    assert same(jepa, state, "target_head", "head")
    assert same(jepa, state, "target_encoder", "encoder")


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (PREFIX, VIT, r"encoder.layer_scale \(=None\) must be 0.1, as in the weights of"),
        (VIT, {**VIT, "class_token": True}, r"encoder.class_token \(=True\) must be False, as in the weights of"),
        (
            {**VIT, "positions": "rotary", "rotary_base": 10.0},
            {**VIT, "positions": "rotary"},
            r"rotary_base \(=100.0\)",
        ),
        ({**VIT, "relative_bias": "shared"}, VIT, r"encoder.relative_bias \(=none\) must be shared"),
        (CONV, {**CONV, "kernel": 5}, r"the run's encoder \(train.init_from: .*misshapen: blocks.0.conv.weight"),
        (VIT, CONV, r"the run's encoder is a ConvEncoder, but that of .* is 'vit': they must be the same"),
        (CONV, VIT, r"encoder.name \(='conv'\) must be 'vit'"),
    ],
)
def test_other_architectures(theirs, ours, message, written):
    file, _ = written({"encoder": theirs, **HEADS})
    jepa = built({"encoder": ours, **HEADS})
    before = {name: x.clone() for name, x in jepa.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        init_from(jepa, file)
    assert all(torch.equal(x, before[name]) for name, x in jepa.state_dict().items())


def test_a_head_of_another_size(written):
    file, _ = written({"encoder": VIT, **HEADS})
    jepa = built({"encoder": VIT, **HEADS, "head": {"name": "mlp", "hidden": 8, "out_dim": 5}})
    with pytest.raises(CheckpointError, match=r"the run's head \(train.init_from: .*misshapen"):
        init_from(jepa, file)


def test_another_first_layer_scale_is_no_difference(written):
    file, state = written({"encoder": PREFIX, **HEADS})
    jepa = built({"encoder": {**PREFIX, "layer_scale": 1e-5}, **HEADS})
    init_from(jepa, file)
    assert same(jepa, state, "encoder")


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_encoders_of_any_recipe_are_read(encoder, written):
    """The view's transforms, which may be user-defined, do not matter."""
    raw = {"encoder": PREFIX, **HEADS}
    file, state = written({**raw, "data": {**BASE["data"], "views": [{"transforms": None}, {"image_size": 8}]}})
    weights = read_encoder(file, encoder)
    part = "target_encoder" if encoder == "target" else "encoder"
    assert all(torch.equal(x, state[f"{part}.{name}"]) for name, x in weights.state.items())
    module = weights.module()
    images = torch.randn(2, 3, 16, 16)
    jepa = built(raw)
    jepa.load_state_dict(state)
    with torch.no_grad():
        expected = jepa.encoder_for(encoder).eval().forward_tokens(images)[0]
        found = module.forward_tokens(images)[0]
    torch.testing.assert_close(found.prefix, expected.prefix)
    torch.testing.assert_close(found.patches, expected.patches)
