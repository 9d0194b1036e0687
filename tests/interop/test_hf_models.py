"""Models of transformers with class tokens, learned positions, relative biases and layer scale, in both directions."""

from __future__ import annotations

import json

import pytest
import torch

from jepa_kit.config import config_from_dict
from jepa_kit.errors import CheckpointError
from jepa_kit.interop.formats import convert, read_encoder, write
from jepa_kit.interop.frozen import load_encoder
from jepa_kit.interop.hf_models import MODELS

transformers = pytest.importorskip("transformers")

CLASS = {"class_token": True}
LEARNED = {**CLASS, "positions": "learned"}
BEIT = {**CLASS, "positions": "none", "mask_token": True}
CASES = {
    "mae": ("vit_mae", CLASS),
    "mae, wide": ("vit_mae", {**CLASS, "image_size": (32, 64), "norm_eps": 1e-4}),
    "dino": ("vit", LEARNED),
    "ibot": ("vit", {**LEARNED, "mask_token": True, "interpolation_offset": 0.1, "patch_size": 16}),
    "msn": ("vit_msn", {**LEARNED, "qkv_bias": False}),
    "beit": ("beit", {**BEIT, "relative_bias": "per_block", "layer_scale": 0.1, "final_norm": False}),
    "beit, shared": ("beit", {**BEIT, "relative_bias": "shared"}),
    "beit, absolute": ("beit", {**BEIT, "positions": "learned", "mask_token": False}),
    "beit, factors from 0": ("beit", {**BEIT, "layer_scale": 0.0}),
    "data2vec": ("data2vec-vision", {**BEIT, "relative_bias": "shared", "layer_scale": 1e-4}),
    "data2vec, per block": ("data2vec-vision", {**BEIT, "relative_bias": "per_block"}),
}


def tokens_of(folder, images):
    """What transformers' model gives: [B, 1 + N, D]."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    more = {} if name == "ViTMAEModel" else {"add_pooling_layer": False}
    more = {} if name == "ViTMSNModel" else more
    model = getattr(transformers, name).from_pretrained(folder, **more).eval()
    return forward(model, images)


def forward(model, images):
    n = (images.shape[-2] // model.config.patch_size) * (images.shape[-1] // model.config.patch_size)
    noise = {"noise": torch.arange(n).expand(len(images), -1).float()}  # keeps MAE's patches in order
    with torch.no_grad():
        return model(images, **(noise if "MAE" in type(model).__name__ else {})).last_hidden_state


def ours(encoder, images):
    with torch.no_grad():
        (tokens,) = encoder.forward_tokens(images)
    return torch.cat([tokens.prefix, tokens.patches.unflatten(0, (len(images), -1))], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_our_tokens_and_back(make_weights, tmp_path, case):
    model_type, options = CASES[case]
    weights = make_weights(**options)
    write(weights, tmp_path / "hf", "hf", model_type=model_type)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == model_type
    images = torch.randn(2, 3, *weights.architecture.image_size, generator=torch.Generator().manual_seed(0))
    expected = tokens_of(tmp_path / "hf", images)
    again = read_encoder(tmp_path / "hf", None)
    for held in (weights, again):
        assert (ours(held.module(), images) - expected).abs().max() < 1e-5 * expected.abs().max()
    model = MODELS[model_type]
    for name, value in again.state.items():
        if name.endswith("qkv.bias") and not model.key_bias:  # the third of keys is not stored
            query, key, values = value.chunk(3)
            assert not key.any()
            assert torch.equal(torch.cat([query, values]), torch.cat(weights.state[name].chunk(3)[::2]))
        else:
            assert torch.equal(value, weights.state[name]), name
    assert set(weights.state) - set(again.state) <= {"mask_token"}


OPTIONS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
THEIRS = {
    "vit": ("ViT", {}),
    "vit_msn": ("ViTMSN", {"layer_norm_eps": 1e-5}),
    "vit_mae": ("ViTMAE", {"mask_ratio": 0.0}),
    "beit": ("Beit", {"use_relative_position_bias": True}),
    "beit, shared": ("Beit", {"use_shared_relative_position_bias": True, "use_mean_pooling": False}),
    "beit, absolute": ("Beit", {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}),
    "data2vec-vision": ("Data2VecVision", {"use_shared_relative_position_bias": True, "use_mask_token": True}),
    "data2vec, per block": ("Data2VecVision", {"use_relative_position_bias": True}),
}


def save_theirs(folder, case):
    """A model of transformers, all its parameters moved so that a dropped one shows; the class position of MAE is 0."""
    name, options = THEIRS[case]
    config = getattr(transformers, f"{name}Config")(**OPTIONS, image_size=32, patch_size=8, **options)
    torch.manual_seed(0)
    more = {} if name in ("ViTMAE", "ViTMSN") else {"add_pooling_layer": False}
    model = getattr(transformers, f"{name}Model")(config, **more).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not (name == "ViTMAE" and "position" in parameter_name):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_our_encoder_gives_the_tokens_of_transformers(tmp_path, case):
    model = save_theirs(tmp_path, case)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(tmp_path, encoder=None, positions="file")
    expected = forward(model, images)
    assert (encoder.forward_features(images) - expected[:, 1:]).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("options", "model_type", "message"),
    [
        (
            {**LEARNED, "registers": 4},
            None,
            r"encoder.registers \(=4\) cannot be stored in hf: .* \(no model of transformers has it\)",
        ),
        ({"input_norm": "image"}, None, r"encoder.input_norm \(='image'\)"),
        ({**CLASS, "positions": "rotary"}, None, r"encoder.positions \(='rotary'\)"),
        (LEARNED, "vit_mae", "not the model .vit_mae. of transformers has it"),
        ({**BEIT, "relative_bias": "shared", "image_size": (32, 48)}, "beit", "relative_bias .* of a grid of 4 x 6"),
        ({**LEARNED, "image_size": (32, 48)}, "beit", r"positions \(='learned'\) of a grid of 4 x 6"),
        ({}, "vit", r"encoder.class_token \(=False\)"),
    ],
)
def test_what_no_model_has_is_an_error(make_weights, tmp_path, options, model_type, message):
    with pytest.raises(CheckpointError, match=message):
        write(make_weights(**options), tmp_path / "hf", "hf", model_type=model_type)
    assert not (tmp_path / "hf").exists()


def test_a_model_type_is_one_of_those_of_hf(make_weights, tmp_path):
    with pytest.raises(ValueError, match=r"model_type \(='vitt'\) must be one of ijepa, vit_mae, vit, "):
        write(make_weights(), tmp_path / "a", "hf", model_type="vitt")
    with pytest.raises(ValueError, match=r"model_type \(='vit'\) is for hf"):
        write(make_weights(), tmp_path / "a", "safetensors", model_type="vit")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_both_kinds_of_relative_bias_are_refused(tmp_path):
    save_theirs(tmp_path, "beit")
    change_config(tmp_path, use_shared_relative_position_bias=True)
    with pytest.raises(CheckpointError, match="has both use_relative_position_bias and use_shared_rel"):
        read_encoder(tmp_path, None)


def test_relative_positions_of_an_image_that_is_not_square_are_refused(tmp_path):
    save_theirs(tmp_path, "beit")
    change_config(tmp_path, image_size=[32, 48])
    with pytest.raises(CheckpointError, match=r"image_size \(=\[32, 48\]\) with relative positions"):
        read_encoder(tmp_path, None)


def test_another_model_is_refused(tmp_path):
    save_theirs(tmp_path, "vit")
    change_config(tmp_path, model_type="swin")
    with pytest.raises(CheckpointError, match=r"model_type \(='swin'\) must be one of ijepa, vit_mae, vit,"):
        read_encoder(tmp_path, None)


def test_a_class_token_of_mae_has_no_position(tmp_path):
    save_theirs(tmp_path, "vit_mae")
    model = transformers.ViTMAEModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.embeddings.position_embeddings.add_(1.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="with zeros for the class token"):
        read_encoder(tmp_path, None)


def test_a_run_with_a_class_token_converts(tmp_path):
    from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
    from jepa_kit.from_config import build_recipe

    raw = {
        "masker": {"name": "random"},
        "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "class_token": True},
        "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2, "prefix": True},
        "target": {"name": "pixel"},
        "loss": {"name": "l2"},
        "target_update": {"name": "none"},
        "data": {"image_size": 32},
    }
    config = config_from_dict(raw)
    jepa = build_recipe(config).eval()
    file = save_checkpoint(tmp_path, Checkpoint(3, jepa.state_dict(), {}, config.to_dict(), {}, {}, {}))
    convert(file, tmp_path / "hf", to="hf")
    images = torch.randn(2, 3, 32, 32)
    assert (tokens_of(tmp_path / "hf", images) - ours(jepa.encoder, images)).abs().max() < 1e-5
