"""Rendezvous of the processes of a run at its start."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

NOTICE = 3.0
"""Seconds after which a process that waits for others at the start prints a message."""


def start_store(rank: int, size: int, timeout: timedelta | None = None) -> dist.Store:
    """Return the store through which the processes of this start exchange addresses.

    If that takes more than ``NOTICE`` seconds, or MASTER_ADDR cannot be resolved, a message on stderr says which ranks
    this process waits for, at which address, and for how long.

    torchrun (torch 2.13) keeps one store over its restarts, with the entries of earlier processes. So each start has a
    key prefix of its own.
    """
    limit = timeout or default_pg_timeout
    host, at = os.environ.get("MASTER_ADDR"), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    whom = f"at {at} for the other ranks" if rank == 0 else f"for rank 0 at {at} and for the other ranks"
    line = f"rank {rank} of {size} is waiting {whom}, for up to {_minutes(limit)} (MASTER_ADDR, MASTER_PORT)"
    why = _unresolved(host)
    line = f"{line}; {why}" if why else line
    notice = threading.Timer(0.0 if why else NOTICE, lambda: print(line, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        return dist.PrefixStore(_name_of_start(store, rank, size, limit), store)
    finally:
        notice.cancel()


def _minutes(limit: timedelta) -> str:
    seconds = limit.total_seconds()
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} minutes"


def _unresolved(host: str | None) -> str | None:
    """Return why the host name cannot be resolved, or None if it can. (It may be later: torch keeps trying.)"""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"this machine knows no address of {host!r} ({error.strerror})"
    return None


def _name_of_start(store: dist.Store, rank: int, size: int, limit: timedelta) -> str:
    """Return rank 0's name of this start, on all ranks; the counts of restarts of torchrun's agents may differ.

    A rank announces itself with a random key, and rank 0 replies under that key; so neither takes an entry of an
    earlier start for the other's.

    Raises:
        RuntimeError: a rank did not come within the limit.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", own)
        name = store.get(f"start/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    missing, end = set(range(1, size)), time.monotonic() + limit.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"heard/{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"here/{other}"]):
                store.set(f"start/{store.get(f'here/{other}').decode()}", own)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {_minutes(limit)}")
        time.sleep(0.05)
    return own
