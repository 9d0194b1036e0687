"""Any number of processes, started by torchrun or by Slurm's srun; one process without them.

torchrun tells each process who it is through the environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT); slurm.py says the same in Slurm's words. Nothing here guesses: a start by one of these, or by mpirun, that
would leave every process training alone is an error. (Of two that are started by hand into one run folder, lock.py lets
one in.)
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jepa_kit.distributed.buffers import broadcast_buffers
from jepa_kit.distributed.rendezvous import start_store
from jepa_kit.distributed.slurm import torchrun_variables
from jepa_kit.errors import PeerError, StartError

T = TypeVar("T")


SHARED = (ValueError, OSError, ArithmeticError, RuntimeError)
"""Errors that all processes raise, with the same words, where one of them raises them for all."""

PATIENCE = timedelta(hours=6)
"""Timeout of host-side collectives, during which one process may index a remote data set for all.

The group of the gradients keeps torch's own limit (10 minutes with NCCL). Nobody waits so long for a process that has
ended: its connection is closed, and torchrun and srun end the others.
"""

_words: Any = None
"""The group that words go over, between processes on the host: gloo, beside NCCL too. None is the first group."""


# torch 2.13 renames the argument.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes mpirun started: Open MPI's, MPICH's and Intel's."""

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""How often torchrun's agent, or Slurm, started the same command before."""


@dataclass(frozen=True)
class World:
    """Which process this is.

    Args:
        rank: 0 to size - 1 over all machines.
        local_rank: the same on this machine; chooses the GPU.
        size: processes over all machines.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"WORLD_SIZE (={self.size}) must be at least 1")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"RANK (={self.rank}) must be from 0 to {self.size - 1}, as WORLD_SIZE is {self.size}")

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0


def read_environment(environ: MutableMapping[str, str] = os.environ) -> World:
    """What torchrun or Slurm's srun set, or a world of one process where neither did.

    Under srun, torchrun's variables are put into ``environ``, where torch.distributed looks for them.

    Raises:
        ValueError: torchrun's variables in part, one that is not a number, or several tasks of Slurm or processes of
            mpirun of which this process knows nothing, so that it would train alone.
    """
    if "WORLD_SIZE" not in environ and "RANK" not in environ:
        environ.update(torchrun_variables(environ))
    missing = [name for name in TORCHRUN if name not in environ]
    if "WORLD_SIZE" not in environ and "RANK" not in environ:
        for name in MPI:
            if environ.get(name, "1") != "1":
                raise ValueError(
                    f"mpirun started {environ[name]} processes ({name}), and this one would train alone: start them by "
                    "torchrun or srun (docs/clusters.md)"
                )
        return World()
    if missing:
        raise ValueError(f"the environment holds a part of torchrun's variables, but not {', '.join(missing)}")
    numbers = {}
    for name in TORCHRUN[:3]:
        if not environ[name].isdigit():
            raise ValueError(f"{name} (={environ[name]!r}) must be a whole number")
        numbers[name] = int(environ[name])
    return World(numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"])


def choose_device(name: str, world: World) -> torch.device:
    """The device of this process.

    Args:
        name: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        world: local ranks take GPUs in turn.

    Raises:
        ValueError: an unknown device, CUDA where there is none, or more processes than GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise ValueError(f"device (={name!r}) must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device (={name!r}) needs CUDA, which torch {torch.__version__} does not see here")
    index = int(number) if number else world.local_rank
    if number and world.size > 1:
        raise ValueError(f"device (={name!r}) names one GPU for {world.size} processes; 'cuda' gives each its own")
    if index >= torch.cuda.device_count():
        hidden = " (Slurm: --gpus-per-node, not --gpus-per-task)" if "SLURM_PROCID" in os.environ else ""
        raise ValueError(
            f"GPU {index} was asked for, but there are {torch.cuda.device_count()}: start fewer processes{hidden}"
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(
    world: World, device: torch.device, timeout: timedelta | None = None, patience: timedelta | None = None
) -> Iterator[None]:
    """Joins the other processes, and leaves them at the end; does nothing for one process.

    NCCL on CUDA, gloo on the CPU.

    Args:
        timeout: for joining, None for torch's own.
        patience: timeout of collectives; None is ``timeout`` for tensors, and ``PATIENCE`` for host-side ones
            (``broadcast_from_rank0``, ``run_on_all_ranks``, ``all_gather_object``, ``barrier``). It may be far longer:
            if a process ends, torchrun and srun --kill-on-bad-exit end the others.

    Raises:
        StartError: they could not be joined; names the rank and the cause.
    """
    global _words
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=start_store(world.rank, world.size, timeout),
            rank=world.rank,
            world_size=world.size,
            timeout=patience or timeout,
            device_id=device if device.type == "cuda" else None,
        )
        _words = dist.new_group(backend="gloo", timeout=patience or PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise StartError(
            f"rank {world.rank} of {world.size} could not join the others over {backend} "
            f"at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
        ) from error
    try:
        yield
    finally:
        _words = None
        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process runs with others."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process prints and writes."""
    return not joined() or dist.get_rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if joined():
        dist.barrier(group=_words)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, or DDP around it where there are several processes.

    DDP starts every process from rank 0's weights and averages gradients. Parameters without a gradient (the target
    encoder) take no part in it: each process moves its own copy by the same rule. Buffers that training changes are
    rank 0's at each forward pass, as they are in a checkpoint; constant tables are not sent.
    """
    if not joined():
        return model
    broadcast_buffers(model)
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Means of a tensor over the processes; a new tensor."""
    values = values.detach().clone()
    if joined():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """[n] -> [ranks, n] on the host: the values of every process; all must call it."""
    if not joined():
        return values.cpu()[None]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).cpu()


def all_gather_object(value: T) -> list[T]:
    """What each process gives, by rank; all must call it."""
    if not joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_words)
    return values


def restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or Slurm started the same command before, as any process has it; all must call it."""
    return any(all_gather_object(any(environ.get(name, "0") != "0" for name in RESTARTS)))


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """What ``decide`` gives on rank 0, on every rank.

    Raises:
        ValueError, OSError, ArithmeticError, RuntimeError: what it raised on rank 0, on every rank.
        PeerError: on the other ranks, where rank 0 raised an error of another kind, or one that cannot be sent.
    """
    if not joined():
        return decide()

    def tell(words: list[Any]) -> list[Any]:
        dist.broadcast_object_list(words, group=_words)
        return words

    if is_main():
        result, error = _outcome(decide, lambda failed: tell([None, failed]))
        tell([result, _sendable(error)])
    else:
        result, error = tell([None, None])
    if error is not None:
        raise error
    return result


def run_on_all_ranks(do: Callable[[], T]) -> T:
    """What ``do`` gives on this rank; all ranks must call it, and all raise where it raised on one.

    Raises:
        ValueError, OSError, ArithmeticError, RuntimeError: the first rank's own.
        PeerError: where the first rank raised an error of another kind, or one that cannot be sent.
    """
    if not joined():
        return do()
    result, own = _outcome(do, all_gather_object)
    errors = all_gather_object(_sendable(own))
    for rank, error in enumerate(errors):
        if error is not None:
            raise own if own is not None and rank == dist.get_rank() else error
    return result


def _outcome(do: Callable[[], T], tell: Callable[[PeerError], Any]) -> tuple[Any, Exception | None]:
    """(what ``do`` gives, None), or (None, the error that all raise).

    An error of another kind is passed on here, and the others are told that there is one: they must not wait.
    """
    try:
        return do(), None
    except SHARED as error:
        return None, error
    except KeyboardInterrupt:  # a terminal sends it to all
        raise
    except BaseException as error:
        tell(PeerError(f"rank {dist.get_rank()} failed ({type(error).__name__}); its own message tells more"))
        raise


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or its words where it would not come through pickle as itself."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError, ValueError):
        return PeerError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    return error
