"""Batches are pure functions of (seed, step): for any number of workers and ranks, and from any step on."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_shards import encoded, picture, write_shards

from jepa_kit.data import workers
from jepa_kit.data.batch import Batch
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.loader import TrainLoader, eval_batches
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import Sample
from jepa_kit.data.transforms import eval_pipeline, train_pipeline
from jepa_kit.data.views import ViewMaker
from jepa_kit.rng import Stream, epoch_order, uniforms
from jepa_kit.structures import MaskBatch, PatchSets, View


@dataclass
class Halves:
    """A masker: one row of a 4 x 4 grid is the context, and the next the target; drawn by (seed, epoch, sample)."""

    grid: tuple = (4, 4)

    def __call__(self, samples, *, seed, epoch, step=0):
        row = (uniforms(Stream.MASK, samples, 1, seed=seed, epoch=epoch)[:, 0] * 3).astype(np.int64)
        cells = torch.from_numpy(row[:, None] * 4 + np.arange(4))
        context, targets = PatchSets.from_padded(cells), PatchSets.from_padded(cells + 4)
        return MaskBatch(context, targets, self.grid, torch.arange(len(samples)))


@dataclass
class Steps(Halves):
    """A masker whose first context patch is the step that it is given."""

    def __call__(self, samples, *, seed, epoch, step=0):
        cells = torch.full((len(samples), 1), step % 16)
        sets = PatchSets.from_padded(cells)
        return MaskBatch(sets, sets, self.grid, torch.arange(len(samples)))


PIPELINE = train_pipeline(image_size=(12, 16), flip=0.5)


def loader(dataset, masker=Halves(), **options):  # noqa: B008 (has no state)
    defaults = {"batch_size": 6, "seed": 3, "shuffle_window": 8}
    views = [ViewMaker(pipeline=PIPELINE, masker=masker)]
    return TrainLoader(dataset=dataset, **({"views": views} | defaults | options))


def take(a_loader, count, start=0):
    return list(islice(a_loader.batches(start), count))


def assert_same(a, b):
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.samples, b.samples)
    for x, y in ((a.masks.context, b.masks.context), (a.masks.targets, b.masks.targets)):
        assert torch.equal(x.index, y.index)
        assert torch.equal(x.image, y.image)
        assert x.lengths == y.lengths


def test_a_batch_assembled_by_hand(dataset):
    """Order, crop, flip and masks of step 7 = batch 1 of epoch 2, put together by hand."""
    step, batch = take(loader(dataset), 1, start=7)[0]
    assert step == 7
    samples = epoch_order([10, 10, 3], seed=3, epoch=2, window=8)[6:12]
    np.testing.assert_array_equal(batch.samples, samples)
    draws = PIPELINE.draws(samples, seed=3, epoch=2)
    for b, i in enumerate(samples):
        expected = PIPELINE(dataset.image_bytes(i), draws[b])
        np.testing.assert_array_equal(batch.images[b].permute(1, 2, 0), expected)
    masks = Halves()(samples, seed=3, epoch=2)
    assert torch.equal(batch.masks.context.index, masks.context.index)
    assert batch.images.dtype == torch.uint8
    assert len(batch) == 6


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers(dataset, num_workers):
    for (step, a), (_, b) in zip(
        take(loader(dataset), 8), take(loader(dataset, num_workers=num_workers), 8), strict=True
    ):
        assert_same(a, b)
        assert a.images.shape == (6, 3, 12, 16), step


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_one(dataset, world_size):
    whole = take(loader(dataset), 7)
    parts = [take(loader(dataset, rank=r, world_size=world_size), 7) for r in range(world_size)]
    for step, batch in whole:
        ranks = [part[step][1] for part in parts]
        assert torch.equal(batch.images, torch.cat([b.images for b in ranks]))
        assert torch.equal(batch.samples, torch.cat([b.samples for b in ranks]))
        assert torch.equal(batch.masks.context.index, torch.cat([b.masks.context.index for b in ranks]))


@pytest.mark.parametrize("start", [1, 2, 3, 10])
def test_starting_at_any_step(dataset, start):
    whole, rest = take(loader(dataset), start + 3)[start:], take(loader(dataset, num_workers=1), 3, start)
    for (step, a), (again, b) in zip(whole, rest, strict=True):
        assert step == again
        assert_same(a, b)


def test_a_pickled_dataset_gives_the_same_batches(dataset):
    a_loader = loader(dataset)
    sent = pickle.loads(pickle.dumps(a_loader._batches))
    for request, (_, batch) in zip(a_loader.requests(4), take(a_loader, 2, start=4), strict=False):
        assert_same(sent[pickle.loads(pickle.dumps(request))], batch)


def test_an_epoch_uses_each_sample_at_most_once(dataset):
    a_loader = loader(dataset)
    assert a_loader.steps_per_epoch == 3
    batches = take(a_loader, 6)
    epochs = [torch.cat([b.samples for _, b in batches[k : k + 3]]).tolist() for k in (0, 3)]
    for samples in epochs:
        assert len(set(samples)) == 18
    assert epochs[0] != epochs[1]


def test_the_masker_is_given_the_step_of_the_run(dataset):
    for step, batch in take(loader(dataset, masker=Steps(), num_workers=2), 5, start=2):
        assert batch.masks.context.index[0] == step


def test_without_a_masker(dataset):
    assert take(loader(dataset, masker=None), 1)[0][1].masks is None


def test_global_random_states_do_not_change(dataset):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(loader(dataset, num_workers=1), 2)
    list(eval_batches(dataset, ImageOptions(image_size=(8, 8))))
    assert torch.equal(torch.rand(3), expected)


def test_batches_can_be_moved(dataset):
    _, batch = take(loader(dataset), 1)[0]
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.samples.device.type, moved.masks.targets.index.device.type} == {"meta"}
    assert Batch((View(batch.images),), batch.samples).to("meta").masks is None


@pytest.mark.gpu
def test_batches_are_pinned_and_copied(dataset):
    (_, plain), (_, pinned) = take(loader(dataset), 1)[0], take(loader(dataset, pin_memory=True, num_workers=1), 1)[0]
    assert pinned.images.is_pinned()
    assert pinned.masks.context.index.is_pinned()
    assert_same(plain, pinned.to("cuda", non_blocking=True).to("cpu"))
    assert Batch((View(plain.images),), plain.samples).pin_memory().images.is_pinned()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_each_sample_once_in_order(dataset, num_workers):
    options = ImageOptions(image_size=(10, 14), batch_size=9, num_workers=num_workers)
    batches = list(eval_batches(dataset, options, share=0.9))
    assert [len(b) for b in batches] == [9, 9, 5]
    assert torch.cat([b.samples for b in batches]).tolist() == list(range(23))
    images = torch.cat([b.images for b in batches])
    pipeline = eval_pipeline(image_size=(10, 14), share=0.9)
    for i in range(23):
        expected = pipeline(dataset.image_bytes(i), np.empty(0))
        np.testing.assert_array_equal(images[i].permute(1, 2, 0), expected)
    assert batches[0].masks is None


def test_evaluation_of_chosen_samples(dataset):
    chosen = np.array([20, 3, 3, 7])
    batches = list(eval_batches(dataset, ImageOptions(image_size=(8, 8), batch_size=3), samples=chosen))
    assert [b.samples.tolist() for b in batches] == [[20, 3, 3], [7]]
    assert torch.equal(batches[0].images[1], batches[0].images[2])


@dataclass
class Deadly(Halves):
    """A pipeline that kills its own process, as the kernel does when memory runs out."""

    def __call__(self, samples, *, seed, epoch, step=0):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(samples, seed=seed, epoch=epoch, step=step)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_dies_is_an_error_not_a_hang(dataset, num_workers):
    with pytest.raises(
        RuntimeError, match=r"a loader worker died \(.*\). Often memory is exhausted: try fewer num_workers"
    ):
        take(loader(dataset, masker=Deadly(), num_workers=num_workers), 6)


def test_workers_ignore_signals_of_their_process_group(dataset, monkeypatch):
    """Also repeated signals: the main process may need any time for its step and its checkpoint; and at their start."""

    def start(worker, plain=workers._start):
        while worker and not signal.sigpending():  # the second one starts late
            time.sleep(0.01)
        plain(worker)

    monkeypatch.setattr(workers, "_start", start)
    batches = loader(dataset, num_workers=2).batches()
    found = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) * 2:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    found += islice(batches, 7)
    for (_, a), (_, b) in zip(found, take(loader(dataset), 8), strict=True):
        assert_same(a, b)


@pytest.mark.integration
def test_workers_do_not_delay_the_exit_after_an_error(dataset):
    """multiprocessing sends SIGTERM to daemons at exit and waits for them; the traceback keeps the loader alive."""
    script = (
        "import sys\nfrom jepa_kit.data.loader import TrainLoader\n"
        "from jepa_kit.data.shards.dataset import ShardDataset\n"
        "from jepa_kit.data.transforms import train_pipeline\n"
        "from jepa_kit.data.views import ViewMaker\n"
        "pipeline = train_pipeline(image_size=(12, 16))\n"
        "dataset = ShardDataset(sys.argv[1])\n"
        "loader = TrainLoader(dataset=dataset, views=[ViewMaker(pipeline=pipeline)], batch_size=6, num_workers=2)\n"
        "batches = loader.batches()\n"
        "next(batches)\n"
        "sys.last = batches\n"
        "raise KeyError('of its own')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(dataset.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "KeyError: 'of its own'" in done.stderr


@dataclass
class Faulty(Halves):
    def __call__(self, samples, *, seed, epoch, step=0):
        raise RuntimeError("of its own")


def test_other_errors_of_a_worker_keep_their_message(dataset):
    with pytest.raises(RuntimeError, match="of its own") as caught:
        take(loader(dataset, masker=Faulty(), num_workers=1), 1)
    assert "worker died" not in str(caught.value)


@dataclass
class Unsendable(Halves):
    """Masks that cannot be pickled: the thread that sends a batch fails, not the worker that made it."""

    def __call__(self, samples, *, seed, epoch, step=0):
        masks = super().__call__(samples, seed=seed, epoch=epoch, step=step)
        object.__setattr__(masks, "lock", threading.Lock())
        return masks


def test_a_batch_that_cannot_be_sent_is_an_error_not_a_hang(dataset):
    with pytest.raises(TypeError, match=r"Caught TypeError in a loader worker, while sending a batch(.|\n)*cannot"):
        take(loader(dataset, masker=Unsendable(), num_workers=1), 2)
    assert not multiprocessing.active_children()


def test_the_error_of_full_shared_memory_has_advice(dataset, monkeypatch):
    """The text is torch's own, of a /dev/shm of 4 MB that was full."""

    def full(size):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_785_2461214746_0>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    message = r"/dev/shm \(\d+ MB\) is full: .*--shm-size=8g.*fewer data.num_workers than 1; 0 needs none"
    with pytest.raises(RuntimeError, match=message):
        take(loader(dataset, num_workers=1), 1)
    assert not multiprocessing.active_children()


def test_too_many_open_files_are_distinguished_from_full_memory():
    """The text is torch's own, of `ulimit -n 32` and two workers."""
    error = RuntimeError(
        "unable to open shared memory object </torch_7_1_0> in read-write mode: Too many open files (24)"
    )
    assert workers._advice(error, 2).startswith("too many files are open: ")


FEW_FILES = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from jepa_kit.data.loader import TrainLoader
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.transforms import eval_pipeline
from jepa_kit.data.views import ViewMaker
loader = TrainLoader(
    dataset=ShardDataset({folder!r}), views=[ViewMaker(pipeline=eval_pipeline(image_size=(8, 8)))], batch_size=2,
    num_workers=2,
)
for step, batch in loader.batches():
    time.sleep(0.05)  # so that workers run ahead
    if step == 20:
        break
print("done", resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= {soft})
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="counts files as Linux does")
@pytest.mark.parametrize("hard", [26, 4096])
def test_few_open_files(folder, hard):
    """`ulimit -n 26` and two workers: an error with advice, or more files if the hard limit allows; never a hang."""
    script = FEW_FILES.format(soft=26, hard=hard, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    if hard > 26:
        assert (done.returncode, done.stdout) == (0, "done True\n"), done.stderr
    else:
        assert done.returncode == 1
        assert "ulimit -n" in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].startswith("RuntimeError: ")
        assert "Exception ignored" not in done.stderr


def test_images_of_any_size_and_mode(tmp_path):
    images = [
        picture(0, 5, 90),
        picture(1, 90, 5),
        picture(2).convert("L"),
        picture(3).convert("RGBA"),
        picture(4, 1, 1),
    ]
    samples = [Sample(str(k), "png", encoded(image, "PNG")) for k, image in enumerate(images)]
    samples.append(Sample("cmyk", "jpg", encoded(Image.new("CMYK", (9, 9)), "JPEG")))
    dataset = ShardDataset(write_shards(tmp_path / "s", samples, 6, {}))
    assert take(loader(dataset), 1)[0][1].images.shape == (6, 3, 12, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(=0\) must be at least 1"),
        ({"batch_size": 24}, r"batch_size \(=24\) must be at most the data set's 23 samples"),
        ({"world_size": 4}, r"batch_size \(=6\) must be divisible by the number of ranks \(=4\)"),
        ({"world_size": 2, "rank": 2}, r"rank \(=2\) must be 0 to 1: there are 2 ranks"),
        ({"shuffle_window": 0}, r"shuffle_window \(=0\) must be at least 1"),
        ({"num_workers": -1}, r"num_workers \(=-1\) must be at least 0"),
    ],
)
def test_options_outside_their_range(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        loader(dataset, **options)


def test_a_negative_step(dataset):
    with pytest.raises(ValueError, match=r"start_step \(=-1\) must be at least 0"):
        loader(dataset).batches(-1)


def test_an_evaluation_share_out_of_range(dataset):
    with pytest.raises(ValueError, match=r"share \(=2.0\) must be above 0 and at most 1"):
        eval_batches(dataset, ImageOptions(image_size=(8, 8)), share=2.0)
