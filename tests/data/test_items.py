"""Data sets of other libraries are read as folders of the same images are: the same pixels, order, masks and labels."""

import io
import re
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from small_shards import encoded, picture
from test_exactness import a_loader, stream
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.items import item_samples
from jepa_kit.data.listed import image_files
from jepa_kit.data.loader import eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import difference, identity
from jepa_kit.errors import SampleError

COUNT = 24
PIXELS = [picture(k, 16 + k % 5, 20) for k in range(COUNT)]


class Photos(Dataset):
    """A data set as torchvision's: items of images of Pillow with the numbers of their classes."""

    def __init__(self, images=None):
        self.images = PIXELS if images is None else images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 3


@pytest.fixture
def files(tmp_path):
    paths = []
    for k, image in enumerate(PIXELS):
        paths.append(tmp_path / f"{k:02d}.png")
        paths[-1].write_bytes(encoded(image, "PNG"))
    return paths


def pixels_of(dataset, **options):
    options = ImageOptions(image_size=(12, 12), batch_size=10, num_workers=0)
    return torch.cat([batch.images for batch in eval_batches(ShardDataset(item_samples(dataset)), options)])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_those_of_files_with_the_same_images(files, workers):
    """Images, masks and order of two epochs, and from a later step on."""
    ours, theirs = ShardDataset(item_samples(Photos())), ShardDataset(image_files(files))
    for start in (0, 4):
        one, other = (stream(d, 6, start, num_workers=workers) for d in (ours, theirs))
        assert one == other


def as_png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda image, path: image, id="pillow"),
        pytest.param(lambda image, path: np.asarray(image), id="array"),
        pytest.param(lambda image, path: torch.from_numpy(np.array(image)).permute(2, 0, 1), id="tensor"),
        pytest.param(lambda image, path: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, id="float tensor"),
        pytest.param(lambda image, path: as_png(image), id="bytes"),
        pytest.param(lambda image, path: path, id="path"),
        pytest.param(lambda image, path: {"image": image, "label": 0}, id="mapping"),
        pytest.param(lambda image, path: (image, 0, "more"), id="tuple"),
    ],
)
def test_every_kind_of_item_has_the_pixels_of_the_file(files, kind):
    items = [kind(image, path) for image, path in zip(PIXELS, files, strict=True)]
    assert pixels_of(items).equal(pixels_of([str(path) for path in files]))


def test_grey_images_become_rgb():
    grey = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    image = ShardDataset(item_samples(grey[None])).image(0)
    assert np.asarray(image)[..., 1].tolist() == grey[0].tolist()
    assert ShardDataset(item_samples([grey[0].numpy()])).image(0).mode == "RGB"


class Targets(Photos):
    """With attributes as torchvision's: labels are not read from items."""

    targets = torch.arange(COUNT) % 3
    classes = ("bird", "cat", "dog")

    def __getitem__(self, i):
        return self.images[i]


def test_labels():
    numbers = [k % 3 for k in range(COUNT)]
    assert item_samples(Photos()).classes == {}
    read = item_samples(Photos(), labels=True)
    assert (read.classes, read.labels.values["class"].tolist()) == ({"class": ("0", "1", "2")}, numbers)
    named = item_samples(Targets())
    assert (named.classes, named.labels.values["class"].tolist()) == ({"class": ("bird", "cat", "dog")}, numbers)
    part = item_samples(Subset(Targets(), [1, 2, 5]))
    assert (part.classes, part.labels.values["class"].tolist()) == (named.classes, [1, 2, 2])
    assert pixels_of(Subset(Targets(), [1])).equal(pixels_of([PIXELS[1]]))
    tensors = TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))
    assert item_samples(tensors, labels=True).labels.values["class"].tolist() == [0, 1, 1, 0]
    texts = item_samples([(image, "ab"[k % 2]) for k, image in enumerate(PIXELS)], labels=True)
    assert texts.classes == {"class": ("a", "b")}
    assert item_samples(PIXELS, labels=True).classes == {}


def test_the_identity_is_that_of_number_labels_and_images():
    def now(dataset):
        return identity(ShardDataset(item_samples(dataset)).shards)

    before = now(Targets())
    how = "number, labels and 32 images"
    assert difference(before, now(Targets())) == (
        None,
        f"1 of 1 data sets are samples in no shard: compared by their {how}",
    )
    other = Targets([picture(99, 16, 20), *PIXELS[1:]])
    assert difference(before, now(other))[0].startswith(f"data set 0 differs: Targets had digest of {how} ")
    assert difference(before, now(Photos()))[0].startswith("data set 0 differs: Targets had digest")
    shorter = Subset(Photos(), range(9))
    assert difference(before, now(shorter))[0] == "data set 0 differs: Targets had samples 24, but here Subset has 9"


class Damaged(Photos):
    """One item raises the error that Pillow raises for a file that is no image, and one file is missing."""

    def __init__(self):
        super().__init__()
        self.opened = []  # kept, so that each has another address in memory, which is in Pillow's message

    def __getitem__(self, i):
        if i == 3:
            self.opened.append(io.BytesIO(b"no image"))
            return Image.open(self.opened[-1])
        return "nowhere/4.png" if i == 4 else super().__getitem__(i)


def test_an_item_that_cannot_be_read_is_skipped_and_named():
    dataset = ShardDataset(item_samples(Damaged()))
    assert identity(dataset.shards) == identity(ShardDataset(item_samples(Damaged())).shards)
    with pytest.raises(SampleError, match=r"^item 3 of Damaged cannot be read: cannot identify image file"):
        dataset.image_bytes(3)
    with pytest.raises(SampleError, match=r"^item 4 of Damaged cannot be read: No such file"):
        dataset.image_bytes(4)
    batches = [batch for _, batch in islice(a_loader(dataset).batches(), 3)]
    assert {s.key for batch in batches for s in batch.skipped} == {"00000003", "00000004"}
    assert sum(map(len, batches)) == COUNT - 2


class Stream(IterableDataset):
    """No length, no numbers."""

    def __iter__(self):
        return iter(PIXELS)


class Flipping(Photos):
    """Random transforms."""

    def __getitem__(self, i):
        return torch.rand(3, 8, 8), 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "images (=a Stream) must have a length and items by number"),
        (iter(PIXELS), "images (=a list_iterator) must have a length and items by number"),
        ({"train": Photos(), "test": Photos()}, "images (=a dict of train, test) must be one data set: give one of"),
        ([], "images (=a list) must have at least one item"),
        (Flipping(), "item 0 of Flipping differs between two readings"),
        ([3], "item 0 of list (=a int) must be or begin with an image"),
        ([None], "item 0 of list (=a NoneType) must be or begin with an image"),
        ([{"photo": 1}], "item 0 of list (=a NoneType) must be or begin with an image"),
        (
            torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
            "item 0 of Tensor (=a Tensor of torch.uint8, shape (4, 8, 8))",
        ),
        (np.zeros((2, 8, 8, 3), np.float32), "item 0 of ndarray (=a ndarray of float32, shape (8, 8, 3)) must be"),
        (
            torch.full((2, 3, 8, 8), -0.5),
            "item 0 of Tensor has values from -0.5 to -0.5: a float image must",
        ),
    ],
)
def test_what_is_no_data_set_of_images_is_refused(dataset, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        item_samples(dataset)


def test_labels_that_do_not_fit_are_refused():
    short = Targets()
    short.targets = [0, 1]
    with pytest.raises(ValueError, match=r"targets of Targets \(of length 2\) must be one for each of its 24 items"):
        item_samples(short)
    with pytest.raises(ValueError, match=r"labels of list must be numbers or names of classes, not \[1, 2\]"):
        item_samples([(image, [1, 2]) for image in PIXELS], labels=True)
