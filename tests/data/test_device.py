"""Copies of batches to the device: their order, the number that is sent ahead, and their completeness."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from jepa_kit.data.batch import Batch
from jepa_kit.data.device import in_flight, tensors_of, to_device
from jepa_kit.structures import MaskBatch, PatchSets, View


def batches(count, log=None, masks=True):
    """Yield batches whose images, samples and masks depend on their step."""
    for step in range(count):
        if log is not None:
            log.append(("read", step))
        images = torch.full((2, 3, 4, 4), step, dtype=torch.uint8)
        cells = PatchSets.from_padded(torch.full((2, 1), step % 16))
        drawn = MaskBatch(cells, cells, (4, 4), torch.arange(2)) if masks else None
        yield step, Batch((View(images, drawn),), torch.tensor([step, step + 1]))


class Logged:
    """A stream that logs its calls, and fails if a batch is received that is not the oldest one sent."""

    def __init__(self, log):
        self.log, self.sent = log, []

    def send(self, batch):
        self.log.append(("send", int(batch.samples[0])))
        self.sent.append(batch)
        return batch

    def receive(self, batch):
        assert self.sent.pop(0) is batch
        self.log.append(("receive", int(batch.samples[0])))


def test_batches_pass_through_unchanged_on_a_cpu():
    """Nothing is read before it is needed, and nothing is copied."""
    log = []
    given = to_device(batches(5, log), "cpu", prefetch=3)
    assert log == []
    step, batch = next(given)
    assert (step, log) == (0, [("read", 0)])
    assert batch.images.device.type == "cpu"
    same = list(batches(2))
    assert all(a is b for (_, a), (_, b) in zip(to_device(same, "cpu"), same, strict=True))
    assert [s for s, _ in given] == [1, 2, 3, 4]


@pytest.mark.parametrize("prefetch", [0, 1, 3, 10])
def test_every_batch_comes_once_and_in_order(prefetch):
    log = []
    for k, (step, batch) in enumerate(in_flight(batches(6), Logged(log), prefetch)):
        assert step == k == int(batch.samples[0])
        assert batch.masks.context.index.tolist() == [step, step]
        sent = sum(kind == "send" for kind, _ in log)
        assert sent == min(k + 1 + prefetch, 6)  # never more in flight
    assert log[-1] == ("receive", 5)


def test_a_batch_is_sent_while_the_previous_one_is_used():
    log = []
    given = in_flight(batches(4, log), Logged(log), 1)
    next(given)
    assert log == [("read", 0), ("send", 0), ("read", 1), ("send", 1), ("receive", 0)]
    log.clear()
    next(given)
    assert log == [("read", 2), ("send", 2), ("receive", 1)]


def test_errors_of_the_loader_propagate_and_its_iterator_is_closed():
    closed = []

    def failing():
        try:
            yield from batches(2)
            raise ValueError("no more")
        finally:
            closed.append(True)

    with pytest.raises(ValueError, match="no more"):
        list(to_device(failing(), "cpu"))
    closed.clear()
    given = to_device(failing(), "cpu")
    next(given)
    given.close()
    del given
    assert closed == [True]


def test_a_negative_prefetch():
    with pytest.raises(ValueError, match=r"prefetch \(=-1\) must be at least 0"):
        to_device(batches(1), "cpu", prefetch=-1)


def test_tensors_of_a_batch():
    """Every tensor that is moved is listed, lengths of sets included."""
    _, batch = next(batches(1))
    moved = batch.to("meta")
    assert {t.device.type for t in tensors_of(moved)} == {"meta"}
    masks = batch.masks
    for tensor in (batch.images, batch.samples, masks.context.index, masks.targets.image, masks.context_of):
        assert any(tensor is other for other in tensors_of(batch))
    for lengths in (masks.context.lengths, masks.sequences):
        assert any(lengths.offsets is other for other in tensors_of(batch))
    assert len(tensors_of(next(batches(1, masks=False))[1])) == 2
    batch = next(batches(1, masks=False))[1]
    assert len(tensors_of(replace(batch, views=(*batch.views, View(batch.images, action=torch.zeros(2, 5)))))) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_on_a_gpu_are_not_overwritten(prefetch):
    """Large batches are used while others are copied into freed memory; each keeps its own numbers."""
    side = 256

    def large():
        for step in range(30):
            images = torch.full((32, 3, side, side), step, dtype=torch.uint8)
            yield step, Batch((View(images),), torch.arange(32) + step).pin_memory()

    weights = torch.randn(2048, 2048, device="cuda")
    sums = []
    for step, batch in to_device(large(), "cuda", prefetch=prefetch):
        for _ in range(20):  # the device falls behind the host
            weights = weights @ weights / 2048**0.5
        sums.append((step, batch.images.sum(dtype=torch.int64), batch.samples.sum()))
        del batch
    for step, total, samples in sums:
        assert int(total) == step * 32 * 3 * side * side
        assert int(samples) == sum(range(32)) + 32 * step


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu():
    """The first batch is returned while the device still runs earlier work."""
    _, batch = next(batches(1))
    pinned = [(k, batch.pin_memory()) for k in range(4)]
    list(islice(to_device(pinned, "cuda"), 1))  # makes the context
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    busy.record()
    given = to_device(pinned, "cuda", prefetch=2)
    _, first = next(given)
    assert not busy.query()
    np.testing.assert_array_equal(first.images.cpu(), batch.images)
