"""Features against the encoder's tokens, assembled by hand; loading of runs."""

import numpy as np
import pytest
import torch

from jepa_kit.encoders import ViT
from jepa_kit.errors import CheckpointError, ConfigError
from jepa_kit.evaluation.features import (
    block_source,
    extract_features,
    layer_numbers,
    load_run,
    pixel_features,
    pixel_patches,
    untrained_encoder,
)
from jepa_kit.from_config import build_recipe

IMAGES = torch.randint(0, 256, (7, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ViT(image_size=(16, 24), patch_size=4, embed_dim=16, depth=5, num_heads=2, drop_path=0.5)


def normalized(images):
    """Compute it in float64 by its definition."""
    x = images.numpy().astype(np.float64) / 255
    return torch.from_numpy((x - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)))


def test_last_is_the_mean_of_the_patch_tokens(encoder):
    found = extract_features(encoder, IMAGES, mean=MEAN, std=STD)
    tokens = encoder.double().eval()(normalized(IMAGES)).detach().numpy().reshape(7, 24, 16)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tokens.mean(axis=1), atol=1e-5)


def test_last4_are_the_outputs_of_four_blocks_each_through_the_final_norm(encoder):
    found = extract_features(encoder, IMAGES, layers="last4", mean=MEAN, std=STD)
    outputs = []
    for block in encoder.double().eval().blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    encoder(normalized(IMAGES))
    expected = [encoder.norm(x).view(7, 24, 16).mean(dim=1) for x in outputs[1:]]
    assert len(expected) == 4
    np.testing.assert_allclose(found, torch.cat(expected, dim=1).detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(found[:, -16:].shape, (7, 16))


def test_without_pooling_every_patch_has_its_feature(encoder):
    patches = extract_features(encoder, IMAGES, pooling="none", layers="last2")
    assert patches.shape == (7, 24, 32)
    np.testing.assert_allclose(patches.mean(axis=1), extract_features(encoder, IMAGES, layers="last2"), atol=1e-6)


def test_quarters_of_several_layers(encoder):
    """Of each layer the four means; 4 x 6 patches."""
    found = extract_features(encoder, IMAGES, pooling="quarters", layers="last2", mean=MEAN, std=STD)
    patches = extract_features(encoder, IMAGES, pooling="none", layers="last2", mean=MEAN, std=STD)
    parts = [
        patches.reshape(7, 4, 6, 32)[:, rows, columns, layer].mean((1, 2))
        for layer in (slice(16), slice(16, 32))
        for rows in (slice(2), slice(2, 4))
        for columns in (slice(3), slice(3, 6))
    ]
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1), atol=1e-5)


def test_the_class_token_and_the_mean_over_patches_without_it():
    """From the output of the last blocks, in which each image begins with the class token and a register."""
    torch.manual_seed(0)
    encoder = ViT(
        image_size=(16, 24), patch_size=4, embed_dim=16, depth=3, num_heads=2, class_token=True, registers=1
    ).double()
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    encoder.eval()(normalized(IMAGES))
    tokens = [encoder.norm(x)[: 7 * 26].view(7, 26, 16).detach().numpy() for x in outputs[1:]]  # the last 2
    encoder.float()
    found = extract_features(encoder, IMAGES, pooling="class", layers="last2", mean=MEAN, std=STD)
    np.testing.assert_allclose(found, np.concatenate([x[:, 0] for x in tokens], axis=1), atol=1e-5)
    mean = extract_features(encoder, IMAGES, mean=MEAN, std=STD)
    np.testing.assert_allclose(mean, tokens[-1][:, 2:].mean(axis=1), atol=1e-5)
    both = block_source(encoder, mean=MEAN, std=STD)(IMAGES, [(3, "mean"), (2, "class"), (3, "none")])
    np.testing.assert_allclose(both[0], mean, atol=1e-6)
    np.testing.assert_allclose(both[1], tokens[0][:, 0], atol=1e-5)
    assert both[2].shape == (7, 24, 16)


def test_batch_size_does_not_change_features(encoder):
    whole = extract_features(encoder, IMAGES)
    np.testing.assert_allclose(extract_features(encoder, IMAGES, batch_size=3), whole, atol=1e-6)
    np.testing.assert_allclose(extract_features(encoder, iter(IMAGES.split(2))), whole, atol=1e-6)


def test_the_encoder_runs_as_it_is_evaluated_and_gets_back_its_mode(encoder):
    encoder.train()
    encoder.norm.eval()
    first, second = extract_features(encoder, IMAGES), extract_features(encoder, IMAGES)
    np.testing.assert_array_equal(first, second)  # stochastic depth is off
    assert encoder.training
    assert encoder.blocks[0].training
    assert not encoder.norm.training
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


def test_bf16_is_near_float32(encoder):
    exact, rough = (extract_features(encoder, IMAGES, precision=p) for p in ("float32", "bf16"))
    assert rough.dtype == np.float32
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, exact, atol=0.1)


def test_pixels_are_means_of_squares():
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = x.numpy().astype(np.float64).reshape(2, 3, 16, 2, 16, 2).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(pixel_features(x), expected.reshape(2, -1), atol=1e-6)
    np.testing.assert_allclose(pixel_features(x, side=None), x.numpy().reshape(2, -1) / 255, atol=1e-6)
    assert pixel_features(x[..., :8, :8]).shape == (2, 3 * 8 * 8)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("last", (12,)), ("last1", (12,)), ("last4", (9, 10, 11, 12)), ("4+8+12", (4, 8, 12)), ("3", (3,))],
)
def test_layer_names(layers, blocks):
    assert layer_numbers(layers, 12) == blocks


@pytest.mark.parametrize("layers", ["first", "last0", "+4", "last-1", "", "0+1"])
def test_malformed_layer_names(layers):
    with pytest.raises(ValueError) as error:
        layer_numbers(layers, 12)
    assert str(error.value) == (
        f"layers (={layers!r}) must be 'last', 'last4' (any number) for the last 4 concatenated, or numbers of blocks "
        "as '4+8+12'"
    )


@pytest.mark.parametrize("layers", ["13", "4+3", "2+2"])
def test_missing_blocks(layers):
    with pytest.raises(ValueError) as error:
        layer_numbers(layers, 12)
    assert str(error.value) == f"layers (={layers!r}) must be ascending numbers of blocks from 1 to the depth (=12)"


def test_any_blocks_are_columns_of_all(encoder):
    every = extract_features(encoder, IMAGES, layers="last5")
    some = extract_features(encoder, IMAGES, layers="2+5")
    np.testing.assert_array_equal(some, np.concatenate([every[:, 16:32], every[:, 64:]], axis=1))


def test_blocks_come_from_one_pass(encoder):
    calls = []
    encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    found = block_source(encoder)(IMAGES, [(2, "mean"), (5, "none"), (5, "mean")])
    assert [tuple(x.shape) for x in found] == [(7, 16), (7, 24, 16), (7, 16)]
    assert torch.equal(found[1].mean(dim=1), found[2])
    assert len(calls) == 1


def test_pixel_patches():
    x = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    patches = pixel_patches(x, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], x[1, :, 4:8, 4:8].flatten() / 255)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "last6"}, "layers (='last6') needs 6 layers, but the encoder has 5"),
        ({"pooling": "max"}, "pooling (='max') must be one of 'mean', 'class', 'quarters', 'none'"),
        ({"pooling": "class"}, "pooling (='class') needs a class token, which encoder (=ViT) lacks"),
        ({"precision": "fp16"}, "precision (='fp16') must be one of 'float32', 'tf32', 'bf16'"),
    ],
)
def test_options_out_of_range(encoder, options, message):
    with pytest.raises(ValueError) as error:
        extract_features(encoder, IMAGES, **options)
    assert str(error.value) == message


def test_images_of_another_kind(encoder):
    with pytest.raises(ValueError) as error:
        extract_features(encoder, IMAGES.float())
    assert str(error.value) == "images must be uint8 [B, 3, h, w], not torch.float32 of shape (7, 3, 16, 24)"
    with pytest.raises(ValueError) as error:
        extract_features(encoder, IMAGES[0])
    assert str(error.value) == "images must be uint8 [B, 3, h, w], not torch.uint8 of shape (3, 16, 24)"
    with pytest.raises(ValueError) as error:
        extract_features(encoder, [])
    assert str(error.value) == "images must contain at least one batch"


def test_a_run_is_loaded(tiny_run, tiny_config):
    folder, saved = tiny_run
    config, jepa, step, data = load_run(folder)
    assert (step, data) == (5, {"samples": 8, "digest": ""})
    assert config == tiny_config
    assert not jepa.training
    assert all(torch.equal(jepa.state_dict()[name], value) for name, value in saved.state_dict().items())
    assert load_run(folder / "checkpoint_00000002.pt").step == 2
    assert load_run(folder, ["train.seed=3"]).config.train.seed == 3


def test_target_and_context_encoder_differ(tiny_run):
    jepa = load_run(tiny_run[0]).jepa
    images = IMAGES[..., :16]
    target, context = (extract_features(jepa.encoder_for(which), images) for which in ("target", "context"))
    assert not np.allclose(target, context)


def test_an_untrained_encoder_has_the_initial_weights_of_the_run(tiny_config):
    torch.manual_seed(tiny_config.train.seed)
    start = build_recipe(tiny_config).encoder.state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    fresh = untrained_encoder(tiny_config, tiny_config.train.seed).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(fresh[name], value) for name, value in start.items())
    other = untrained_encoder(tiny_config, 1).state_dict()
    assert not torch.equal(other["patch_embed.proj.weight"], fresh["patch_embed.proj.weight"])


def test_runs_that_cannot_be_loaded(tiny_run, tmp_path):
    folder, _ = tiny_run
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*absent\.pt"):
        load_run(folder / "absent.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="did you mean 'embed_dim'"):
        load_run(folder, ["encoder.embed_dmi=8"])
    with pytest.raises(CheckpointError, match=r"the model does not fit the checkpoint; missing: encoder\.blocks\.4"):
        load_run(folder, ["encoder.depth=5"])
