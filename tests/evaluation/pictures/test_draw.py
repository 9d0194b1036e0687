"""Galleries: dimmed pixels, outlines of blocks, principal components against scikit-learn, files."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from jepa_kit.encoders import ViT
from jepa_kit.evaluation.pictures.draw import mask_gallery, patch_pca
from jepa_kit.evaluation.pictures.panels import COLOURS, dim_hidden, outline, principal_components, to_colours
from jepa_kit.maskers import InPlace, MultiBlock, Random
from jepa_kit.structures import MaskBatch, PatchSets

IMAGES = torch.randint(0, 256, (6, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def masks_for(images, grid=(4, 6), **options):
    return MultiBlock(grid=grid, **options)(np.arange(len(images)), seed=0, epoch=0)


@pytest.mark.parametrize("contexts", [1, 2])
def test_patches_outside_a_context_are_pale_grey(contexts):
    masks = masks_for(IMAGES, num_contexts=contexts, context_scale=(0.5, 0.9))
    shown = dim_hidden(IMAGES, masks)
    assert shown.shape == (6 * contexts, 3, 32, 48)
    for s, patches in enumerate(masks.context.split()):
        image = IMAGES[int(masks.context.image[s])]
        for patch in range(24):
            at = (slice(None), slice(patch // 6 * 8, patch // 6 * 8 + 8), slice(patch % 6 * 8, patch % 6 * 8 + 8))
            if patch in patches:
                assert torch.equal(shown[s][at], image[at])
                continue
            hidden = shown[s][at].numpy().astype(np.float64)
            assert np.all(hidden == hidden[0])  # grey
            grey = np.asarray([0.299, 0.587, 0.114]) @ image[at].numpy().reshape(3, -1)
            np.testing.assert_allclose(hidden[0].ravel(), 0.25 * grey + 0.75 * 214, atol=0.6)
            assert hidden.std() <= 0.26 * grey.std() + 0.5


def test_mask_tokens_are_pale_grey(tmp_path):
    masks = masks_for(IMAGES)
    in_place = InPlace(grid=(4, 6), masker={"name": "multiblock"})(np.arange(len(IMAGES)), seed=0, epoch=0)
    seen = in_place.context.select(~in_place.context.hidden)
    expected = dim_hidden(IMAGES, MaskBatch(seen, in_place.targets, masks.grid, in_place.context_of))
    assert torch.equal(dim_hidden(IMAGES, in_place), expected)
    assert not torch.equal(expected, IMAGES)
    mask_gallery(IMAGES, in_place, tmp_path / "gallery.png")


def turtle(inside, inset):
    """Return every line as a set of two rounded points."""
    lines = outline(np.array(inside, dtype=bool), (10, 10), inset)
    return {frozenset((round(x, 6), round(y, 6)) for x, y in line) for line in lines}


def test_an_outline_is_the_border():
    one = {((0, 0), (10, 0)), ((10, 0), (10, 10)), ((0, 10), (10, 10)), ((0, 0), (0, 10))}
    assert turtle([[1]], 0) == {frozenset(line) for line in one}
    inner = {((1, 1), (9, 1)), ((9, 1), (9, 9)), ((1, 9), (9, 9)), ((1, 1), (1, 9))}
    assert turtle([[1]], 1) == {frozenset(line) for line in inner}


def test_an_outline_closes_at_convex_and_concave_corners():
    for inside in ([[1, 1], [1, 0]], [[1, 1, 1], [1, 0, 1], [1, 1, 1]], [[0, 1], [1, 1]], [[1, 0], [0, 1]]):
        ends = [point for line in turtle(inside, 1.5) for point in line]
        assert all(ends.count(point) == 2 for point in ends), inside
    notch = {point for line in turtle([[1, 1], [1, 0]], 1) for point in line}
    assert notch == {(1, 1), (19, 1), (19, 9), (9, 9), (9, 19), (1, 19), (10, 1), (1, 10)}


def size_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def colours_of(path):
    return {tuple(c) for c in np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0)}


def rgb(colour):
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


def test_a_gallery_outlines_each_block_in_its_colour(tmp_path):
    path = mask_gallery(IMAGES, masks_for(IMAGES, num_targets=3), tmp_path / "new" / "gallery.png")
    assert path == tmp_path / "new" / "gallery.png"
    found = colours_of(path)
    assert {rgb(c) for c in COLOURS[:3]} <= found
    assert not {rgb(c) for c in COLOURS[3:]} & found


def test_a_gallery_grows_with_rows_and_columns(tmp_path):
    def gallery(count, columns, **options):
        images = IMAGES[:count]
        masks = masks_for(images, **options)
        return size_of(mask_gallery(images, masks, tmp_path / "g.png", columns=columns))

    wide, narrow, two = gallery(6, 6), gallery(6, 3), gallery(6, 6, num_contexts=2)
    assert wide[0] > 1.7 * narrow[0]
    assert narrow[1] > 1.5 * wide[1]
    assert two[0] == wide[0]
    assert two[1] > 1.3 * wide[1]


def test_a_gallery_takes_any_masks(tmp_path):
    masks = Random(grid=(4, 6))(np.arange(2), seed=0, epoch=0)
    assert mask_gallery(IMAGES[:2], masks, tmp_path / "random.png", titles=["a", "b"]).exists()
    many = PatchSets(torch.arange(9), torch.zeros(9, dtype=torch.int64), [1] * 9)
    context = PatchSets(torch.arange(10, 20), torch.zeros(1, dtype=torch.int64), [10])
    nine = MaskBatch(context, many, (4, 6), torch.zeros(9, dtype=torch.int64))
    assert mask_gallery(IMAGES[:1], nine, tmp_path / "nine.png").exists()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.float(), "images must be uint8 [B, 3, h, w], not torch.float32 of shape (6, 3, 32, 48)"),
        (IMAGES[:, :1], "images must be uint8 [B, 3, h, w], not torch.uint8 of shape (6, 1, 32, 48)"),
        (IMAGES[..., :45], "images (=32 x 45 pixels) must divide into a grid of 4 x 6 patches"),
        (IMAGES[:3], "images must be the 6 of the masks, not 3"),
    ],
)
def test_rejects_images_that_masks_do_not_fit(images, message, tmp_path):
    with pytest.raises(ValueError) as error:
        mask_gallery(images, masks_for(IMAGES), tmp_path / "gallery.png")
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def test_titles_are_one_for_each_image(tmp_path):
    with pytest.raises(ValueError) as error:
        mask_gallery(IMAGES, masks_for(IMAGES), tmp_path / "gallery.png", titles=["one"])
    assert str(error.value) == "titles must be one for each of the 6 images, not 1"


def test_components_against_scikit_learn():
    tokens = np.random.default_rng(0).normal(size=(5, 7, 9)) * np.geomspace(1, 5, 9) + 3
    found, explained = principal_components(tokens.astype(np.float32))
    theirs = PCA(3, svd_solver="full").fit(tokens.reshape(35, 9))
    expected = theirs.transform(tokens.reshape(35, 9)).reshape(5, 7, 3)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    assert explained == pytest.approx(theirs.explained_variance_ratio_.sum())


def test_components_have_fixed_signs_and_colours_fill_the_range():
    tokens = np.random.default_rng(0).normal(size=(50, 7, 4)).astype(np.float32) * [4, 3, 2, 1]
    np.testing.assert_allclose(principal_components(tokens[::-1])[0], principal_components(tokens)[0][::-1], atol=1e-8)
    colours = to_colours(principal_components(tokens)[0])
    assert (colours.min(), colours.max()) == (0.0, 1.0)
    assert np.all((colours == 1.0).mean(axis=(0, 1)) < 0.02)
    assert np.isfinite(to_colours(principal_components(np.ones((2, 3, 4)))[0])).all()  # a constant network


def test_patch_pca_draws_images_and_every_encoder(tmp_path):
    torch.manual_seed(0)
    encoders = {n: ViT(image_size=(32, 48), patch_size=8, embed_dim=16, depth=1, num_heads=2) for n in "ab"}
    two = size_of(patch_pca(IMAGES, encoders, tmp_path / "two.png", shown=4))
    again = patch_pca(IMAGES, encoders, tmp_path / "again.png", shown=4)
    assert again.read_bytes() == (tmp_path / "two.png").read_bytes()
    one = size_of(patch_pca(IMAGES, {"a": encoders["a"]}, tmp_path / "one.png", shown=4))
    assert one[0] == two[0]
    assert two[1] > 1.2 * one[1]
    with pytest.raises(ValueError) as error:
        patch_pca(IMAGES, {}, tmp_path / "none.png")
    assert str(error.value) == "encoders (={}) must have at least one"
    with pytest.raises(ValueError, match=r"patch_size \(=8\) must divide the height \(=30\)"):
        patch_pca(IMAGES[:, :, :30], encoders, tmp_path / "none.png")


def test_pictures_do_not_use_pyplot(tmp_path):
    mask_gallery(IMAGES, masks_for(IMAGES), tmp_path / "gallery.png")
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
