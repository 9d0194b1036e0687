"""Batches on their way to the device: bytes over the bus, copied beside the computation.

Images stay uint8 until they are there (a quarter of float32), and are normalised there
(``jepa_kit.data.transforms.normalize``). Where the device is a CUDA one, batches come out of page-locked memory
(``TrainLoader(pin_memory=True)``) and are copied on a stream of their own, while a step computes on the current one.

    for step, batch in to_device(loader.batches(start), device, prefetch=2):
        images = normalize(batch.images, mean, std)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Protocol

import torch

from jepa_kit.data.loader import Batch


def to_device(
    batches: Iterable[tuple[int, Batch]], device: torch.device | str, *, prefetch: int = 2
) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) with the batch on the device, in the order in which they come.

    On a CPU each batch is passed on as it is, when it is asked for.

    Args:
        batches: on the host; pinned, where copies shall run beside the computation.
        device: where they go.
        prefetch: batches that are being copied, or lie ready on a CUDA device, while the one before them is used. With
            0 each is copied when it is asked for; with 1 or more, the copy of a batch never holds up its own step.

    Raises:
        ValueError: a negative ``prefetch``; what ``batches`` raises.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch (={prefetch}) must be at least 0")
    device = torch.device(device)
    if device.type == "cuda":
        return in_flight(batches, SideStream(device), prefetch)
    return in_flight(batches, Plain(device), 0)


class Lane(Protocol):
    """A way to the device."""

    def send(self, batch: Batch) -> Batch:
        """Starts the copy; the result must not be read before ``receive``."""

    def receive(self, batch: Batch) -> None:
        """What is computed from now on may read a batch that was sent: the oldest that was not received yet."""


class Plain:
    """Copies, and waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, batch: Batch) -> Batch:
        return batch.to(self.device)

    def receive(self, batch: Batch) -> None:
        pass


class SideStream:
    """Copies on a CUDA stream of its own; the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.sent: deque[torch.cuda.Event] = deque()

    def send(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device, non_blocking=True)
            self.sent.append(self.stream.record_event())
        return moved

    def receive(self, batch: Batch) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.sent.popleft())
        # The memory belongs to the side stream. Without this, a later copy could be put where a step still reads.
        for tensor in tensors_of(batch):
            tensor.record_stream(current)


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Every tensor of a batch that moves with it."""
    found = [batch.images, batch.samples]
    if batch.masks is not None:
        batch.masks.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def in_flight(
    batches: Iterable[tuple[int, Batch]], lane: Lane, prefetch: int
) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) over a lane, with up to ``prefetch`` batches sent before the one that is given out."""
    waiting: deque[tuple[int, Batch]] = deque()
    for step, batch in batches:
        waiting.append((step, lane.send(batch)))
        if len(waiting) > prefetch:
            lane.receive(waiting[0][1])
            yield waiting.popleft()
    while waiting:
        lane.receive(waiting[0][1])
        yield waiting.popleft()
