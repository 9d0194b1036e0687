"""Write and read the state of a run shard by shard, with torch.distributed.checkpoint (DCP).

Every process writes its part to ``__<rank>_<n>.distcp`` files; ``.metadata`` is written last. Any number of processes
can read the folder, whatever number wrote it; ``read_full`` returns the same as ``state_dict.full_state``.

DCP's reader unpickles ``.metadata`` and whatever is no tensor, which could run code. ``_Reader`` reads nothing but
tensors and the dataclasses that describe them. DCP writes to local and shared file systems.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata

from jepa_kit.engine.checkpoint.state_dict import ModelState, OptimizerState, parameters_of, set_optimizer_state
from jepa_kit.errors import PICKLE_ERRORS, CheckpointError, first_line
from jepa_kit.frozen import EXTRA_STATE, FrozenNetwork

METADATA = ".metadata"
"""Describes the tensors in the other files; a folder without it was not written to its end."""


def save_sharded(folder: Path, model: ModelState, optimizer_state: OptimizerState, group: Any = None) -> None:
    """Write the state to a folder, each process its part; a tensor that all have is written once, by one of them.

    All ranks must call it, with a folder that all can access. Files are flushed to the disk, ``.metadata`` after all
    others. To survive a crash, give a temporary folder, and rename it on rank 0 afterwards.

    Args:
        folder: is created if it is missing.
        model, optimizer_state: from ``state_dict.state_of``, or copies.
        group: of processes, None for the default one; a thread beside the steps needs a group of its own.

    Raises:
        OSError: a process could not write; raised on every rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, writer = _flat(model, optimizer_state), dcp.FileSystemWriter(folder)
    with _named_errors(folder):
        dcp.save(state, storage_writer=writer, process_group=group)


def load_sharded(folder: Path, jepa: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load a folder of ``save_sharded`` into a model and its optimiser, sharded in any way or not at all.

    All ranks must call it; each reads its own parts. Names and shapes must fit: check ``layout`` before.

    Raises:
        CheckpointError: the folder is damaged, or not of jepa_kit, or a frozen network is another. The model may be
            half loaded then.
        OSError: a file cannot be read.
    """
    model = dict(jepa.state_dict())  # shares memory with the parameters, and has copies of digests
    state: OptimizerState = {}
    if optimizer is not None:
        parameters = parameters_of(optimizer)
        for name, moments in layout(folder)[1].items():
            like = parameters[name]
            on_host = {key: torch.zeros_like(x, device="cpu") for key, x in moments.items() if x.shape != like.shape}
            state[name] = {key: on_host[key] if key in on_host else torch.zeros_like(like) for key in moments}
    with _named_errors(folder):
        dcp.load(_flat(model, state), storage_reader=_Reader(folder))
    for name, module in jepa.named_modules():
        if isinstance(module, FrozenNetwork):
            module.set_extra_state(model[f"{name}.{EXTRA_STATE}"])
    if optimizer is not None:
        set_optimizer_state(optimizer, state)


def layout(folder: Path) -> tuple[ModelState, OptimizerState]:
    """Return (model, optimizer) of a folder as tensors on ``meta``: names, shapes and types, from ``.metadata`` alone.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or describes more than tensors.
        OSError: it cannot be read.
    """
    entries: dict[str, Any] = dict(_Reader(folder).read_metadata().state_dict_metadata)
    tensors = {key: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for key, e in entries.items()}
    return _nested(tensors, folder)


def read_full(folder: Path) -> tuple[ModelState, OptimizerState]:
    """Return (model, optimizer) of a folder as whole tensors on the host; needs no other process.

    Raises:
        CheckpointError: the folder is damaged, or not of jepa_kit.
        OSError: a file cannot be read.
    """
    model, optimizer_state = layout(folder)
    tensors = {key: torch.empty_like(value, device="cpu") for key, value in _flat(model, optimizer_state).items()}
    with _named_errors(folder):
        dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    return _nested(tensors, folder)


# --- names ---


def _flat(model: ModelState, optimizer_state: OptimizerState) -> dict[str, Tensor]:
    """Return one mapping, with keys ``model/NAME`` and ``optimizer/NAME/KEY``."""
    flat = {f"model/{name}": value for name, value in model.items()}
    for name, state in optimizer_state.items():
        flat.update({f"optimizer/{name}/{key}": value for key, value in state.items()})
    return flat


def _nested(flat: Mapping[str, Tensor], folder: Path) -> tuple[ModelState, OptimizerState]:
    model: ModelState = {}
    optimizer_state: OptimizerState = {}
    for path, value in flat.items():
        match path.split("/"):
            case ["model", name]:
                model[name] = value
            case ["optimizer", name, key]:
                optimizer_state.setdefault(name, {})[key] = value
            case _:
                raise CheckpointError(f"{folder} contains {path!r}, which is not part of a run of jepa_kit")
    return model, optimizer_state


# --- files ---

_PLAIN = {
    filesystem.__name__: ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    metadata.__name__: (
        *("_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata"),
    ),
}
"""Classes that ``.metadata`` may contain. Not ``BytesStorageMetadata``: DCP unpickles the bytes that it describes."""


class _Unpickler(pickle.Unpickler):
    """Unpickles dataclasses of DCP, sizes and types, and refuses every other class."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # the folder that was written to
            return PurePosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads only tensors, and runs no code from the files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path) / METADATA
        if not path.exists():
            raise CheckpointError(
                f"{path.parent} is not a sharded checkpoint, or was not written to its end: no {METADATA}"
            )
        try:
            with path.open("rb") as file:
                held = _Unpickler(file).load()
        except PICKLE_ERRORS as error:
            raise CheckpointError(f"{path} is damaged, or contains more than metadata of tensors: {error}") from error
        if not isinstance(held, metadata.Metadata):
            raise CheckpointError(f"{path} contains a {type(held).__name__}, not metadata of tensors")
        held.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return held


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turn DCP's exception (a BaseException with the tracebacks of all ranks) into one that names the folder."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        text = "; ".join(f"rank {rank}: {first_line(cause)}" for rank, cause in causes.items())
        kind = OSError if any(isinstance(cause, OSError) for cause in causes.values()) else CheckpointError
        raise kind(f"{folder}: {text}") from error
