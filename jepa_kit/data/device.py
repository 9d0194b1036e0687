"""Copy batches to the device, on CUDA concurrently with the computation.

Images are copied as uint8 (a quarter of float32's bytes) and normalised on the device
(``jepa_kit.data.transforms.normalize``). On CUDA, batches come from page-locked memory
(``TrainLoader(pin_memory=True)``) and are copied on a separate stream while a step computes.

    for step, batch in to_device(loader.batches(start), device, prefetch=2):
        images = normalize(batch.images, mean, std)  # of the first view
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable

import torch

from jepa_kit.data.batch import Batch


def to_device(
    batches: Iterable[tuple[int, Batch]], device: torch.device | str, *, prefetch: int = 2
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (step, batch) with the batch on the device, in their order; on a CPU, batches pass through unchanged.

    Args:
        batches: batches on the host, in pinned memory for concurrent copies.
        device: a CPU or a CUDA device.
        prefetch: number of batches copied ahead on CUDA. With 0 a batch is copied when it is needed; with 1 or more,
            no step waits for the copy of its own batch.

    Raises:
        ValueError: ``prefetch`` is negative; or as ``batches`` raises.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch (={prefetch}) must be at least 0")
    device = torch.device(device)
    if device.type == "cpu":
        return (pair for pair in batches)
    return in_flight(batches, SideStream(device), prefetch)


class SideStream:
    """Copy batches on a separate CUDA stream, without blocking the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.sent: deque[torch.cuda.Event] = deque()

    def send(self, batch: Batch) -> Batch:
        """Start a copy; the result must not be read before ``receive``."""
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device, non_blocking=True)
            self.sent.append(self.stream.record_event())
        return moved

    def receive(self, batch: Batch) -> None:
        """Let later computations read the oldest batch that was sent and not received yet."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.sent.popleft())
        # The side stream owns the memory: without this, the allocator could reuse it for a later copy during the step.
        for tensor in tensors_of(batch):
            tensor.record_stream(current)


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Return all tensors of a batch that are copied with it."""
    found: list[torch.Tensor] = []
    batch.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def in_flight(
    batches: Iterable[tuple[int, Batch]], stream: SideStream, prefetch: int
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (step, batch), sending up to ``prefetch`` batches ahead."""
    waiting: deque[tuple[int, Batch]] = deque()
    for step, batch in batches:
        waiting.append((step, stream.send(batch)))
        if len(waiting) > prefetch:
            stream.receive(waiting[0][1])
            yield waiting.popleft()
    while waiting:
        stream.receive(waiting[0][1])
        yield waiting.popleft()
