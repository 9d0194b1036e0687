"""Set and restore the random states of torch (host and GPU), numpy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(torch_seed: int, other_seed: int | None = None) -> Iterator[None]:
    """Run the body with these random states and restore the earlier ones afterwards.

    Args:
        torch_seed: of torch, on the host and on the current GPU; a run sets it at each step.
        other_seed: of numpy's and Python's global states, which no run sets; None for ``torch_seed``.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002 (parts may use this state)
    other_seed = torch_seed if other_seed is None else other_seed
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(torch_seed)
        np.random.seed(other_seed)  # noqa: NPY002
        random.seed(other_seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)
