"""Views: each sample is read and decoded once, and view k is what its own pipeline, seed and masker give."""

import hashlib
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import photo, saved
from PIL import Image
from small_shards import make_samples, write_shards

from jepa_kit.data.images import DECODERS
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.reader import ShardFile
from jepa_kit.data.transforms import Pipeline, build_pipeline, eval_pipeline
from jepa_kit.data.views import ViewMaker, load_images
from jepa_kit.errors import SampleError
from jepa_kit.maskers.multiblock import MultiBlock
from jepa_kit.rng import Stream, uniforms, view_seed

SIZE, SEED, BATCH = (24, 32), 6, 5
CROP = {"name": "random_resized_crop", "scale": (0.4, 1.0)}
COLOURS = [{"name": "color_jitter"}, {"name": "grayscale", "p": 0.5}]


def crops(side, *more):
    return build_pipeline([CROP, {"name": "horizontal_flip"}, *more], image_size=(side, side))


VIEWS = [
    ViewMaker(pipeline=crops(12), masker=MultiBlock(grid=(6, 6))),
    ViewMaker(pipeline=crops(12, *COLOURS), masker=MultiBlock(grid=(6, 6)), action=True),
    ViewMaker(pipeline=crops(8), masker=MultiBlock(grid=(8, 8))),
    ViewMaker(pipeline=crops(12, *COLOURS), same_draws=("random_resized_crop",)),
    ViewMaker(pipeline=eval_pipeline(image_size=(9, 7))),
]


def a_loader(dataset, views=VIEWS, **options):
    return TrainLoader(
        dataset=dataset, views=views, **({"batch_size": BATCH, "seed": SEED, "shuffle_window": 9} | options)
    )


def one(dataset, views=VIEWS, step=0, **options):
    return next(iter(a_loader(dataset, views, **options).batches(step)))[1]


def records(batch):
    """Return (sample, a digest of its images, masks and actions in all views) of each sample, in order."""
    found = []
    for b, sample in enumerate(batch.samples.tolist()):
        digest = hashlib.sha256()
        for view in batch.views:
            digest.update(view.images[b].numpy().tobytes())
            digest.update(str(None if view.action is None else view.action[b].tolist()).encode())
            if view.masks is not None:
                digest.update(str([[x.tolist() for x in s.split()] for s in sets_of(view.masks, b)]).encode())
        found.append((sample, digest.hexdigest()))
    return found


def sets_of(masks, image):
    part = masks.split([0, image, image + 1])[1] if image else masks.split([0, 1])[0]
    return part.context, part.targets


def test_the_seed_of_a_view():
    """The run's own for the first; else 63 bits of Philox, all different and equally likely."""
    assert [view_seed(seed, 0) for seed in (0, 7, 2**63 - 1)] == [0, 7, 2**63 - 1]
    found = [view_seed(seed, k) for seed in range(200) for k in range(1, 11)]
    assert len(set(found)) == len(found)
    assert 0 <= min(found) < max(found) < 2**63
    bits = np.array([[seed >> b & 1 for b in range(63)] for seed in found])
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(found))
    assert np.abs(np.corrcoef(bits.T) - np.eye(63)).max() < 5 / np.sqrt(len(found))


def test_a_batch_assembled_by_hand(dataset):
    batch = one(dataset, step=7)
    samples = batch.samples.numpy()
    assert len(batch.views) == len(VIEWS)
    for k, (view, maker) in enumerate(zip(batch.views, VIEWS, strict=True)):
        pipeline, seed, epoch = maker.pipeline, view_seed(SEED, k), 1
        draws = pipeline.draws(samples, seed=seed, epoch=epoch)
        if k == 3:  # the crop is that of the first view
            draws[:, :22] = uniforms(Stream.CROP, samples, 22, seed=SEED, epoch=epoch)
        for b, sample in enumerate(samples):
            expected = pipeline(dataset.image_bytes(int(sample)), draws[b])
            np.testing.assert_array_equal(view.images[b].permute(1, 2, 0), expected)
        assert view.images.is_contiguous(memory_format=torch.channels_last)
        if maker.masker is None:
            assert view.masks is None
            continue
        expected = maker.masker(samples, seed=seed, epoch=epoch, step=7)
        assert view.masks.grid == expected.grid == ((8, 8) if k == 2 else (6, 6))
        assert torch.equal(view.masks.context.index, expected.context.index)
        assert torch.equal(view.masks.targets.index, expected.targets.index)


def test_further_views_do_not_change_the_first(dataset):
    alone, several = one(dataset, VIEWS[:1]), one(dataset)
    assert torch.equal(alone.images, several.images)
    assert torch.equal(alone.masks.context.index, several.masks.context.index)
    assert several.masks is several.views[0].masks


def test_views_that_are_made_alike_differ(dataset):
    first, second = one(dataset, [VIEWS[0]] * 2).views
    assert all(not torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))
    assert not torch.equal(first.masks.context.index, second.masks.context.index)


def test_the_same_draws(dataset):
    """A view with the draws of the first for all its transforms is the first view."""
    pipeline = VIEWS[1].pipeline
    names = ("random_resized_crop", "horizontal_flip", "color_jitter", "grayscale")
    makers = [ViewMaker(pipeline=pipeline), ViewMaker(pipeline=pipeline, same_draws=names)]
    first, second = one(dataset, makers).views
    assert torch.equal(first.images, second.images)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """29 samples in shards of 6."""
    return write_shards(tmp_path_factory.mktemp("data") / "s", make_samples(29), 6, {"class": tuple("abcd")})


STEPS = 2 * (29 // BATCH) + 2


def stream(dataset, steps, start=0, world_size=1, **options):
    ranks = [
        [records(batch) for _, batch in islice(a_loader(dataset, rank=rank, **options).batches(start), steps)]
        for rank, options in ((rank, {"world_size": world_size, **options}) for rank in range(world_size))
    ]
    return [[record for part in parts for record in part] for parts in zip(*ranks, strict=True)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 3), (5, 0), (5, 1)])
def test_any_ranks_and_workers_see_the_same_views(shards, world_size, num_workers):
    expected = stream(ShardDataset(shards), STEPS)
    assert stream(ShardDataset(shards), STEPS, world_size=world_size, num_workers=num_workers) == expected


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(1, STEPS - 1))
def test_a_resume_at_any_step(shards, stop):
    dataset = ShardDataset(shards)
    expected = stream(dataset, STEPS)
    assert expected[stop:] == stream(dataset, STEPS - stop, stop)


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_a_file_is_read_and_decoded_once_for_all_views(dataset, monkeypatch, decoder):
    reads, decoded = Counter(), Counter()
    original, decode = ShardFile.read, DECODERS[decoder]

    def read(file):
        reads[file.key] += 1
        return original(file)

    def counted(data, max_pixels):
        decoded[data] += 1
        return decode(data, max_pixels)

    monkeypatch.setattr(ShardFile, "read", read)
    monkeypatch.setitem(DECODERS, decoder, counted)
    makers = [
        ViewMaker(pipeline=build_pipeline([CROP, *COLOURS], image_size=(s, s), decoder=decoder)) for s in (8, 8, 12)
    ]
    batches = list(islice(a_loader(dataset, makers).batches(), len(dataset) // BATCH))
    assert all(len(batch.views) == 3 for _, batch in batches)
    assert len(reads) == len(decoded) == len(dataset) // BATCH * BATCH
    assert set(reads.values()) == set(decoded.values()) == {1}


@pytest.mark.parametrize("crop_first", [True, False])
def test_the_decoder_is_that_of_each_view_alone(crop_first):
    """Arrays of the fast decoder are shared with a view whose first transform is not a crop, with the same pixels."""
    lists = [[CROP, {"name": "horizontal_flip"}], [{"name": "grayscale", "p": 1.0}, CROP]]
    lists = lists if crop_first else lists[::-1]
    pipelines = [build_pipeline(parts, image_size=SIZE, decoder="fast") for parts in lists]
    draws = [p.draws(np.arange(1), seed=k, epoch=0) for k, p in enumerate(pipelines)]
    data = saved(photo(90, 120), quality=90)
    images = load_images([ViewMaker(pipeline=p) for p in pipelines], [lambda: data], draws).images
    for view, pipeline, row in zip(images, pipelines, draws, strict=True):
        np.testing.assert_array_equal(view[0].permute(1, 2, 0), pipeline(data, row[0]))


def test_a_batch_leaves_out_files_that_cannot_be_used():
    """Pixels are Pillow's; no transform is given a file that was left out, and no gap is left in the batch."""

    def missing():
        raise SampleError("gone")

    pipeline = eval_pipeline(image_size=SIZE)
    photos = [photo(60, 80, seed=k) for k in range(2)]
    files = [lambda: b"", lambda: saved(photos[0], "PNG"), missing, lambda: saved(photos[1], "PNG")]
    maker = ViewMaker(pipeline=pipeline)
    (images,), _, kept, errors = load_images([maker], files, [np.empty((4, 0))])
    assert kept == [1, 3]
    assert {b: str(error) for b, error in errors.items()} == {0: "the file is empty", 2: "gone"}
    expected = [np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR)) for image in photos]
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), expected)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert load_images([maker], files[:1], [np.empty((1, 0))]).images == []


def test_a_sample_that_one_view_cannot_use_is_missing_from_all():
    """A narrow image would be enlarged beyond the limit before the centre crop of the second view."""
    makers = [
        ViewMaker(pipeline=build_pipeline([{"name": name}], image_size=(20, 20), max_pixels=5000), action=True)
        for name in ("resize", "center_crop")
    ]
    files = [lambda: saved(photo(60, 60), "PNG"), lambda: saved(photo(4, 90), "PNG"), lambda: saved(photo(9, 9), "PNG")]
    images, actions, kept, errors = load_images(makers, files, [np.empty((3, 0))] * 2)
    assert kept == [0, 2]
    assert "before center_crop cuts them" in str(errors[1])
    assert all(torch.equal(action, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)) for action in actions)
    for view in images:
        assert len(view) == 2
        assert view[0].float().std() > 1  # a picture, no memory that was never written
    np.testing.assert_array_equal(
        images[1][1].permute(1, 2, 0), photo(9, 9).resize((20, 20), Image.Resampling.BILINEAR)
    )


def test_views_that_do_not_fit_together(dataset):
    with pytest.raises(ValueError, match=r"views \(=\[\]\) must be at least one"):
        a_loader(dataset, [])
    views = [ViewMaker(pipeline=eval_pipeline(image_size=(8, 8), max_pixels=n)) for n in (100, 200)]
    message = r"views must have one decoder and max_pixels, .* not \[\('pillow', 100\), \('pillow', 200\)\]"
    with pytest.raises(ValueError, match=message):
        a_loader(dataset, views)


def test_seconds_per_image_are_of_all_views(dataset, monkeypatch):
    applied = []
    original = Pipeline.apply
    monkeypatch.setattr(Pipeline, "apply", lambda *given: applied.append(given[0]) or original(*given))
    assert a_loader(dataset).seconds_per_image(4) > 0
    assert len(applied) == 4 * len(VIEWS)
