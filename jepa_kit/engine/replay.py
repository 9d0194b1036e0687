"""Replay a step that was not finite, to find the first value that is not.

A dump (nonfinite/policy.py) has the batch of one rank. The weights come from the last checkpoint before the step, or
from the start of the run; the steps since then are functions of the config and are run again. With one process that
gives the weights of the step bit for bit, with several within rounding.
"""

from __future__ import annotations

import itertools
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kit.config import Config, config_from_dict
from jepa_kit.config.imports import check_trusted
from jepa_kit.distributed.collectives import World
from jepa_kit.engine.build import build_run
from jepa_kit.engine.checkpoint.format import load_checkpoint, restore
from jepa_kit.engine.checkpoint.manager import store_in
from jepa_kit.engine.checkpoint.resume import check_resumable
from jepa_kit.engine.nonfinite.policy import DUMP_FORMAT, left_out, read_record
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.run import ForeignWeights
from jepa_kit.engine.start import resume_run
from jepa_kit.engine.step import normalized, seed_torch, train_on
from jepa_kit.errors import reason_of
from jepa_kit.from_config import build_recipe
from jepa_kit.precision import autocast_of, deterministic, products_in
from jepa_kit.recipe import Recipe
from jepa_kit.run_folder import RUN_CONFIG, step_of
from jepa_kit.structures import MaskBatch, Progress, View


@dataclass(frozen=True)
class Finding:
    """A tensor with values that are not finite.

    Args:
        phase: ``images``, ``weights``, ``forward``, ``loss`` or ``backward``.
        where: name of the module, weight or term; the class of the module in brackets.
        bad, total: number of values that are not finite, and of all.
        first: the first of them, as text.
    """

    phase: str
    where: str
    bad: int
    total: int
    first: str

    def __str__(self) -> str:
        """Return a message."""
        values = f"{self.bad} of {self.total} values are not finite, the first is {self.first}"
        return f"{self.phase}: {self.where}: {values}"


DUMPED = ("step", "bad", "numbers", "views", "progress", "rank", "world_size", "keys", "config", "data")
"""Keys that the replay of a dump needs."""


def read_dump(path: Path, *, trust_imports: bool = False) -> dict[str, Any]:
    """Return the content of a dump (``nonfinite.policy.write_dump``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a dump.
        ConfigError: its config imports files that do not ship with jepa_kit, and ``trust_imports`` is not set.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; bad_step_<step>/rank_<rank>.pt in a run folder is one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not the dump of a bad step, or is cut short")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} is not the dump of a bad step: {reason_of(error)}") from error
    if not isinstance(content, dict) or content.get("format") != DUMP_FORMAT:
        raise ValueError(f"{path} is not the dump of a bad step: its format is not {DUMP_FORMAT!r}")
    if missing := [name for name in DUMPED if name not in content]:
        raise ValueError(f"{path} is not the dump of a bad step: it has no {', '.join(missing)}")
    if not trust_imports:
        check_trusted(content["config"].get("imports", []), str(path))
    return content


def views_of(dump: dict[str, Any]) -> list[View]:
    """Return the views of a dump."""
    return [
        View(view["images"], None if view["masks"] is None else MaskBatch.from_dict(view["masks"]), view["action"])
        for view in dump["views"]
    ]


def config_of(dump: dict[str, Any]) -> Config:
    """Return the config of a dump's run for one process, which accumulates what the ranks did in parallel."""
    config = config_from_dict(dump["config"])
    parts = config.train.accumulate * dump["world_size"]
    return replace(config, train=replace(config.train, parallel="auto", accumulate=parts))


@contextmanager
def as_in_run(dump: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Compute with the kernels and the products of the dump's run; must begin before the first use of cuBLAS.

    Raises:
        ValueError: the run's precision is tf32, and ``device`` is a CUDA device without it.
    """
    train = dump["config"]["train"]
    precision = "float32" if device.type == "cpu" else train["precision"]  # a CPU does not round factors to tf32
    with deterministic(train.get("deterministic", False)), products_in(precision, device):
        yield


def weights_before(
    dump: dict[str, Any],
    folder: Path,
    device: torch.device,
    *,
    again: bool,
    say: Callable[[str], None],
    foreign: ForeignWeights,
    start_file: str | None = None,
) -> Recipe:
    """Return the model as it was before the step, in training mode.

    Args:
        dump: of the step.
        folder: of the run, with its checkpoints.
        device: of the model.
        again: run the steps since the last checkpoint again; otherwise the weights are those of the checkpoint.
        say: prints a message.
        foreign: reads the file that the run began from.
        start_file: replaces the file that the run began from; read if no checkpoint from before the step is left.

    Raises:
        CheckpointError: a checkpoint is damaged or of another run.
        FileNotFoundError: there is no run in the folder, or the file that it began from is missing.
        ValueError: the steps cannot be run again without data; or the dump does not name the file that the run began
            from.
    """
    if not (folder / RUN_CONFIG).exists():
        raise FileNotFoundError(f"there is no run in {folder} (no {RUN_CONFIG}): name the run's folder with --run")
    step = int(dump["step"])
    store = store_in(folder)
    latest = next((c for c in reversed(store.checkpoints()) if c.step <= step), None)
    if latest is not None and start_file is not None:
        raise ValueError(f"--start (={start_file!r}) does nothing: {latest} is left from before step {step}")
    config = config_of(dump)
    again = again and (latest is None or latest.step != step)
    if again:
        run = build_run(config, World(), device)
        jepa, optimizer, steps_per_epoch = run.jepa, run.optimizer, run.steps_per_epoch
    else:
        torch.manual_seed(config.train.seed)
        jepa = build_recipe(config).to(device).train()
        optimizer = optimizer_of(jepa, config.optim)
        steps_per_epoch = config.train.steps_per_epoch or dump["data"]["samples"] // config.train.batch_size
    if latest is None:
        first, source = _begin(dump, jepa, optimizer, steps_per_epoch, foreign, start_file)
    elif again:
        first, source = resume_run(run, store, latest).step, f"{folder.name}/{latest.name}"
    else:
        checkpoint = load_checkpoint(store.fetch(latest))
        check_resumable(checkpoint, config.to_dict(), dump["data"])
        restore(checkpoint, jepa)
        store.clear_cache()
        first, source = checkpoint.step, f"{folder.name}/{latest.name}"
    if not again:
        say(f"weights: {source}" + (f", {step - first} steps before the bad one" if first < step else ""))
        return jepa
    ranks = dump["world_size"]
    rounding = f" (by one process, within rounding of the {ranks})" if ranks > 1 else ""
    say(f"weights: {source}, and {step - first} steps done again{rounding}")
    without = left_out(read_record(folder))
    for number, batch in itertools.islice(run.loader.batches(first), step - first):
        if number in without:
            jepa.update_target(run.schedule(number).momentum)
        else:
            train_on(run, number, batch.to(device))
    return jepa


def _begin(
    dump: dict[str, Any],
    jepa: Recipe,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    foreign: ForeignWeights,
    start_file: str | None,
) -> tuple[int, str]:
    """Load the weights that the run began with, as ``start_from`` did, and return (their step, their source)."""
    step, source = int(dump["step"]), dump.get("origin", {}).get("source")
    init, released = dump["config"]["train"]["init_from"], dump.get("resume_from")
    if released is not None and step_of(Path(released)) is not None:
        released = None  # a checkpoint of the run itself, which is deleted
    if released is None and init is not None:
        foreign.init_from(jepa, start_file or init)
        return 0, f"those of {start_file or init}"
    if released is None and source is None:
        if start_file is not None:
            raise ValueError(f"--start (={start_file!r}) does nothing: the run began with weights from its seed")
        return 0, "the first weights, from the seed"
    released = start_file or released
    if released is None:
        raise ValueError(
            f"the run began with the weights of {source}, no checkpoint of it is left from before step {step}, and the "
            "dump does not name that file: name it with --start"
        )
    first = foreign.resume_official(jepa, optimizer, released, steps_per_epoch).step
    if first > step:
        raise ValueError(f"{released} is at step {first}, after the bad one ({step}): the run did not begin from it")
    return first, f"those of {released}"


def replay(dump: dict[str, Any], jepa: Recipe, device: torch.device) -> list[Finding]:
    """Run the batch forward and, if the loss is finite, backward.

    Returns:
        the first tensor in each phase that is not finite, in the order in which they arise.
    """
    config = config_from_dict(dump["config"])
    views = normalized([view.to(device) for view in views_of(dump)], config)
    found: list[Finding] = []
    for k, view in enumerate(views):
        look(found, "images", "after normalisation" + (f", view {k}" if k else ""), view.images)
    for name, value in jepa.state_dict().items():
        look(found, "weights", name, value)
    seed_torch(config.train.seed, int(dump["step"]), int(dump["rank"]))
    handles = [
        module.register_forward_hook(partial(_look_at_output, found, f"{name or 'jepa'} [{type(module).__name__}]"))
        for name, module in jepa.named_modules()
    ]
    try:
        with autocast_of(config.train.precision, device)():
            out = jepa(*views, progress=Progress(**dump["progress"]))
    finally:
        for handle in handles:
            handle.remove()
    for name, value in [*out.terms.items(), ("sum of all terms", out.loss)]:
        look(found, "loss", name, value)
    if torch.isfinite(out.loss):
        for name, parameter in jepa.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(look, found, "backward", f"gradient of {name}"))
        out.loss.backward()
    return found


def _look_at_output(found: list[Finding], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    """Look at the output of a module, and at its gradient once it is computed."""
    for tensor in tensors(output):
        look(found, "forward", f"output of {name}", tensor)
        if tensor.requires_grad:
            tensor.register_hook(partial(look, found, "backward", f"gradient of the output of {name}"))


def tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output: a tensor, or tensors in tuples, lists or dataclasses."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if is_dataclass(value):
        value = tuple(vars(value).values())
    return [tensor for inner in value for tensor in tensors(inner)] if isinstance(value, tuple | list) else []


def look(found: list[Finding], phase: str, name: str, value: Tensor) -> None:
    """Append a finding if a tensor is not finite, and the first one in its phase."""
    if any(finding.phase == phase for finding in found):
        return
    finite = torch.isfinite(value.detach())
    if not finite.all():
        first = value.detach()[~finite].flatten()[0].item()
        found.append(Finding(phase, name, int((~finite).sum()), value.numel(), str(first)))
