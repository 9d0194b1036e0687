"""Pipelines: transforms in order, from bytes; draws that belong to (seed, epoch, sample), a lane for each transform."""

import hashlib
import io
import pickle

import numpy as np
import pytest
from photos import photo, saved
from PIL import Image
from scipy.stats import kstest

from jepa_kit.config import DataConfig
from jepa_kit.data.images import MAX_PIXELS
from jepa_kit.data.transforms import (
    ATTEMPTS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Pipeline,
    RandomResizedCrop,
    build_pipeline,
    crop_box,
    eval_pipeline,
    train_pipeline,
)
from jepa_kit.errors import ImageError
from jepa_kit.registry import TRANSFORMS
from jepa_kit.rng import Stream, uniforms

SIZE = (24, 32)
ALL = [
    {"name": "random_resized_crop", "scale": [0.3, 1.0]},
    {"name": "horizontal_flip"},
    {"name": "vertical_flip"},
    {"name": "color_jitter", "p": 0.8},
    {"name": "gaussian_blur"},
    {"name": "grayscale"},
    {"name": "solarize"},
]
EXAMPLES = {name: {} for name in TRANSFORMS.names()}
"""Options with which each registered transform is tried here; a new one needs none, or an entry."""
JPEG = saved(photo(60, 80))
THIN = saved(Image.new("RGB", (2000, 1)))


def test_the_released_view_in_plain_code():
    """Crop, resize and flip by Pillow, with the same numbers."""
    pipeline = train_pipeline(image_size=SIZE, flip=0.5)
    samples = np.arange(40, 52)
    draws = pipeline.draws(samples, seed=1, epoch=2)
    crops = uniforms(Stream.CROP, samples, 2 * ATTEMPTS + 2, seed=1, epoch=2)
    flips = uniforms(Stream.FLIP, samples, 1, seed=1, epoch=2)[:, 0] < 0.5
    assert 0 < flips.sum() < 12
    image = photo(60, 80)
    data = saved(image, "PNG")
    for b in range(12):
        box = crop_box((60, 80), crops[b].tolist(), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))
        expected = np.asarray(image.crop(box).resize((32, 24), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pipeline(data, draws[b]), expected[:, ::-1] if flips[b] else expected)


def test_a_list_of_transforms_is_the_same_as_train_pipeline():
    parts = [
        {"name": "random_resized_crop", "scale": (0.5, 0.9), "ratio": (1.0, 1.0)},
        {"name": "horizontal_flip", "p": 0.25},
    ]
    ours = build_pipeline(parts, image_size=SIZE)
    theirs = train_pipeline(image_size=SIZE, scale=(0.5, 0.9), ratio=(1.0, 1.0), flip=0.25)
    draws = ours.draws(np.arange(5), seed=0, epoch=0)
    np.testing.assert_array_equal(draws, theirs.draws(np.arange(5), seed=0, epoch=0))
    for row in draws:
        np.testing.assert_array_equal(ours(JPEG, row), theirs(JPEG, row))
    assert [part["name"] for part in DataConfig(image_size=SIZE).transforms] == ["random_resized_crop"]
    assert DataConfig(image_size=SIZE).max_pixels == MAX_PIXELS


def test_transforms_that_were_renamed_keep_their_random_numbers():
    """The stream of a transform is a hash of its first name, here computed by hand."""
    for name, first in (("color_jitter", "colour_jitter"), ("grayscale", "grey"), ("solarize", "solarise")):
        pipeline = build_pipeline([{"name": "resize"}, {"name": name}], image_size=SIZE)
        lane = int.from_bytes(hashlib.sha256(f"{first}.0".encode()).digest()[:2], "big")
        assert pipeline.lanes[1].attempt == lane


def test_transforms_are_applied_in_order():
    """The pixels equal those of calling each transform by hand with its own numbers."""
    pipeline = build_pipeline(ALL, image_size=SIZE)
    draws = pipeline.draws(np.arange(6), seed=2, epoch=0)
    for row in draws:
        image, numbers = Image.open(io.BytesIO(JPEG)), row.tolist()
        for transform in pipeline.transforms:
            image = transform(image, numbers[: transform.num_draws])
            numbers = numbers[transform.num_draws :]
        assert not numbers
        np.testing.assert_array_equal(pipeline(JPEG, row), np.asarray(image))


def test_a_crop_need_not_come_first():
    late = Pipeline([("grayscale", Grayscale(p=1.0)), ("random_resized_crop", RandomResizedCrop(image_size=SIZE))])
    early = Pipeline([("random_resized_crop", RandomResizedCrop(image_size=SIZE)), ("grayscale", Grayscale(p=1.0))])
    a, b = (pipeline.draws(np.arange(1), seed=0, epoch=0)[0] for pipeline in (late, early))
    assert np.abs(late(JPEG, a).astype(int) - early(JPEG, b)).max() <= 2  # grey and resizing, in either order


def test_draws_belong_to_the_sample_and_the_epoch():
    pipeline = build_pipeline(ALL, image_size=SIZE)
    draws = pipeline.draws(np.array([5, 9, 700]), seed=3, epoch=1)
    assert draws.shape == (3, pipeline.num_draws)
    alone = pipeline.draws(np.array([700]), seed=3, epoch=1)
    np.testing.assert_array_equal(draws[2:], alone)
    for other in (pipeline.draws(np.array([700]), seed=4, epoch=1), pipeline.draws(np.array([700]), seed=3, epoch=2)):
        assert not np.isin(other, alone).any()


def test_another_transform_does_not_change_the_draws_of_the_others():
    """At any place in the list."""
    every = build_pipeline(ALL, image_size=SIZE)
    columns = dict(
        zip(_names(ALL), np.split(every.draws(np.arange(4), seed=3, epoch=1), _ends(every), axis=1), strict=False)
    )
    for left_out in range(1, len(ALL)):
        fewer = ALL[:left_out] + ALL[left_out + 1 :]
        pipeline = build_pipeline(fewer, image_size=SIZE)
        parts = np.split(pipeline.draws(np.arange(4), seed=3, epoch=1), _ends(pipeline), axis=1)
        for name, part in zip(_names(fewer), parts, strict=False):
            np.testing.assert_array_equal(part, columns[name])
    reversed_pipeline = build_pipeline(ALL[::-1], image_size=SIZE)
    parts = np.split(reversed_pipeline.draws(np.arange(4), seed=3, epoch=1), _ends(reversed_pipeline), axis=1)
    np.testing.assert_array_equal(parts[0], columns[("solarize", 0)])


def _names(parts):
    names = [part["name"].replace("horizontal", "any").replace("vertical", "any") for part in parts]  # lanes 0 and 1
    return [(name, names[:k].count(name)) for k, name in enumerate(names)]


def _ends(pipeline):
    return np.cumsum([transform.num_draws for transform in pipeline.transforms])


def test_lanes_are_independent():
    """Every pair of columns is uncorrelated, over 4000 samples; each is uniform, at a level of 0.1 % each."""
    pipeline = build_pipeline(ALL, image_size=SIZE)
    draws = pipeline.draws(np.arange(4000), seed=7, epoch=0)
    correlations = np.corrcoef(draws.T) - np.eye(pipeline.num_draws)
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)
    assert min(kstest(column, "uniform").pvalue for column in draws.T) > 0.001


def test_registered_transforms_have_lanes_of_their_own():
    crop = ("random_resized_crop", RandomResizedCrop(image_size=SIZE))
    one_of_each = [(name, TRANSFORMS.build(name, EXAMPLES[name], image_size=SIZE)) for name in TRANSFORMS.names()]
    pipeline = Pipeline([crop, *one_of_each, *one_of_each])
    assert len(set(pipeline.lanes)) == len(pipeline.lanes)


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_every_registered_transform_keeps_the_contract(name):
    """RGB in, RGB out, of the size of the result; a function of its numbers; any size, down to one pixel."""
    transform = TRANSFORMS.build(name, EXAMPLES[name], image_size=SIZE)
    pipeline = Pipeline([(name, transform), ("resize", TRANSFORMS.build("resize", {}, image_size=SIZE))])
    for size in ((1, 1), (3, 50), (60, 80)):
        data = saved(photo(*size), "PNG")
        for row in pipeline.draws(np.arange(4), seed=0, epoch=0):
            pixels = pipeline(data, row)
            assert pixels.shape == (*SIZE, 3)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, pipeline(data, row))


def test_eval_view_uses_no_random_numbers():
    pipeline = eval_pipeline(image_size=SIZE, share=0.9)
    draws = pipeline.draws(np.arange(3), seed=0, epoch=0)
    assert draws.shape == (3, 0)
    expected = pipeline.transforms[0](Image.open(io.BytesIO(JPEG)))
    np.testing.assert_array_equal(pipeline(JPEG, draws[0]), np.asarray(expected))


def test_bytes_that_are_not_an_image():
    pipeline = eval_pipeline(image_size=SIZE, max_pixels=100)
    with pytest.raises(ImageError, match="the file is empty"):
        pipeline(b"", np.empty(0))
    with pytest.raises(ImageError, match=r"80 x 60 pixels are more than max_pixels \(=100\) allows"):
        pipeline(JPEG, np.empty(0))


class Black:
    """A user-defined transform."""

    num_draws = 3

    def __init__(self, *, p: float = 1.0) -> None:
        self.p = p

    def __call__(self, image, draws):
        assert len(draws) == 3
        return Image.new("RGB", image.size)


def test_a_transform_from_elsewhere():
    TRANSFORMS.register("black")(Black)
    try:
        pipeline = build_pipeline(
            [{"name": "resize"}, {"name": "black", "p": 0.5}, {"name": "horizontal_flip"}], image_size=SIZE
        )
        draws = pipeline.draws(np.arange(2), seed=0, epoch=0)
        assert draws.shape == (2, 4)
        assert not pipeline(JPEG, draws[0]).any()
        released = build_pipeline([{"name": "resize"}, {"name": "horizontal_flip"}], image_size=SIZE)
        np.testing.assert_array_equal(draws[:, 3:], released.draws(np.arange(2), seed=0, epoch=0))
    finally:
        TRANSFORMS._obj_map.pop("black")


class Wrong:
    """A transform that violates the contract."""

    num_draws = 0

    def __init__(self, result):
        self.result = result

    def __call__(self, image, draws):
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Image.new("L", SIZE[::-1]), r"gave an image in mode 'L' of size \(32, 24\), but must give one in mode 'RGB'"),
        (Image.new("RGB", (9, 8)), r".* of size \(9, 8\), but must .* of size \(32, 24\), as no crop comes after"),
        (np.zeros((*SIZE, 3)), "gave a ndarray, but must give a Pillow image"),
        (None, "gave a NoneType, but must give a Pillow image"),
    ],
)
def test_a_wrong_result_names_the_transform(result, message):
    resize = ("resize", TRANSFORMS.build("resize", {}, image_size=SIZE))
    with pytest.raises(ValueError, match=f"transform 'wrong' {message}"):
        Pipeline([resize, ("wrong", Wrong(result)), ("horizontal_flip", HorizontalFlip(p=1.0))])(JPEG, np.zeros(1))


def test_before_a_crop_a_transform_may_change_the_size():
    resize = ("resize", TRANSFORMS.build("resize", {}, image_size=SIZE))
    assert Pipeline([("pad", Wrong(Image.new("RGB", (90, 90)))), resize])(JPEG, np.zeros(0)).shape == (*SIZE, 3)
    with pytest.raises(ValueError, match=r"transform 'pad' gave an image in mode 'L' of size \(90, 90\), but must"):
        Pipeline([("pad", Wrong(Image.new("L", (90, 90)))), resize])(JPEG, np.zeros(0))


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
@pytest.mark.parametrize("first", [True, False])
def test_a_thin_image_is_rejected_before_it_is_enlarged(decoder, first, monkeypatch):
    """2,000 x 1 pixels would be enlarged to 448,000 x 224, 300 MB, before the centre is cropped."""
    if decoder == "fast":
        pytest.importorskip("simplejpeg")
    crop = ("center_crop", TRANSFORMS.build("center_crop", {}, image_size=(224, 224)))
    pipeline = Pipeline([crop] if first else [("horizontal_flip", HorizontalFlip(p=1.0)), crop], decoder=decoder)
    draws = np.zeros(pipeline.num_draws)
    monkeypatch.setattr(Image.Image, "resize", None)
    with pytest.raises(
        ImageError, match=rf"2000 x 1 pixels would become 448000 x 224 before center_crop cuts .* \(={MAX_PIXELS}\)"
    ):
        pipeline(THIN, draws)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [{"name": "horizontal_flip"}],
            r"transforms \(=\['horizontal_flip'\]\) must have one that sets the size: center_crop, random_resized",
        ),
        ([], r"transforms \(=\[\]\) must have one that sets the size"),
        ([{"name": "random_resized_crp"}], r"transforms\[0\].name: .* did you mean 'random_resized_crop'\?"),
        ([{}], r"transforms\[0\].name: None is not a registered transform"),
        (
            [{"name": "resize"}, {"name": "horizontal_flip", "pp": 1}],
            r"transforms\[1\].pp is not an option of 'horizontal_flip'; did you mean 'p'",
        ),
        (
            [{"name": "resize"}, {"name": "horizontal_flip", "p": 2.0}],
            r"transforms\[1\]: p \(=2.0\) must be a probability",
        ),
    ],
)
def test_invalid_lists_of_transforms(parts, message):
    with pytest.raises(ValueError, match=message):
        build_pipeline(parts, image_size=SIZE)


def test_transforms_with_the_same_lane_are_rejected(monkeypatch):
    monkeypatch.setattr("jepa_kit.data.transforms.pipeline._hash16", lambda name, count: 7)
    resize = TRANSFORMS.build("resize", {}, image_size=SIZE)
    with pytest.raises(ValueError, match="transforms: 'grayscale' has the random numbers of another one"):
        Pipeline([("resize", resize), ("color_jitter", ColorJitter()), ("grayscale", Grayscale())])


def test_views_can_be_pickled():
    """Loader workers may be spawned."""
    pipeline = Pipeline(
        [
            ("random_resized_crop", RandomResizedCrop(image_size=SIZE)),
            ("horizontal_flip", HorizontalFlip()),
            ("b", GaussianBlur()),
        ]
    )
    copy = pickle.loads(pickle.dumps(pipeline))
    row = pipeline.draws(np.arange(1), seed=0, epoch=0)[0]
    np.testing.assert_array_equal(copy(JPEG, row), pipeline(JPEG, row))
