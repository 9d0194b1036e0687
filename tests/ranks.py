"""What torchrun does for a script, without the seconds in which it and each rank import torch and jepa_kit.

The ranks fork from one process that has imported both, and has not computed anything yet.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = [
    "pytest",
    "jepa_kit.training",
    "jepa_kit.evaluation.online",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
]
"""What a run imports, some of it only when it is needed; a module that is not installed is left out."""


@contextmanager
def free_port() -> Iterator[str]:
    """A port that no other process is given meanwhile: it is bound, and a store may listen at it all the same."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield str(bound.getsockname()[1])


def bare_runs(patch: pytest.MonkeyPatch) -> None:
    """Let runs neither draw ``curves.png`` nor estimate the time of a step: a tiny run takes a third of the time."""
    patch.setattr("jepa_kit.engine.train.plot_curves", lambda *_: None)
    patch.setattr("jepa_kit.engine.train.estimate_step", lambda run: None)


def start_server(root: Path) -> None:
    """Start the process that the ranks fork from; ``root`` is the clone whose jepa_kit it imports."""
    SERVER.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()


def run_script(script: str, arguments: Sequence[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    """Run a script as the main program of this process, in a folder; what it prints is appended to ``log``."""
    os.chdir(folder)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    bare_runs(pytest.MonkeyPatch())
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_ranks(count: int, script: Path | str, arguments: Sequence[object], folder: Path, log: Path) -> str:
    """Run a script in one process, or in several as ranks; return what they printed, and fail if one of them does.

    Args:
        count: of processes; one has no variables of torchrun.
        script: its file.
        arguments: of its command line.
        folder: in which it runs.
        log: the file of what it prints.
    """
    with free_port() as port:
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        ranks = []
        for rank in range(count):
            own = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            given = (str(script), [str(argument) for argument in arguments], own, folder, log)
            ranks.append(SERVER.Process(target=run_script, args=given))
            ranks[-1].start()
        running = {rank.sentinel: rank for rank in ranks}
        while running:
            ended = wait(list(running), timeout=600)
            if not ended or any(running.pop(sentinel).exitcode for sentinel in ended):  # the others would wait for it
                for rank in running.values():
                    rank.kill()
                break
        for rank in ranks:
            rank.join()
    printed = log.read_text()
    assert not any(rank.exitcode for rank in ranks), printed
    return printed
