"""transformers loads our folder and gives our tokens, and the other way round."""

import json

import PIL.Image
import pytest
import torch

from jepa_kit.errors import CheckpointError
from jepa_kit.interop import hf
from jepa_kit.interop.formats import read_encoder, write
from jepa_kit.interop.frozen import FrozenEncoder, load_encoder

transformers = pytest.importorskip("transformers")

SIZES = [
    {},
    {"patch_size": 4, "image_size": (32, 32), "depth": 3},
    {"patch_size": 14, "image_size": (56, 56), "embed_dim": 32, "num_heads": 4, "mlp_hidden": 128},
    {"patch_size": 16, "image_size": (32, 64), "norm_eps": 1e-4},
    {"qkv_bias": False, "embed_dim": 24, "num_heads": 3},
]


def theirs(folder, images):
    model = transformers.IJepaModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(images).last_hidden_state


def made_by_transformers(folder, **options):
    """An IJepaModel with its own first weights (norms and biases moved, so that a dropped one shows), saved."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.IJepaConfig(**{**sizes, "image_size": 32, "patch_size": 8, **options})
    torch.manual_seed(0)
    model = transformers.IJepaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_transformers_gives_our_tokens(make_weights, tmp_path, sizes):
    weights = make_weights(**sizes)
    write(weights, tmp_path / "a", "hf")
    h, w = weights.architecture.image_size
    images = torch.randn(2, 3, h, w)
    ours = FrozenEncoder(weights).forward_features(images)
    assert (theirs(tmp_path / "a", images) - ours).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 4, "layer_norm_eps": 1e-5},
        {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128},
        {"qkv_bias": False},
    ],
    ids=str,
)
def test_our_encoder_gives_the_tokens_of_transformers(tmp_path, options):
    model = made_by_transformers(tmp_path, **options)
    images = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    encoder = load_encoder(tmp_path, encoder=None, positions="file")
    with torch.no_grad():
        expected = model(images).last_hidden_state
    assert (encoder.forward_features(images) - expected).abs().max() < 1e-5


def test_names_in_memory_are_read_too(tmp_path):
    """Those that a state dict has since transformers 5."""
    model = made_by_transformers(tmp_path)
    found = read_encoder(tmp_path, None, positions="file").state
    again = hf.from_names({k: v for k, v in model.state_dict().items() if k != hf.TABLE})
    assert set(found) == set(again)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_model_of_transformers_has_a_table_of_its_own(tmp_path):
    made_by_transformers(tmp_path)
    with pytest.raises(CheckpointError, match=r"embeddings.position_embeddings of .* is not the sine-cosine table"):
        read_encoder(tmp_path, None)


def test_a_folder_of_another_maker_does_not_say_which_encoder_it_holds(tmp_path):
    made_by_transformers(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not state which encoder it contains. .* Use encoder=None for any"):
        load_encoder(tmp_path, positions="file")
    held = load_encoder(tmp_path, encoder="context", positions="file")
    assert held.provenance.encoder == "context"
    assert held.about.endswith("that it is the context encoder is what its reader said")
    assert load_encoder(tmp_path, encoder=None, positions="file").about.startswith(
        "encoder (whether target or context is not stated) of"
    )


def test_card_and_preprocessor_of_another_maker(tmp_path):
    made_by_transformers(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\nlicense: cc-by-nc-4.0\n---\ntext")
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.6, 0.7, 0.8]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    held = load_encoder(tmp_path, encoder=None, positions="file")
    assert held.provenance.licence == "cc-by-nc-4.0"
    assert "normalises with mean (0.5, 0.5, 0.5); the release trained with ImageNet's" in held.about
    white = held.preprocess(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    assert (white[0, :, 0, 0] - torch.tensor([0.5 / 0.6, 0.5 / 0.7, 0.5 / 0.8])).abs().max() < 1e-6


def test_our_card_and_preprocessor(make_weights, tmp_path):
    write(make_weights(licence="CC-BY-NC-4.0"), tmp_path / "a", "hf")
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\nlibrary_name: transformers\n")
    assert "target encoder of a test; ViT of width 16" in card
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "a")
    pixels = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    found = processor(pixels, return_tensors="pt")["pixel_values"]
    expected = load_encoder(tmp_path / "a").preprocess(pixels[None])
    assert (found - expected).abs().max() < 1e-5
    assert processor(torch.zeros(3, 50, 40), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert processor.resample == PIL.Image.Resampling.BILINEAR


def test_our_note_stays_through_transformers(make_weights, tmp_path):
    """A model that was loaded and saved again still says which encoder it is."""
    write(make_weights(licence="CC-BY-NC-4.0"), tmp_path / "a", "hf")
    transformers.IJepaModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert read_encoder(tmp_path / "b", "target").provenance.licence == "CC-BY-NC-4.0"


def test_a_classifier_is_left_out_and_said(tmp_path):
    config = transformers.IJepaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, image_size=32, patch_size=8
    )
    transformers.IJepaForImageClassification(config).save_pretrained(tmp_path)
    found = read_encoder(tmp_path, None, positions="file")
    assert found.provenance.notes == ("left out: classifier.bias, classifier.weight",)


def test_weights_in_several_files(tmp_path):
    model = made_by_transformers(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="8KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    one, several = (read_encoder(tmp_path / name, None, positions="file").state for name in ("one", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)
    next((tmp_path / "several").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"index.json names 'model-0.*', which is not in the folder"):
        read_encoder(tmp_path / "several", None, positions="file")


def test_an_old_file_of_torch(tmp_path):
    model = made_by_transformers(tmp_path)
    new = read_encoder(tmp_path, None, positions="file").state
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    old = read_encoder(tmp_path, None, positions="file").state
    assert all(torch.equal(old[name], new[name]) for name in new)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, r"model_type \(='swin'\) must be one of ijepa, vit_mae"),
        ({"hidden_act": "relu"}, r"hidden_act \(='relu'\) must be 'gelu'"),
        ({"hidden_size": "wide"}, "config.json has a size that is no number: "),
        ({"num_hidden_layers": 3}, "missing: blocks.2.norm1.weight"),
        ({"num_attention_heads": 3}, r"sizes that no encoder has: num_heads \(=3\) must divide the width \(=16\)"),
        ({"patch_size": 16}, r"misshapen: patch_embed.proj.weight \(\(16, 3, 8, 8\), not \(16, 3, 16, 16\)\)"),
        ({"image_size": 64}, "has 16 positions, but a grid of 8 x 8 has 64"),
    ],
)
def test_a_config_that_does_not_fit(make_weights, tmp_path, config, message):
    write(make_weights(), tmp_path / "a", "hf")
    held = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(held | config))
    with pytest.raises(CheckpointError, match=message):
        read_encoder(tmp_path / "a", allow_unchecked=True)


def test_files_that_are_missing_or_damaged(make_weights, tmp_path):
    write(make_weights(), tmp_path / "a", "hf")
    state = hf.to_names(make_weights())
    for name, message in (
        (hf.TABLE, r"position_embeddings of .* is missing"),
        ("encoder.layer.0.attention.attention.key.bias", r"missing: blocks.0.attn.qkv.bias; unexpected: blocks.0.attn"),
    ):
        hf.write_file(tmp_path / "a" / "model.safetensors", {k: v for k, v in state.items() if k != name}, {})
        with pytest.raises(CheckpointError, match=message):
            read_encoder(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config.json, but no model.safetensors"):
        read_encoder(tmp_path / "a")
    for text, message in (
        ("[1]", r"config.json must contain a mapping, not a list"),
        ("{", r"config.json is not JSON: "),
    ):
        (tmp_path / "a" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_encoder(tmp_path / "a")
