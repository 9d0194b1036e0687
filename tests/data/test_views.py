"""Views: transforms in order, from bytes; draws that belong to (seed, epoch, sample), a lane for each transform."""

import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from photos import photo, saved
from PIL import Image
from scipy.stats import kstest

from jepa_kit.config import DataConfig
from jepa_kit.data.images import MAX_PIXELS
from jepa_kit.data.transforms import (
    ATTEMPTS,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    RandomResizedCrop,
    View,
    build_view,
    crop_box,
    eval_view,
    train_view,
)
from jepa_kit.errors import ImageError, SampleError
from jepa_kit.registry import TRANSFORMS
from jepa_kit.rng import Stream, uniforms

SIZE = (24, 32)
ALL = [
    {"name": "random_resized_crop", "scale": [0.3, 1.0]},
    {"name": "flip"},
    {"name": "flip", "direction": "vertical"},
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
    view = train_view(image_size=SIZE, flip=0.5)
    samples = np.arange(40, 52)
    draws = view.draws(samples, seed=1, epoch=2)
    crops = uniforms(Stream.CROP, samples, 2 * ATTEMPTS + 2, seed=1, epoch=2)
    flips = uniforms(Stream.FLIP, samples, 1, seed=1, epoch=2)[:, 0] < 0.5
    assert 0 < flips.sum() < 12
    image = photo(60, 80)
    data = saved(image, "PNG")
    for b in range(12):
        box = crop_box((60, 80), crops[b].tolist(), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))
        expected = np.asarray(image.crop(box).resize((32, 24), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(view(data, draws[b]), expected[:, ::-1] if flips[b] else expected)


def test_a_list_of_transforms_is_the_same_as_train_view():
    parts = [
        {"name": "random_resized_crop", "scale": (0.5, 0.9), "ratio": (1.0, 1.0)},
        {"name": "flip", "p": 0.25},
    ]
    ours = build_view(parts, image_size=SIZE)
    theirs = train_view(image_size=SIZE, scale=(0.5, 0.9), ratio=(1.0, 1.0), flip=0.25)
    draws = ours.draws(np.arange(5), seed=0, epoch=0)
    np.testing.assert_array_equal(draws, theirs.draws(np.arange(5), seed=0, epoch=0))
    for row in draws:
        np.testing.assert_array_equal(ours(JPEG, row), theirs(JPEG, row))
    assert [part["name"] for part in DataConfig(image_size=SIZE).transforms] == ["random_resized_crop"]
    assert DataConfig(image_size=SIZE).max_pixels == MAX_PIXELS


def test_transforms_that_were_renamed_keep_their_random_numbers():
    """The stream of a transform is a hash of its first name, here computed by hand."""
    for name, first in (("color_jitter", "colour_jitter"), ("grayscale", "grey"), ("solarize", "solarise")):
        view = build_view([{"name": "resize"}, {"name": name}], image_size=SIZE)
        lane = int.from_bytes(hashlib.sha256(f"{first}.0".encode()).digest()[:2], "big")
        assert view.lanes[1].attempt == lane


def test_transforms_are_applied_in_order():
    """The pixels equal those of calling each transform by hand with its own numbers."""
    view = build_view(ALL, image_size=SIZE)
    draws = view.draws(np.arange(6), seed=2, epoch=0)
    for row in draws:
        image, numbers = Image.open(io.BytesIO(JPEG)), row.tolist()
        for transform in view.transforms:
            image = transform(image, numbers[: transform.num_draws])
            numbers = numbers[transform.num_draws :]
        assert not numbers
        np.testing.assert_array_equal(view(JPEG, row), np.asarray(image))


def test_a_crop_need_not_come_first():
    late = View([("grayscale", Grayscale(p=1.0)), ("random_resized_crop", RandomResizedCrop(image_size=SIZE))])
    early = View([("random_resized_crop", RandomResizedCrop(image_size=SIZE)), ("grayscale", Grayscale(p=1.0))])
    a, b = (view.draws(np.arange(1), seed=0, epoch=0)[0] for view in (late, early))
    assert np.abs(late(JPEG, a).astype(int) - early(JPEG, b)).max() <= 2  # grey and resizing, in either order


def test_draws_belong_to_the_sample_and_the_epoch():
    view = build_view(ALL, image_size=SIZE)
    draws = view.draws(np.array([5, 9, 700]), seed=3, epoch=1)
    assert draws.shape == (3, view.num_draws)
    alone = view.draws(np.array([700]), seed=3, epoch=1)
    np.testing.assert_array_equal(draws[2:], alone)
    for other in (view.draws(np.array([700]), seed=4, epoch=1), view.draws(np.array([700]), seed=3, epoch=2)):
        assert not np.isin(other, alone).any()


def test_another_transform_does_not_change_the_draws_of_the_others():
    """At any place in the list."""
    every = build_view(ALL, image_size=SIZE)
    columns = dict(
        zip(_names(ALL), np.split(every.draws(np.arange(4), seed=3, epoch=1), _ends(every), axis=1), strict=False)
    )
    for left_out in range(1, len(ALL)):
        fewer = ALL[:left_out] + ALL[left_out + 1 :]
        view = build_view(fewer, image_size=SIZE)
        parts = np.split(view.draws(np.arange(4), seed=3, epoch=1), _ends(view), axis=1)
        for name, part in zip(_names(fewer), parts, strict=False):
            np.testing.assert_array_equal(part, columns[name])
    reversed_view = build_view(ALL[::-1], image_size=SIZE)
    parts = np.split(reversed_view.draws(np.arange(4), seed=3, epoch=1), _ends(reversed_view), axis=1)
    np.testing.assert_array_equal(parts[0], columns[("solarize", 0)])


def _names(parts):
    names = [part["name"] for part in parts]
    return [(name, names[:k].count(name)) for k, name in enumerate(names)]


def _ends(view):
    return np.cumsum([transform.num_draws for transform in view.transforms])


def test_lanes_are_independent():
    """Every pair of columns is uncorrelated, over 4000 samples; each is uniform, at a level of 0.1 % each."""
    view = build_view(ALL, image_size=SIZE)
    draws = view.draws(np.arange(4000), seed=7, epoch=0)
    correlations = np.corrcoef(draws.T) - np.eye(view.num_draws)
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)
    assert min(kstest(column, "uniform").pvalue for column in draws.T) > 0.001


def test_registered_transforms_have_lanes_of_their_own():
    crop = ("random_resized_crop", RandomResizedCrop(image_size=SIZE))
    one_of_each = [(name, TRANSFORMS.build(name, EXAMPLES[name], image_size=SIZE)) for name in TRANSFORMS.names()]
    view = View([crop, *one_of_each, *one_of_each])
    assert len(set(view.lanes)) == len(view.lanes)


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_every_registered_transform_keeps_the_contract(name):
    """RGB in, RGB out, of the size of the result; a function of its numbers; any size, down to one pixel."""
    transform = TRANSFORMS.build(name, EXAMPLES[name], image_size=SIZE)
    view = View([(name, transform), ("resize", TRANSFORMS.build("resize", {}, image_size=SIZE))])
    for size in ((1, 1), (3, 50), (60, 80)):
        data = saved(photo(*size), "PNG")
        for row in view.draws(np.arange(4), seed=0, epoch=0):
            pixels = view(data, row)
            assert pixels.shape == (*SIZE, 3)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, view(data, row))


def test_eval_view_uses_no_random_numbers():
    view = eval_view(image_size=SIZE, share=0.9)
    draws = view.draws(np.arange(3), seed=0, epoch=0)
    assert draws.shape == (3, 0)
    expected = view.transforms[0](Image.open(io.BytesIO(JPEG)))
    np.testing.assert_array_equal(view(JPEG, draws[0]), np.asarray(expected))


def test_bytes_that_are_not_an_image():
    view = eval_view(image_size=SIZE, max_pixels=100)
    with pytest.raises(ImageError, match="the file is empty"):
        view(b"", np.empty(0))
    with pytest.raises(ImageError, match=r"80 x 60 pixels are more than max_pixels \(=100\) allows"):
        view(JPEG, np.empty(0))


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
        view = build_view([{"name": "resize"}, {"name": "black", "p": 0.5}, {"name": "flip"}], image_size=SIZE)
        draws = view.draws(np.arange(2), seed=0, epoch=0)
        assert draws.shape == (2, 4)
        assert not view(JPEG, draws[0]).any()
        released = build_view([{"name": "resize"}, {"name": "flip"}], image_size=SIZE)
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
        View([resize, ("wrong", Wrong(result)), ("flip", Flip(p=1.0))])(JPEG, np.zeros(1))


def test_before_a_crop_a_transform_may_change_the_size():
    resize = ("resize", TRANSFORMS.build("resize", {}, image_size=SIZE))
    assert View([("pad", Wrong(Image.new("RGB", (90, 90)))), resize])(JPEG, np.zeros(0)).shape == (*SIZE, 3)
    with pytest.raises(ValueError, match=r"transform 'pad' gave an image in mode 'L' of size \(90, 90\), but must"):
        View([("pad", Wrong(Image.new("L", (90, 90)))), resize])(JPEG, np.zeros(0))


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
@pytest.mark.parametrize("first", [True, False])
def test_a_thin_image_is_rejected_before_it_is_enlarged(decoder, first, monkeypatch):
    """2,000 x 1 pixels would be enlarged to 448,000 x 224, 300 MB, before the centre is cropped."""
    if decoder == "fast":
        pytest.importorskip("simplejpeg")
    crop = ("center_crop", TRANSFORMS.build("center_crop", {}, image_size=(224, 224)))
    view = View([crop] if first else [("flip", Flip(p=1.0)), crop], decoder=decoder)
    draws = np.zeros(view.num_draws)
    monkeypatch.setattr(Image.Image, "resize", None)
    with pytest.raises(
        ImageError, match=rf"2000 x 1 pixels would become 448000 x 224 before center_crop cuts .* \(={MAX_PIXELS}\)"
    ):
        view(THIN, draws)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [{"name": "flip"}],
            r"transforms \(=\['flip'\]\) must have one that sets the size: center_crop, random_resized",
        ),
        ([], r"transforms \(=\[\]\) must have one that sets the size"),
        ([{"name": "random_resized_crp"}], r"transforms\[0\].name: .* did you mean 'random_resized_crop'\?"),
        ([{}], r"transforms\[0\].name: None is not a registered transform"),
        (
            [{"name": "resize"}, {"name": "flip", "pp": 1}],
            r"transforms\[1\].pp is not an option of 'flip'; did you mean 'p'",
        ),
        ([{"name": "resize"}, {"name": "flip", "p": 2.0}], r"transforms\[1\]: p \(=2.0\) must be a probability"),
    ],
)
def test_invalid_lists_of_transforms(parts, message):
    with pytest.raises(ValueError, match=message):
        build_view(parts, image_size=SIZE)


def test_a_batch_leaves_out_files_that_cannot_be_used():
    """Pixels are Pillow's; no transform is given a file that was left out, and no gap is left in the batch."""

    def missing():
        raise SampleError("gone")

    view = eval_view(image_size=SIZE)
    photos = [photo(60, 80, seed=k) for k in range(2)]
    files = [lambda: b"", lambda: saved(photos[0], "PNG"), missing, lambda: saved(photos[1], "PNG")]
    images, kept, errors = view.load(files, np.empty((4, 0)))
    assert kept == [1, 3]
    assert {b: str(error) for b, error in errors.items()} == {0: "the file is empty", 2: "gone"}
    expected = [np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR)) for image in photos]
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), expected)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert view.load(files[:1], np.empty((1, 0))).images is None


def test_transforms_with_the_same_lane_are_rejected(monkeypatch):
    monkeypatch.setattr("jepa_kit.data.transforms.view._hash16", lambda name, count: 7)
    resize = TRANSFORMS.build("resize", {}, image_size=SIZE)
    with pytest.raises(ValueError, match="transforms: 'grayscale' has the random numbers of another one"):
        View([("resize", resize), ("color_jitter", ColorJitter()), ("grayscale", Grayscale())])


def test_views_can_be_pickled():
    """Loader workers may be spawned."""
    view = View([("random_resized_crop", RandomResizedCrop(image_size=SIZE)), ("flip", Flip()), ("b", GaussianBlur())])
    copy = pickle.loads(pickle.dumps(view))
    row = view.draws(np.arange(1), seed=0, epoch=0)[0]
    np.testing.assert_array_equal(copy(JPEG, row), view(JPEG, row))
