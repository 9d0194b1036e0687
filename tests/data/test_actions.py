"""Actions: from what a transform says that its draws do, Pillow makes the same image."""

import io

import numpy as np
import pytest
import torch
from photos import photo, saved
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import kstest

from jepa_kit.data.transforms import (
    CenterCrop,
    ColorJitter,
    Described,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Pipeline,
    RandomResizedCrop,
    Resize,
    Solarize,
    VerticalFlip,
    build_pipeline,
    eval_pipeline,
)
from jepa_kit.data.views import ViewMaker, check_views, load_images, make_views
from jepa_kit.registry import TRANSFORMS

SIZE = (24, 32)
IMAGE = photo(60, 80)
CHANCE = {"p": 0.5}


def drawn(transform, n=40):
    named = (
        [("it", transform)]
        if hasattr(transform, "window")
        else [("resize", Resize(image_size=SIZE)), ("it", transform)]
    )
    return Pipeline(named).draws(np.arange(n), seed=2, epoch=0).tolist()


def cropped(action):
    left, top, right, bottom = (round(v * side, 6) for v, side in zip(action, (80, 60, 80, 60), strict=True))
    return IMAGE.crop((left, top, right, bottom)).resize((32, 24), Image.Resampling.BILINEAR)


def jittered(action):
    """With one amount that is not 0 the order of the four does not count."""
    return ImageEnhance.Contrast(IMAGE).enhance(action[2])


AGAIN = {
    RandomResizedCrop: ({"image_size": SIZE}, cropped),
    Resize: ({"image_size": SIZE}, cropped),
    HorizontalFlip: (CHANCE, lambda action: ImageOps.mirror(IMAGE) if action[0] else IMAGE),
    VerticalFlip: (CHANCE, lambda action: ImageOps.flip(IMAGE) if action[0] else IMAGE),
    ColorJitter: (CHANCE | {"brightness": 0.0, "saturation": 0.0, "hue": 0.0}, jittered),
    GaussianBlur: (CHANCE, lambda action: IMAGE.filter(ImageFilter.GaussianBlur(action[1])) if action[0] else IMAGE),
    Grayscale: (CHANCE, lambda action: ImageOps.grayscale(IMAGE).convert("RGB") if action[0] else IMAGE),
    Solarize: (CHANCE, lambda action: ImageOps.solarize(IMAGE, 128) if action[0] else IMAGE),
}


@pytest.mark.parametrize("kind", AGAIN)
def test_the_image_again_from_the_action(kind):
    options, again = AGAIN[kind]
    transform = kind(**options)
    actions = []
    for draws in drawn(transform):
        action = transform.action(draws, (60, 80))
        assert len(action) == transform.action_size
        assert again(action).tobytes() == transform(IMAGE, draws).tobytes()
        actions.append(tuple(action))
    assert (len(set(actions)) > 1) == (kind is not Resize)


def test_every_transform_has_one():
    for name in TRANSFORMS.names():
        transform = TRANSFORMS.build(name, {}, image_size=SIZE)
        assert isinstance(transform, Described)
        assert transform.action_size == len(transform.action([0.25] * 22, (60, 80)))


def test_amounts_of_the_jitter():
    """Uniform in their ranges (at 1 % for all three); the neutral ones if it is not applied, or has no such amount."""
    transform = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.0, hue=0.1, p=0.7)
    found = np.array([transform.action(draws, (1, 1)) for draws in drawn(transform, 2000)])
    applied = found[:, 0] == 1.0
    assert 0.65 < applied.mean() < 0.75
    np.testing.assert_array_equal(found[~applied], [[0.0, 1.0, 1.0, 1.0, 0.0]] * int((~applied).sum()))
    for column, (low, width) in {1: (0.6, 0.8), 2: (0.0, 2.5), 4: (-0.1, 0.2)}.items():
        assert kstest(found[applied, column], "uniform", (low, width)).pvalue > 0.01 / 3
    assert set(found[:, 3]) == {1.0}


@pytest.mark.parametrize(
    ("size", "share", "expected"),
    [
        ((50, 100), 1.0, (0.25, 0.0, 0.75, 1.0)),  # a square of a wide image
        ((100, 50), 0.5, (0.25, 0.375, 0.75, 0.625)),
        ((30, 30), 0.75, (0.125, 0.125, 0.875, 0.875)),
    ],
)
def test_the_part_of_a_centre_crop(size, share, expected):
    transform = CenterCrop(image_size=(24, 24), share=share)
    assert transform.action((), size) == pytest.approx(expected, abs=1e-12)


def test_a_crop_of_a_crop_is_relative_to_the_first():
    parts = [{"name": "center_crop", "share": 0.5}, {"name": "horizontal_flip", "p": 1.0}, {"name": "center_crop"}]
    action = []
    build_pipeline(parts, image_size=(20, 20)).apply(photo(40, 40), [0.0], action)
    assert action == pytest.approx([0.25, 0.25, 0.75, 0.75, 1.0, 0.0, 0.0, 1.0, 1.0], abs=1e-12)


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_the_action_of_a_view(decoder):
    """Those of its transforms in their order, for each image that is left; views that do not ask have none."""
    parts = [{"name": "random_resized_crop"}, {"name": "horizontal_flip"}, {"name": "color_jitter", "p": 0.5}]
    pipeline = build_pipeline(parts, image_size=SIZE, decoder=decoder)
    makers = [ViewMaker(pipeline=pipeline), ViewMaker(pipeline=pipeline, action=True)]
    sizes = [(60, 80), None, (50, 90), (70, 40)]
    files = [lambda size=size: saved(photo(*size)) if size else b"" for size in sizes]
    draws = [pipeline.draws(np.arange(4), seed=seed, epoch=0) for seed in (0, 1)]
    loaded = load_images(makers, files, draws)
    views = make_views(makers, loaded, np.array([0, 2, 3]), seed=0, epoch=0, step=0)
    assert views[0].action is None
    action = views[1].action
    assert (action.dtype, action.shape) == (torch.float32, (3, 10))
    crop, flip, jitter = pipeline.transforms
    for row, b in zip(action.tolist(), (0, 2, 3), strict=True):
        numbers = draws[1][b].tolist()
        expected = [
            *crop.action(numbers[:22], sizes[b]),
            *flip.action(numbers[22:23], SIZE),
            *jitter.action(numbers[23:], SIZE),
        ]
        assert row == pytest.approx(expected, abs=1e-6)


class Silent:
    num_draws = 0

    def __call__(self, image, draws):
        return image


def test_a_transform_that_says_nothing():
    view = Pipeline([("resize", Resize(image_size=SIZE)), ("silent", Silent())])
    data = io.BytesIO()
    IMAGE.save(data, "PNG")
    assert view(data.getvalue(), np.empty(0)).shape == (*SIZE, 3)
    with pytest.raises(ValueError, match=r"action \(=True\) needs transforms with action .*, which silent lacks"):
        check_views([ViewMaker(pipeline=eval_pipeline(image_size=SIZE)), ViewMaker(pipeline=view, action=True)])
