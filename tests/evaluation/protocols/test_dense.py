"""Segmentation against plain numpy and scikit-learn."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.images import encode_png
from jepa_kit.data.transforms import eval_pipeline
from jepa_kit.evaluation.protocols.base import Features, LayerSet, Part, Task
from jepa_kit.evaluation.protocols.dense import Dense, confusion, crop_mask, patch_fractions, patch_grid
from jepa_kit.evaluation.protocols.heads import HeadGrid, Setting

KEY = LayerSet("last", "none")


class Masked:
    """A data set of masks only."""

    path = "shards"

    def __init__(self, masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def mask(self, i, max_pixels):
        assert max_pixels == 12345
        return self.masks[i]


def squares(samples, seed, classes=4):
    """Masks of 16 x 24 pixels in patches of 4 that are mostly one class each, and features that show the class."""
    random = np.random.default_rng(seed)
    of_patch = random.integers(classes, size=(samples, 4, 6))
    masks = of_patch.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    masks[:, ::5, ::7] = 255
    features = np.eye(classes)[of_patch.reshape(samples, 24)] * 3 + random.normal(size=(samples, 24, classes))
    return Masked(masks), Features(features.astype(np.float16))


def task(train, test, **options):
    parts = [Part({KEY: features}, None, dataset) for dataset, features in (train, test)]
    images = ImageOptions(image_size=(16, 24), mean=(0, 0, 0), std=(1, 1, 1), max_pixels=12345)
    return Task(train=parts[0], test=parts[1], images=images, **options)


def test_fractions_of_a_patch():
    random = np.random.default_rng(0)
    masks = random.integers(0, 3, size=(2, 8, 12), dtype=np.uint8)
    masks[0, 0, 0] = 255
    shares = patch_fractions(masks, 6, 3)
    for i in range(2):
        for row in range(2):
            for column in range(3):
                block = masks[i, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                expected = [np.mean(block == k) for k in range(3)]
                np.testing.assert_allclose(shares[i, row * 3 + column], expected)


def test_the_loss_on_fractions_is_the_mean_loss_over_pixels():
    """A step of a head on fractions equals a step on the pixels, each with the logits of its patch."""
    masks, features = squares(3, seed=0)
    shares = patch_fractions(masks.masks, 24, 4).flatten(0, 1)
    x = torch.from_numpy(features.array).flatten(0, 1)
    weight = torch.zeros(4, 4, requires_grad=True)
    logits = (x @ weight).view(3, 4, 6, 4).permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    target = torch.from_numpy(masks.masks).long()
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255, reduction="sum") / target.numel()
    loss.backward()
    error = torch.full_like(shares, 0.25) * shares.sum(1, keepdim=True) - shares
    torch.testing.assert_close(weight.grad, x.T @ error / len(x))


def test_figures_are_scikit_learns():
    train, test = squares(200, seed=1), squares(40, seed=2)
    accuracy, miou = Dense(epochs=10, batch_size=256)(task(train, test))
    assert (accuracy.metric, miou.metric) == ("accuracy", "mIoU")
    assert (accuracy.n_train, accuracy.n_test, accuracy.classes) == (200, 40, 4)
    counts = np.array(accuracy.settings["confusion"])
    truth, answers = (np.repeat(np.indices(counts.shape)[axis].ravel(), counts.ravel()) for axis in (0, 1))
    assert counts.sum() == (test[0].masks != 255).sum()
    assert accuracy.accuracy == pytest.approx(np.mean(truth == answers))
    assert miou.accuracy == pytest.approx(jaccard_score(truth, answers, average="macro"))
    per_class = jaccard_score(truth, answers, average=None)
    assert list(miou.settings["iou"].values()) == pytest.approx(per_class.tolist())
    assert accuracy.chance == pytest.approx(np.bincount(truth).max() / len(truth))
    constant = np.full_like(truth, np.bincount(truth).argmax())
    assert miou.chance == pytest.approx(jaccard_score(truth, constant, average="macro"))
    assert accuracy.accuracy > 0.75


def test_predictions_are_logits_upsampled_to_the_image():
    masks, features = squares(5, seed=3)
    head = HeadGrid([Setting(KEY, False, 0.1, 0.0)], {KEY: features}, 4)
    counts = confusion(head, KEY, features, masks.masks, 4)
    weight, bias = head.groups[0].weight[:, 0], head.groups[0].bias[0]
    expected = np.zeros((4, 4), dtype=int)
    for i in range(5):
        logits = (torch.from_numpy(features.array[i]) @ weight + bias).view(4, 6, 4).permute(2, 0, 1)
        # Pillow's bilinear filter equals torch's for enlarging
        grown = [np.asarray(Image.fromarray(one.numpy()).resize((24, 16), Image.Resampling.BILINEAR)) for one in logits]
        known = masks.masks[i] != 255
        expected += confusion_matrix(masks.masks[i][known], np.argmax(grown, axis=0)[known], labels=range(4))
    assert np.abs(counts - expected).sum() <= 4  # ties within rounding


@pytest.mark.parametrize("lrs", [(1e38,), (1e38, 2e38)])
def test_heads_that_diverge(lrs):
    with pytest.raises(ValueError) as error:
        Dense(epochs=2, batch_size=64, lrs=lrs)(task(squares(30, seed=1), squares(10, seed=2)))
    assert str(error.value) == f"lr (={list(lrs)}): every head diverged; take lower ones"


def test_with_one_head_nothing_is_held_out():
    """The figure is that of a head trained on all patches."""
    train, test = squares(40, seed=1), squares(10, seed=2)
    accuracy, _ = Dense(epochs=2, batch_size=64, lrs=(1e-2,))(task(train, test))
    several, _ = Dense(epochs=2, batch_size=64, lrs=(1e-12, 1e-2))(task(train, test))
    assert (accuracy.validation, accuracy.settings["tried"]) == (None, [])
    assert accuracy.settings["confusion"] == several.settings["confusion"]
    assert several.validation > 0.5


def test_values_above_most_are_one_class():
    train, test = squares(60, seed=1), squares(20, seed=2)
    accuracy, _ = Dense(most=1, epochs=2, batch_size=256)(task(train, test))
    assert accuracy.classes == 2
    assert sum(accuracy.settings["confusion"][1]) == ((test[0].masks > 0) & (test[0].masks != 255)).sum()


def test_masks_are_cropped_as_images_are():
    mask = np.random.default_rng(0).integers(0, 9, size=(20, 16), dtype=np.uint8)
    image = encode_png(Image.fromarray(mask).convert("RGB"))
    cropped = eval_pipeline(image_size=(16, 16))(image, np.empty(0))
    assert np.array_equal(crop_mask(mask, (16, 16)), cropped[..., 0])
    assert crop_mask(mask, (40, 32)).tolist() == mask.repeat(2, 0).repeat(2, 1).tolist()
    assert crop_mask(mask, (8, 10)).shape == (8, 10)
    assert patch_grid(24, (16, 24)) == (4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 0}, "most (=0) must be from 1 to 254"),
        ({"most": 255}, "most (=255) must be from 1 to 254"),
        (
            {"holdout": 0.5, "lrs": (1e-3,)},
            "holdout (=0.5) would do nothing: one combination of layers, heads, lrs and weight_decays leaves nothing "
            "to choose",
        ),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError) as error:
        Dense(**options)
    assert str(error.value) == message


def test_masks_of_one_value():
    masked = Masked(np.zeros((4, 16, 24), np.uint8)), squares(4, seed=0)[1]
    with pytest.raises(ValueError) as error:
        Dense()(task(masked, masked))
    assert str(error.value) == "masks of shards must contain at least 2 values, not 1"
