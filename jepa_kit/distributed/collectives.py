"""The processes of a run: who they are, the device of each, and collectives. All functions work with one process too.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process; slurm.py derives them from
Slurm's variables. If srun or mpirun started several processes and these variables are missing, so that each would train
alone, that is an error. (If two processes are started by hand into one run folder, lock.py refuses the second.)
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
from jepa_kit.distributed.gradients import GatherRows
from jepa_kit.distributed.rendezvous import start_store
from jepa_kit.distributed.slurm import torchrun_variables
from jepa_kit.errors import PeerError, StartError

T = TypeVar("T")

PROPAGATED = (ValueError, OSError, ArithmeticError, RuntimeError)
"""Errors that are sent to the other processes, which raise them as well."""

PATIENCE = timedelta(hours=6)
"""Timeout of host-side collectives, during which one process may index a remote data set for all.

The group of the gradients keeps torch's own limit (10 minutes with NCCL). A process that has ended keeps none waiting:
its connection is closed, and torchrun and srun end the others.
"""

_host_group: Any = None
"""The group of host-side collectives (gloo, also beside NCCL); None is torch's default group."""


# torch 2.13 renames the argument.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables with the number of processes that mpirun started: Open MPI's; that of MPICH and Intel."""

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Variables with the number of times that torchrun's agent, or Slurm, started the same command before."""


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
    """Return the world that torchrun or Slurm's srun has set up, or a world of one process.

    Under srun, torchrun's variables are added to ``environ``, where torch.distributed looks for them.

    Raises:
        ValueError: some of torchrun's variables are missing or not a number; or Slurm or mpirun started several
            processes without them, so that each would train alone.
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
        raise ValueError(f"the environment has some of torchrun's variables, but not {', '.join(missing)}")
    for name in TORCHRUN[:3]:
        if not environ[name].isdigit():
            raise ValueError(f"{name} (={environ[name]!r}) must be a whole number")
    return World(*(int(environ[name]) for name in TORCHRUN[:3]))


def choose_device(name: str, world: World) -> torch.device:
    """Return the device of this process.

    Args:
        name: ``auto`` (CUDA if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        world: local ranks take GPUs in turn.

    Raises:
        ValueError: an unknown device, CUDA without a CUDA device, or more processes than GPUs.
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
            f"GPU {index} is needed, but there are {torch.cuda.device_count()}: start fewer processes{hidden}"
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(
    world: World, device: torch.device, timeout: timedelta | None = None, patience: timedelta | None = None
) -> Iterator[None]:
    """Join the other processes (NCCL on CUDA, gloo on the CPU), and leave them at the end; one process does nothing.

    Args:
        timeout: for joining, None for torch's own.
        patience: timeout of collectives; None is ``timeout`` for tensors, and ``PATIENCE`` for host-side ones
            (``broadcast_from_rank0``, ``run_on_all_ranks``, ``all_gather_object``, ``barrier``). It may be far longer:
            if a process ends, torchrun and srun --kill-on-bad-exit end the others.

    Raises:
        StartError: the processes could not join; the message names the rank and the cause.
    """
    global _host_group
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
        _host_group = dist.new_group(backend="gloo", timeout=patience or PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise StartError(
            f"rank {world.rank} of {world.size} could not join the others over {backend} "
            f"at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
        ) from error
    try:
        yield
    finally:
        _host_group = None
        dist.destroy_process_group()


def joined() -> bool:
    """Return whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Return whether this process is the one that prints and writes: rank 0."""
    return not joined() or dist.get_rank() == 0


def rank_and_size() -> tuple[int, int]:
    """Return (rank, number of processes): (0, 1) for one process."""
    return (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)


def barrier() -> None:
    """Wait until every process has called this."""
    if joined():
        dist.barrier(group=_host_group)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, or DDP around it if there are several processes.

    DDP starts every process from rank 0's weights and averages gradients. Parameters without a gradient (the target
    encoder) are left out: each process updates its own copy by the same rule. Before each forward pass, buffers that
    training changes become rank 0's, which a checkpoint has (``broadcast_buffers``, instead of DDP's own option, which
    would also send constant tables).
    """
    if not joined():
        return model
    broadcast_buffers(model)
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return a new tensor, the mean of ``values`` over the processes."""
    values = values.detach().clone()
    if joined():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def logsumexp_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Return log(sum of exp(x) over the processes), elementwise, without a gradient; ``x`` itself on one process.

    Two all-reduces of the size of ``x``, the first of which finds a maximum, so that nothing overflows.
    """
    if not joined():
        return x
    most = x.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    total = (x.detach() - most).exp()
    dist.all_reduce(total)
    return most + total.log()


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Return the values of every process on the host, [n] -> [ranks, n]; all must call it."""
    if not joined():
        return values.cpu()[None]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).cpu()


def row_counts(count: int) -> list[int]:
    """Return the ``count`` of each rank, without waiting for the device; all must call it."""
    _, size = rank_and_size()
    if size == 1:
        return [count]
    counts = torch.zeros(size, dtype=torch.int64)
    dist.all_gather(list(counts.split(1)), torch.tensor([count]), group=_host_group)
    return counts.tolist()


def first_row(count: int) -> int:
    """Return how many rows the ranks before this one have, which has ``count``; all must call it."""
    return sum(row_counts(count)[: rank_and_size()[0]])


def gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, [B, ...] -> [sum of B, ...] in the order of the ranks; ``x`` on one process.

    Ranks may have unequally many rows; this rank's begin at ``first_row(B)``. In backward, a row's gradient
    comes back to the rank that it is from, summed over the losses of all ranks (gradients.py). All ranks must call it,
    in forward and in backward.
    """
    return GatherRows.apply(x, row_counts(len(x))) if joined() else x


def all_gather_object(value: T, group: Any = None) -> list[T]:
    """Return the values of all processes by rank; all must call it.

    Args:
        value: this process's; pickle sends it.
        group: of all processes, for the calls of another thread; None for that of host-side collectives.
    """
    if not joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group or _host_group)
    return values


def restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun or Slurm restarted the command, according to any process; all must call it."""
    return any(all_gather_object(any(environ.get(name, "0") != "0" for name in RESTARTS)))


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """Call ``decide`` on rank 0 and return its result on every rank; all must call it.

    Raises:
        ValueError, OSError, ArithmeticError, RuntimeError: raised on rank 0, and so on every rank.
        PeerError: on the other ranks, if rank 0 raised an error of another kind, or one that pickle cannot send.
    """
    if not joined():
        return decide()

    def broadcast(outcome: list[Any]) -> list[Any]:
        dist.broadcast_object_list(outcome, group=_host_group)
        return outcome

    if is_main():
        result, error = _outcome(decide, lambda failed: broadcast([None, failed]))
        broadcast([result, _sendable(error)])
    else:
        result, error = broadcast([None, None])
    if error is not None:
        raise error
    return result


def run_on_all_ranks(do: Callable[[], T], group: Any = None) -> T:
    """Call ``do`` on every rank and return this rank's result; if it raises on one rank, all raise.

    Args:
        do: called once.
        group: see ``all_gather_object``.

    Raises:
        ValueError, OSError, ArithmeticError, RuntimeError: that of the lowest rank that raised.
        PeerError: that rank raised an error of another kind, or one that pickle cannot send.
    """
    if not joined():
        return do()
    result, own = _outcome(do, lambda failed: all_gather_object(failed, group))
    errors = all_gather_object(_sendable(own), group)
    for rank, error in enumerate(errors):
        if error is not None:
            raise own if own is not None and rank == dist.get_rank() else error
    return result


def _outcome(do: Callable[[], T], send: Callable[[PeerError], Any]) -> tuple[Any, Exception | None]:
    """Return (result of ``do``, None) or (None, the error that all ranks are to raise).

    An error of another kind is raised here, after a PeerError has been sent to the others, which would wait otherwise.
    """
    try:
        return do(), None
    except PROPAGATED as error:
        return None, error
    except KeyboardInterrupt:  # a terminal sends it to all
        raise
    except BaseException as error:
        send(PeerError(f"rank {dist.get_rank()} failed ({type(error).__name__}); see its own message"))
        raise


def _sendable(error: Exception | None) -> Exception | None:
    """Return the error, or a PeerError with its message if pickle cannot send it."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError, ValueError):
        return PeerError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    return error
