"""Fine-tuning: its groups, mixing and schedule by their formulas, and a small run."""

import numpy as np
import pytest
import torch

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.encoders import ViT
from jepa_kit.encoders.conv import ConvEncoder
from jepa_kit.evaluation.protocols.base import PROTOCOLS, Part, Task
from jepa_kit.evaluation.protocols.finetune import Classifier, Finetune, layer_groups


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ViT(image_size=(16, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, scene_shards):
    folder = tmp_path_factory.mktemp("finetune")
    return scene_shards(folder / "train", 64, seed=0), scene_shards(folder / "val", 20, seed=1)


def task(encoder, shards, train_labels, test_labels, reading=None, **options):
    parts = [Part({}, labels, dataset) for dataset, labels in zip(shards, (train_labels, test_labels), strict=True)]
    images = ImageOptions(image_size=(16, 16), mean=(0.4,) * 3, std=(0.2,) * 3, batch_size=16, **(reading or {}))
    return Task(train=parts[0], test=parts[1], encoder=encoder, images=images, **options)


def test_rates_fall_from_the_head_down(encoder):
    model = Classifier(encoder, 16, 5)
    groups = layer_groups(model, lr=2.0, weight_decay=0.1, decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert rates["head.weight"] == (2.0, 0.1)
    assert rates["head.bias"] == (2.0, 0.0)
    assert rates["encoder.norm.weight"] == (2.0, 0.0)
    assert rates["encoder.blocks.2.mlp.fc1.weight"] == (1.0, 0.1)
    assert rates["encoder.blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert rates["encoder.patch_embed.proj.weight"] == (0.125, 0.1)
    assert rates["encoder.patch_embed.proj.bias"] == (0.125, 0.0)


def test_mixup_mixes_images_and_targets_alike():
    images, target = torch.randn(8, 3, 4, 4), torch.eye(8)
    mixed, mixed_target = Finetune(mixup=0.8)._mixed(images, target, 0, 0, 0)
    torch.testing.assert_close(mixed, torch.einsum("ij,jchw->ichw", mixed_target, images))
    torch.testing.assert_close(mixed_target.sum(1), torch.ones(8))
    assert not torch.equal(mixed, images)
    assert Finetune(mixup=0.0)._mixed(images, target, 0, 0, 0)[0] is images


def test_the_schedule():
    probe = Finetune(epochs=10, warmup_epochs=2, lr=2.0, min_lr=0.1)
    assert [probe.lr_after(done) for done in (0, 1, 2, 6, 10)] == pytest.approx([0, 1, 2, 1.05, 0.1])


def test_a_copy_is_trained_and_the_encoder_stays(encoder, shards):
    """Whether a scene is brighter than the median can be learned; the given encoder keeps its weights."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    means = [np.array([np.asarray(part.image(i)).mean() for i in range(len(part))]) for part in shards]
    labels = [(m > np.median(means[0])).astype(np.int64) for m in means]
    probe = Finetune(epochs=12, batch_size=16, lr=3e-3, mixup=0.0, crop_scale=(1.0, 1.0))
    state = torch.get_rng_state()
    (found,) = probe(task(encoder, shards, *labels, seed=1))
    assert found.accuracy > 0.8
    assert found.settings["loss_by_epoch"][-1] < found.settings["loss_by_epoch"][0]
    assert found.validation is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert [block.drop_path.rate for block in encoder.blocks] == [0, 0, 0]


def test_the_same_again_and_on_few_labels(encoder, shards):
    labels = [part.labels("count") for part in shards]
    probe = Finetune(epochs=1, batch_size=8, subset="2/class")
    first, second = (probe(task(encoder, shards, *labels))[0] for _ in range(2))
    assert np.array_equal(first.predictions, second.predictions)
    assert (first.variant, first.settings["samples"], first.n_train) == ("2/class", 16, 16)
    kept = {name: value for name, value in first.settings.items() if name not in ("loss_by_epoch", "samples")}
    assert kept == {name: getattr(probe, name) for name in PROTOCOLS.options("finetune") if name != "subset"}


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_products_have_the_given_precision(encoder, shards, precision, dtype, monkeypatch):
    seen = set()
    forward = Classifier.forward

    def watched(self, images):
        self.encoder.blocks[0].mlp.fc1.register_forward_hook(lambda m, given, out: seen.add(out.dtype))
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", watched)
    labels = [part.labels("count") for part in shards]
    Finetune(epochs=1, batch_size=32)(task(encoder, shards, *labels, reading={"precision": precision}))
    assert seen == {dtype}


def test_a_sample_that_cannot_be_used_is_named(encoder, scene_shards, tmp_path):
    """An image of more than ``max_pixels``, and one in a deleted shard."""
    shards = scene_shards(tmp_path / "train", 16, seed=0), scene_shards(tmp_path / "val", 8, seed=1)
    labels = [np.arange(len(part)) % 2 for part in shards]
    probe = Finetune(epochs=1, batch_size=8)
    with pytest.raises(ValueError) as error:
        probe(task(encoder, shards, *labels, reading={"max_pixels": 300}))
    assert f" of {shards[0].path} cannot be used: 16 x 20 pixels are more than max_pixels (=300)" in str(error.value)
    for file in (tmp_path / "val").glob("*.tar"):
        file.unlink()
    with pytest.raises(ValueError) as error:
        probe(task(encoder, shards, *labels))
    named = f"sample 0 ({shards[1].key(0)!r}) of {shards[1].path} cannot be used: shard shard-000000.tar"
    assert str(error.value).startswith(named)


def test_the_class_token_can_be_fine_tuned():
    torch.manual_seed(0)
    encoder = ViT(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2, class_token=True)
    model = Finetune(pooling="class", drop_path=0.0)._model(encoder, 5).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model.head(encoder.eval().forward_tokens(images)[0].prefix[:, 0])
        torch.testing.assert_close(model(images), expected)
        model.pooling = "mean"
        expected = model.head(encoder(images).view(3, 16, 16).mean(1))
        torch.testing.assert_close(model(images), expected)


def test_quarters_can_be_fine_tuned(encoder):
    model = Finetune(pooling="quarters", drop_path=0.0)._model(encoder, 5).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder(images).view(3, 2, 2, 2, 2, -1)  # halves of the rows, rows, halves of the columns, columns
        torch.testing.assert_close(model(images), model.head(tokens.mean((2, 4)).flatten(1)))


def test_encoders_that_do_not_fit_the_options(encoder):
    conv = ConvEncoder(image_size=(16, 16), patch_size=4, embed_dim=8, depth=1, kernel=3)
    with pytest.raises(ValueError) as error:
        Finetune()._model(conv, 5)
    assert str(error.value) == (
        "drop_path (=0.1) must be 0: the encoder (=ConvEncoder) has no blocks with stochastic depth"
    )
    assert Finetune(drop_path=0.0)._model(conv, 5)(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(ValueError) as error:
        Finetune(pooling="class")._model(encoder, 5)
    assert str(error.value) == "pooling (='class') needs an encoder with a class token, and this one has none"


def test_training_that_diverges(encoder, shards):
    labels = [np.arange(len(part)) % 2 for part in shards]
    with pytest.raises(ValueError) as error:
        Finetune(epochs=2, warmup_epochs=0, batch_size=8, lr=1e6)(task(encoder, shards, *labels))
    assert str(error.value) == "lr (=1000000.0): training diverged in epoch 1; take a lower one"


def test_stochastic_depth_rises_to_the_last_block(encoder):
    model = Finetune(drop_path=0.2)._model(encoder, 3)
    assert [block.drop_path.rate for block in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs (=0) must be at least 1"),
        ({"batch_size": 1}, "batch_size (=1) must be at least 2"),
        ({"lr": 0.0}, "lr (=0.0) must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay (=-1.0) must be at least 0"),
        ({"min_lr": 1.0}, "min_lr (=1.0) must be at least 0 and at most lr (=0.001)"),
        ({"layer_decay": 0.0}, "layer_decay (=0.0) must be in (0, 1]"),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs (=2) must be at least 0 and below epochs"),
        ({"label_smoothing": 1.0}, "label_smoothing (=1.0) must be in [0, 1)"),
        ({"mixup": -1.0}, "mixup (=-1.0) must be at least 0"),
        ({"drop_path": 1.0}, "drop_path (=1.0) must be in [0, 1)"),
        ({"crop_scale": (1.0, 0.5)}, "crop_scale (=(1.0, 0.5)) must be ascending, above 0, at most 1"),
        ({"flip": 2.0}, "flip (=2.0) must be a probability, 0 to 1"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError) as error:
        Finetune(**options)
    assert str(error.value) == message
