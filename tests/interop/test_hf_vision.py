"""Frozen vision models of transformers that jepa_kit does not have, against transformers' own calls."""

import json
import re

import pytest
import torch

from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.errors import CheckpointError
from jepa_kit.from_config import build_recipe
from jepa_kit.frozen import digest_of
from jepa_kit.interop.hf_vision import VisionModel, is_other_model, read
from jepa_kit.interop.teacher import read_teacher
from jepa_kit.structures import PatchSets
from jepa_kit.target_updates import Frozen
from jepa_kit.training import train

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "mlp_ratio": 2,
    "image_size": 16,
    "patch_size": 4,
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
PREPROCESSOR = {"image_mean": MEAN, "image_std": STD, "do_rescale": True, "rescale_factor": 1 / 255}


def make(name, **options):
    """A model with random weights: every norm and bias too."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def save(model, folder, **preprocessor):
    model.save_pretrained(folder)
    return save_preprocessor(folder, **preprocessor)


def save_preprocessor(folder, **preprocessor):
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | preprocessor))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    model = make("Dinov2", **SIZES)
    return model, save(model, tmp_path_factory.mktemp("dinov2"))


SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 32}
MODELS = {
    "Dinov2": (1, "layernorm"),
    "Dinov2WithRegisters": (5, "layernorm"),
    "DINOv3ViT": (1, "norm"),
    "SiglipVision": (0, "post_layernorm"),
    "CLIPVision": (1, None),
    "DeiT": (2, "layernorm"),
}
"""Model -> number of tokens before the patches, and the name of its final norm."""


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_patches_of_all_layers(name, tmp_path):
    prefix, norm = MODELS[name]
    model = make(name, **SIZES)
    encoder, own = read(save(model, tmp_path), grid=(6, 6))
    assert own == (tuple(MEAN), tuple(STD))
    assert (encoder.grid, encoder.patch_size, encoder.embed_dim, encoder.depth) == ((6, 6), 4, 24, 3)
    images = torch.randn(2, 3, 24, 24)  # another size than the model's
    interpolate = {} if name in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        out = model(pixel_values=images, output_hidden_states=True, **interpolate)
        last = out.last_hidden_state[:, prefix:].flatten(0, 1)
        torch.testing.assert_close(encoder(images), last, rtol=0, atol=1e-6)
        plain = encoder.forward_layers(images, layers=(3, 0, 1), norm=False)
        for number, found in zip((3, 0, 1), plain, strict=True):
            wanted = out.hidden_states[number][:, prefix:].flatten(0, 1)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        first, again = encoder.forward_layers(images, layers=(1, 3))
        torch.testing.assert_close(again, last, rtol=0, atol=1e-5)
        wanted = out.hidden_states[1][:, prefix:].flatten(0, 1)
        wanted = wanted if norm is None else getattr(model, norm)(wanted)
        torch.testing.assert_close(first, wanted, rtol=0, atol=1e-6)


def test_models_of_jepa_kit_are_converted(tmp_path):
    """The same features, in jepa_kit's own network, which can also be shown some of the patches."""
    options = {name: value for name, value in SIZES.items() if name != "mlp_ratio"}
    model = make("ViT", **options)
    folder = save(model, tmp_path)
    assert not is_other_model(folder)
    teacher = read_teacher(weights=str(folder), patch_size=4, mean=tuple(MEAN), std=tuple(STD))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model(pixel_values=images).last_hidden_state[:, 1:].flatten(0, 1)
        torch.testing.assert_close(teacher(images), wanted, rtol=0, atol=1e-5)
        assert teacher(images, PatchSets.from_padded(torch.tensor([[0, 3], [1, 2]]))).shape == (4, 24)


def test_a_run_with_such_a_teacher(dinov2, tiny):
    """It sees its own pixels; the checkpoint has a digest of it, and a resumed run continues."""
    model, folder = dinov2
    update = f"target_update={{name: frozen, weights: {folder}}}"
    config = tiny(update, "target={name: representation, layers: [2, 3], combine: concat}")
    recipe = build_recipe(config)
    assert recipe.target.out_dim == 48
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.data.mean, config.data.std))
    own_mean, own_std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    with torch.no_grad():
        out = model(pixel_values=(pixels - own_mean) / own_std, output_hidden_states=True)
        layers = [model.layernorm(x)[:, 1:].flatten(0, 1) for x in out.hidden_states[2:]]
    wanted = torch.cat([torch.nn.functional.layer_norm(x, (24,)) for x in layers], -1)
    found = recipe.targets_at((pixels - mean) / std, PatchSets.full(2, 16))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    run = train(config)
    assert all(line["loss"] > 0 for line in read_metrics(run))
    digest = load_checkpoint(run).part("target_encoder")["_extra_state"]
    assert torch.equal(digest, digest_of(recipe.target_encoder.network))
    with pytest.raises(ValueError, match=r"Dinov2Model of transformers encodes whole images: take target\.masked"):
        build_recipe(tiny(update, "target.masked_at=input")).targets_at(pixels, PatchSets.full(2, 16))


def test_first_weights_of_a_run_do_not_depend_on_the_teacher(tmp_path):
    """transformers draws the weights of layers that a file lacks; parts that are built later draw as without it."""
    model = make("DeiT", **SIZES)
    weights = {name: x for name, x in model.state_dict().items() if not name.startswith("pooler.")}
    model.save_pretrained(tmp_path, state_dict=weights)
    save_preprocessor(tmp_path)
    state = torch.random.get_rng_state()
    Frozen(weights=str(tmp_path), patch_size=4, grid=(4, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_vision_model_of_a_pair(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "projection_dim": 8}
    model = make("CLIP", text_config=text, vision_config={**SIZES, "projection_dim": 8}, projection_dim=8)
    encoder, _ = read(save(model, tmp_path))
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        wanted = model.vision_model(pixel_values=images).last_hidden_state[:, 1:].flatten(0, 1)
        torch.testing.assert_close(encoder(images), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ConvNext",
            {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
            "(8, 8, 8), (16, 4, 4), not",
        ),
        ("Swin", {**SWIN, "window_size": 4}, "gives layers of the shapes (64, 8), (16, 16), (16, 16), not one token"),
        ("Swin", SWIN, "does not give tokens of images of 32 x 32 pixels: The size of tensor a (16) must match"),
        ("ResNet", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}, "has no square patches, so it"),
        ("Dinov2", {**SIZES, "patch_size": (4, 8)}, "has no square patches, so it cannot be a teacher"),
    ],
)
def test_a_model_without_tokens_of_patches(name, options, message, tmp_path):
    folder = save(make(name, **options), tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(folder, grid=(8, 8))


class Strange(torch.nn.Module):
    """A model whose tokens are in another order, or that refuses images."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.config, self.kind = model, model.config, kind

    def forward(self, pixel_values, **options):
        if self.kind == "refuses":
            raise ValueError("Input image size (24*24) doesn't match model (16*16).\nMore")
        out = self.model(pixel_values, **options)
        move = (lambda x: x.roll(-1, 1)) if self.kind == "last" else (lambda x: x)
        out.hidden_states = [move(x) for x in out.hidden_states]
        return out


def test_tokens_in_another_order(dinov2):
    with pytest.raises(CheckpointError, match="DINO: Strange does not give the tokens of patches row by row"):
        VisionModel(Strange(dinov2[0], "last"), (4, 4), "DINO")


def test_images_of_a_size_that_it_does_not_take(dinov2):
    message = "DINO: Strange does not give tokens of images of 24 x 24 pixels: Input image size (24*24) doesn't match"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        VisionModel(Strange(dinov2[0], "refuses"), (6, 6), "DINO")


def test_a_final_norm_of_another_name(dinov2):
    """The last layer has it, and the others can be taken without one."""
    encoder = VisionModel(Strange(dinov2[0], "named"), None, "DINO")
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        wanted = dinov2[0](images).last_hidden_state[:, 1:].flatten(0, 1)
        torch.testing.assert_close(encoder(images), wanted, rtol=0, atol=1e-6)
    assert len(encoder.forward_layers(images, layers=(1, 3), norm=False)) == 2
    with pytest.raises(ValueError, match="Strange has no final norm that could be applied to layers before the last"):
        encoder.forward_layers(images, layers=(1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, "scales pixels by 0.00784"),
        ({"do_rescale": False}, "scales pixels by 1.0, but images of a run by 1 / 255"),
        ({"image_std": [0.2, 0.3]}, "must have image_std with three numbers, not [0.2, 0.3]"),
        ({"image_mean": None}, "must have image_mean with three numbers, not None"),
    ],
)
def test_a_preprocessor_that_a_run_cannot_follow(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(save(make("Dinov2", **SIZES), tmp_path, **change))


def test_a_preprocessor_that_does_not_normalise(tmp_path):
    _, own = read(save(make("Dinov2", **SIZES), tmp_path, do_normalize=False))
    assert own == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_folder_that_lacks_something(tmp_path):
    folder = save(make("Dinov2", **SIZES), tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json, which gives the mean and std"):
        read(folder)
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of Dinov2Model: layernorm\.weight, \.\.\."):
        read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"transformers cannot load {re.escape(str(folder))}: "):
        read(folder)


def test_without_transformers(dinov2, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CheckpointError, match="has a model of transformers, which is not installed: "):
        read(dinov2[1])
