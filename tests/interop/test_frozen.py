"""``load_encoder``: one line, any format, the recorded numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

import jepa_kit
from jepa_kit.errors import CheckpointError
from jepa_kit.interop.formats import write
from jepa_kit.interop.frozen import FrozenEncoder

HEADS = 4


@pytest.mark.parametrize("format", ["official", "jepa_kit", "hf", "timm", "safetensors", "onnx"])
def test_every_format_gives_the_recorded_tokens(converted, recorded, format):
    heads = HEADS if format == "official" else None
    encoder = jepa_kit.load_encoder(converted[format], num_heads=heads)
    tokens = encoder.forward_features(recorded["images"])
    assert tokens.shape == (2, 64, 48)
    assert (tokens - recorded["target_encoder_output"]).abs().max() < 1e-5
    assert (encoder.embed(recorded["images"]) - recorded["target_encoder_output"].mean(dim=1)).abs().max() < 1e-5
    assert torch.equal(encoder(recorded["images"]), tokens)
    assert "target encoder of released_layout.pth.tar" in encoder.about or format == "official"


def test_the_context_encoder(released, recorded):
    encoder = jepa_kit.load_encoder(released, encoder="context", num_heads=HEADS)
    assert (encoder.forward_features(recorded["images"]) - recorded["encoder_output"]).abs().max() < 1e-5
    assert encoder.about.startswith("context encoder of released_layout.pth.tar (released layout); ViT of width 48")


def test_it_is_frozen(released):
    encoder = jepa_kit.load_encoder(released, num_heads=HEADS)
    encoder.train()
    assert not encoder.training
    assert not encoder.vit.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_preprocessing(make_weights, tmp_path):
    write(make_weights(), tmp_path / "a", "safetensors")
    encoder = jepa_kit.load_encoder(tmp_path / "a")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.new("L", (100, 50), 255)]
    found = encoder.preprocess(images)
    assert found.shape == (2, 3, 32, 32)
    middle = Image.fromarray(pixels).resize((51, 32), Image.Resampling.BILINEAR).crop((9, 0, 41, 32))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.from_numpy(np.array(middle)).float() / 255 - mean) / std).permute(2, 0, 1)
    assert (found[0] - expected).abs().max() < 1e-5
    assert torch.equal(encoder.preprocess(images[0]), found[:1])
    assert encoder.embed(found).shape == (2, 16)


def test_preprocessing_of_paths_and_arrays(make_weights, tmp_path):
    """A file, turned by its orientation mark, and arrays give what Pillow's images of the same pixels give."""
    encoder = FrozenEncoder(make_weights())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    expected = encoder.preprocess(images)
    assert torch.equal(encoder.preprocess(pixels), expected)
    assert torch.equal(encoder.preprocess(list(pixels)), expected)
    assert torch.equal(encoder.preprocess(pixels[1]), expected[1:])
    grey = pixels[0, ..., 0]
    for array in (grey, grey[..., None]):
        assert torch.equal(encoder.preprocess(array), encoder.preprocess(Image.fromarray(grey)))
    exif = Image.Exif()
    exif[0x0112] = 8  # shown a quarter turn to the left
    images[0].rotate(-90, expand=True).save(tmp_path / "a.png", exif=exif)
    images[1].save(tmp_path / "b.png")
    assert torch.equal(encoder.preprocess(str(tmp_path / "a.png")), expected[:1])
    assert torch.equal(encoder.preprocess(Image.open(tmp_path / "a.png")), expected[:1])
    assert torch.equal(encoder.preprocess([tmp_path / "a.png", tmp_path / "b.png"]), expected)
    (tmp_path / "c.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"c.jpg cannot be read as an image: no image format that Pillow knows"):
        encoder.preprocess(tmp_path / "c.jpg")
    with pytest.raises(FileNotFoundError):
        encoder.preprocess("nowhere.jpg")
    with pytest.raises(ValueError, match=r"images must be uint8 \[h, w, 3\] or \[h, w\], not float64 of shape \(4, 4"):
        encoder.preprocess(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="images must be of Pillow, paths, numpy arrays or a tensor, not a int"):
        encoder.preprocess([3])
    with pytest.raises(ValueError, match="images must be of Pillow, paths, numpy arrays or a tensor, not a NoneType"):
        encoder.preprocess(None)
    with pytest.raises(ValueError, match=r"images must be uint8 .*, not uint8 of shape \(0, 4, 3\)"):
        encoder.preprocess(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="images must have pixels, and one has 4 x 0"):
        encoder.preprocess(Image.new("RGB", (0, 4)))


def test_another_image_size_is_said(make_weights, tmp_path):
    write(make_weights(), tmp_path / "a", "safetensors")
    encoder = jepa_kit.load_encoder(tmp_path / "a", image_size=48)
    assert encoder.about.endswith("positions interpolated from 4 x 4 to 6 x 6 patches")
    assert encoder.embed(encoder.preprocess(Image.new("RGB", (60, 50)))).shape == (1, 16)
    assert jepa_kit.load_encoder(tmp_path / "a", image_size=(32, 64)).image_size == (32, 64)
    table = torch.nn.functional.interpolate(
        encoder.vit.pos_embed.view(1, 4, 4, 16).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic", align_corners=False
    )
    images = torch.randn(1, 3, 48, 48)
    content = encoder.vit.patch_embed(images, None)
    placed, _ = encoder.vit.embed(images, None)
    assert (placed[:36] - content[:36] - table.flatten(2)[0].T).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"patch_size \(=8\) must divide the height \(=50\) and the width \(=50\)"):
        jepa_kit.load_encoder(tmp_path / "a", image_size=50)


@pytest.mark.parametrize("size", [(32,), (32, 32, 3), 0, (32, -8), 32.0, "32", True])
def test_a_size_that_is_none(size):
    """It is refused before anything is read."""
    with pytest.raises(ValueError) as error:
        jepa_kit.load_encoder("nowhere.pt", image_size=size)
    assert str(error.value) == f"image_size (={size!r}) must be a number of pixels, or (height, width)"


def test_images_of_the_wrong_kind(make_weights, tmp_path):
    write(make_weights(), tmp_path / "a", "safetensors")
    encoder = jepa_kit.load_encoder(tmp_path / "a")
    with pytest.raises(ValueError, match=r"images must be float and normalised, not torch.uint8: encoder.preprocess"):
        encoder.embed(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must be uint8 \[B, 3, h, w\], not torch.float32 of shape \(1, 3, 32"):
        encoder.preprocess(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="there must be at least one image"):
        encoder.preprocess([])


def test_weights_in_half_precision_run_in_float32(make_weights, tmp_path):
    write(make_weights(dtype=torch.bfloat16), tmp_path / "a", "safetensors")
    assert jepa_kit.load_encoder(tmp_path / "a").embed(torch.randn(1, 3, 32, 32)).dtype == torch.float32


def test_another_safetensors_file(make_weights, tmp_path):
    from jepa_kit.interop import safetensors, tensor_files

    weights = make_weights()
    tensor_files.write_file(tmp_path / "a", weights.state, {"format_name": safetensors.FORMAT_NAME})
    with pytest.raises(
        CheckpointError, match="is a safetensors file, but not one of jepa_kit: it has no note 'jepa_kit'"
    ):
        jepa_kit.load_encoder(tmp_path / "a")


def test_the_writer_is_read_by_the_library(make_weights, tmp_path):
    """Ours writes one tensor at a time; the library's reader says whether it is right."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from jepa_kit.interop import tensor_files

    tensors = {
        "a": torch.randn(3, 5)[:, 1:],
        "b": torch.arange(3),
        "c": torch.randn(2, 0),
        "d": torch.randn(()).bfloat16(),
        "e": torch.randn(4, dtype=torch.float64),
    }
    tensor_files.write_file(tmp_path / "x", tensors, {"key": "ü"})
    found = load_file(tmp_path / "x")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"key": "ü", "jepa_kit.sha256": file.metadata()["jepa_kit.sha256"]}
    for length in range(8):  # of the header: the format wants tensors at a multiple of 8 bytes
        tensor_files.write_file(tmp_path / "y", {"a": torch.zeros(3)}, {"key": "k" * length})
        assert int.from_bytes((tmp_path / "y").read_bytes()[:8], "little") % 8 == 0


def test_nothing_else_is_offered():
    with pytest.raises(AttributeError, match="module 'jepa_kit' has no attribute 'load_encoders'"):
        _ = jepa_kit.load_encoders
