"""k-means on patches: the formulas of Coates, Lee and Ng in numpy, scipy and scikit-learn; a baseline in tables."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.evaluation.evaluate import evaluate
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import patch_network, pixel_network
from jepa_kit.evaluation.patch_codes import (
    CONTRAST,
    WHITENING,
    PatchCodes,
    PatchOptions,
    cut,
    learn_patches,
    normalised,
    whitening_of,
)
from jepa_kit.evaluation.protocols.knn import KNN

IMAGES = ImageOptions(image_size=(16, 16))
OPTIONS = PatchOptions(side=6, stride=1, size=(16, 16), centroids=12, patches=2000)


@pytest.fixture(scope="module")
def arrays(scenes):
    return learn_patches(OPTIONS, scenes[0], IMAGES)


@pytest.fixture(scope="module")
def images(scenes):
    return torch.cat([batch.images for batch in eval_batches(scenes[1], IMAGES)])


def plain_codes(patches, arrays):
    """Compute the code of each patch [N, P] by its definition, in float64."""
    x = patches.astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + CONTRAST)
    z = cdist((x - arrays["mean"]) @ arrays["whitening"], arrays["centroids"])
    return np.maximum(0.0, z.mean(1, keepdims=True) - z)


def test_patches_are_those_of_scikit_learn(images):
    """Every position, row by row; the kit has channel by channel, scikit-learn pixel by pixel."""
    found = cut(images[:3], OPTIONS).reshape(3, 121, 3, 36).transpose(2, 3).flatten(2)
    for image, patches in zip(images, found, strict=False):
        wanted = extract_patches_2d(image.permute(1, 2, 0).numpy(), (6, 6)).reshape(121, -1)
        np.testing.assert_array_equal(patches.numpy(), wanted)


def test_whitening_is_the_inverse_root_of_the_covariance():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 9)) @ random.normal(size=(9, 9))
    mean, matrix = whitening_of(x)
    covariance = np.cov(x, rowvar=False, bias=True)
    np.testing.assert_allclose(matrix, fractional_matrix_power(covariance + WHITENING * np.eye(9), -0.5), atol=1e-10)
    pca = PCA().fit(x)
    variances = pca.explained_variance_ * 499 / 500
    rotated = (x - mean) @ matrix @ pca.components_.T  # ZCA is PCA's whitening, turned back
    np.testing.assert_allclose(rotated, pca.transform(x) / np.sqrt(variances + WHITENING), atol=1e-10)


def test_codes_are_those_of_the_paper(images, arrays):
    patches = cut(images[:4], OPTIONS)
    found = PatchCodes(OPTIONS, arrays).code(patches)
    wanted = plain_codes(patches.reshape(-1, 108).numpy(), arrays).reshape(4, 121, -1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-4)
    assert 0.2 < (wanted > 0).mean() < 0.8


def test_features_are_means_of_codes(images, arrays, monkeypatch):
    """In blocks of a few images."""
    monkeypatch.setattr("jepa_kit.evaluation.patch_codes.NUMBERS", 3 * 121 * 108)
    codes = PatchCodes(OPTIONS, arrays)
    assert [len(block) for block in codes(images[:8])] == [3, 3, 2]
    mean, quarters, none = codes.features(images, ["mean", "quarters", "none"], (4, 4))
    every = plain_codes(cut(images, OPTIONS).reshape(-1, 108).numpy(), arrays).reshape(len(images), 11, 11, -1)
    np.testing.assert_allclose(mean, every.mean((1, 2)), atol=1e-4)
    halves = slice(0, 6), slice(5, 11)
    wanted = [every[:, rows, columns].mean((1, 2)) for rows in halves for columns in halves]
    np.testing.assert_allclose(quarters, np.concatenate(wanted, axis=1), atol=1e-4)
    assert none.shape == (len(images), 16, 12)
    np.testing.assert_allclose(none[:, 0], every[:, :3, :3].mean((1, 2)), atol=1e-4)


@pytest.mark.parametrize(
    ("image_size", "side", "stride", "size", "grid"),
    [
        ((32, 32), 6, 1, (32, 32), (27, 27)),
        ((47, 90), 6, 1, (47, 90), (42, 85)),
        ((48, 48), 8, 2, (48, 48), (21, 21)),
        ((64, 64), 8, 2, (64, 64), (29, 29)),
        ((224, 196), 8, 2, (64, 64), (29, 29)),
        ((4, 8), 4, 1, (4, 8), (1, 5)),
    ],
)
def test_the_rule_for_sizes(image_size, side, stride, size, grid):
    options = PatchOptions.for_images(image_size)
    assert (options.side, options.stride, options.size, options.grid) == (side, stride, size, grid)
    assert options.centroids == 400
    assert cut(torch.zeros(2, 3, *image_size, dtype=torch.uint8), options).shape == (2, grid[0] * grid[1], 3 * side**2)


def test_larger_images_are_averaged_down():
    image = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    image[..., ::2, :] = 100  # stripes of one pixel disappear
    assert torch.equal(cut(image, PatchOptions.for_images((128, 128))), torch.full((1, 841, 192), 50.0))


def test_learning_is_reproducible_and_uses_no_more_centroids_than_patches(scenes, arrays):
    again = learn_patches(OPTIONS, scenes[0], IMAGES)
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    assert arrays["centroids"].shape == (12, 108)
    few = PatchOptions(side=16, stride=1, size=(16, 16))
    assert len(learn_patches(few, scenes[0], IMAGES)["centroids"]) <= 96


def test_centroids_fit_nearly_as_well_as_those_of_k_means(scenes, arrays):
    """On all patches, of which mini-batches saw a part; much better than random patches do."""
    batch = torch.cat([b.images for b in eval_batches(scenes[0], IMAGES)])
    white = (normalised(cut(batch, OPTIONS)).reshape(-1, 108).numpy() - arrays["mean"]) @ arrays["whitening"]

    def distortion(centroids):
        return np.square(cdist(white, centroids).min(1)).mean()

    best = distortion(KMeans(12, n_init=1, random_state=0).fit(white).cluster_centers_)
    random = distortion(white[np.random.default_rng(0).permutation(len(white))[:12]])
    found = distortion(arrays["centroids"])
    assert found < best + 0.3 * (random - best)


@pytest.fixture
def small(monkeypatch):
    """A baseline of few centroids, so that tests are quick; a list of what was learned."""
    learned = []
    learn = learn_patches
    monkeypatch.setattr(PatchOptions, "for_images", lambda image_size: OPTIONS)

    def noted(*arguments):
        learned.append(arguments)
        return learn(*arguments)

    monkeypatch.setattr("jepa_kit.evaluation.feature_sources.learn_patches", noted)
    return learned


SPECS = ["knn", {"name": "knn", "pooling": "quarters"}, {"name": "knn", "pooling": "class"}]


def test_a_row_of_a_table(scenes, small):
    """Standardised over the training samples; the class token, which patches lack, is the mean."""
    train, test = scenes
    rows = evaluate([patch_network(), pixel_network()], train, test, IMAGES, protocols=SPECS, labels=["shape"])
    patches = [row for row in rows if row.network == "patches"]
    assert [(row.pooling, row.layers, row.width) for row in patches] == [
        ("mean", None, 12),
        ("quarters", None, 48),
        (None, None, 12),
    ]
    assert [row.pooling for row in rows if row.network == "pixels"] == [None] * 3
    assert len(small) == 1
    codes = PatchCodes(OPTIONS, learn_patches(*small[0]))
    x, y = (
        codes.features(torch.cat([b.images for b in eval_batches(part, IMAGES)]), ["mean"], (4, 4))[0].double().numpy()
        for part in scenes
    )
    x, y = ((one - x.mean(0)) / x.std(0) for one in (x, y))
    found = KNN().classify(x, train.labels("shape"), y, test.labels("shape"))
    assert patches[0].accuracy == patches[2].accuracy == found.accuracy


def test_they_are_learned_once(scenes, small, tmp_path, monkeypatch):
    """And for other training shards again."""
    store, networks = FeatureStore(tmp_path), [patch_network(4)]
    first = evaluate(networks, *scenes, IMAGES, protocols=SPECS[:1], labels=["shape"], store=store)
    assert len(small) == 1
    assert len(list(tmp_path.glob("*.npz"))) == 1
    again = evaluate(networks, *scenes, IMAGES, protocols=SPECS[:2], labels=["shape"], store=store)
    assert len(small) == 1  # for other features too
    assert again[0].accuracy == first[0].accuracy
    with monkeypatch.context() as patched:
        patched.setattr(ShardDataset, "image_files", None)  # nothing is read
        evaluate(networks, *scenes, IMAGES, protocols=SPECS[:2], labels=["shape"], store=FeatureStore(tmp_path))
    evaluate(networks, *reversed(scenes), IMAGES, protocols=SPECS[:1], labels=["count"], store=store)
    assert len(small) == 2


def test_patches_of_an_encoder(scenes, small):
    rows = evaluate(
        [patch_network(4)], *scenes, IMAGES, protocols=[{"name": "attentive", "epochs": 1}], labels=["shape"]
    )
    assert [(row.width, row.pooling) for row in rows] == [(12, "none")]
    with pytest.raises(ValueError) as error:
        evaluate([patch_network()], *scenes, IMAGES, protocols=["attentive"], labels=["shape"])
    assert str(error.value) == "patch_size (=None) must be given to patch_network for protocols of patches"
