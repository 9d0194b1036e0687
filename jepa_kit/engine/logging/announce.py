"""Print and save what a run consists of, at its start: versions, data, and host, device and speed of each process."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jepa_kit.config import versions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import NAMES_AND_SIZES, brief
from jepa_kit.distributed.collectives import World, all_gather_object
from jepa_kit.encoders.attention import describe_backend
from jepa_kit.engine.checkpoint.manager import Store
from jepa_kit.engine.fit import notes_on_fit
from jepa_kit.engine.run import Run, Start
from jepa_kit.files import write_text
from jepa_kit.planning.peak_flops import matrix_peak
from jepa_kit.precision import precision_of
from jepa_kit.registry import located
from jepa_kit.run_folder import FACTS, RUN_CONFIG
from jepa_kit.structures import Precision


@dataclass(frozen=True)
class Place:
    """Host, device and speed of a process.

    Args:
        rank, local_rank: see ``World``.
        host: name of its machine.
        device: torch's name: cpu, cuda:3.
        model: name of the device.
        matrix_tflops: TFLOP/s of matrix products in the run's precision, measured on all processes at once.
    """

    rank: int
    local_rank: int
    host: str
    device: str
    model: str
    matrix_tflops: float


def announce(
    run: Run,
    store: Store,
    start: Start,
    places: Sequence[Place],
    resume: bool,
    resume_from: str | None,
) -> None:
    """Print versions, devices, data and sizes of a run, and write ``config.yaml`` and ``run.json``.

    Raises:
        ValueError: the folder of the run or of its checkpoints cannot be written to; or ``train.attention`` is not
            available on this machine.
    """
    folder = store.run
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    precision = precision_of(run.config)
    parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in run.jepa.named_children()}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with located("train"):
        attention = describe_backend(run.device, dtype, run.config.train.attention)
    networks = {name: part for name, part in run.jepa.named_children() if not name.startswith("target_")}
    compiled = [name for name, part in networks.items() if any(getattr(m, "compiled", False) for m in part.modules())]
    facts: dict[str, Any] = {
        "versions": versions(),
        "device": str(run.device.type),
        "gpu": gpu,
        "world_size": run.world.size,
        "topology": to_dict(places, precision),
        "attention": attention,
        "compiled": compiled,
        "data": brief(run.data_identity),
        "num_workers": run.loader.num_workers,
        "threads": torch.get_num_threads(),
        "parameters": {name: count for name, count in parameters.items() if count},
        "steps": run.schedule.steps,
        "steps_per_epoch": run.steps_per_epoch,
        "first_step": start.step,
        "resume_from": resume_from,
        "origin": start.origin,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = run.config.to_yaml()
        store.begin(config)
        write_text(folder / RUN_CONFIG, config)
        write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"train.output_dir (={str(folder)!r}) cannot be written to: {error.strerror}") from error
    counts = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if count)
    lines = [
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        *describe(places, precision),
        f"attention: {attention}",
    ]
    if run.device.type == "cuda" and run.world.size < torch.cuda.device_count():
        lines.append(f"note: {torch.cuda.device_count()} GPUs are here; torchrun --nproc-per-node N uses N of them")
    lines.append(f"data: {len(run.dataset):,} samples, {run.dataset.path}")
    lines += notes_on_files(run.dataset)
    if run.dataset.remote:
        lines.append(f"data: {run.loader.fetching()}")
    lines += [
        f"loading: {run.loader.num_workers} workers for each process, {torch.get_num_threads()} threads of its own",
        f"parameters: {counts}",
    ]
    if compiled:
        lines.append(f"compiling: the blocks of {' and '.join(compiled)}, in the first steps, which may take minutes")
    lines += [f"steps: {run.schedule.steps:,} ({run.config.train.epochs} epochs of {run.steps_per_epoch:,})"]
    lines += [f"note: {note}" for note in notes_on_fit(run)]
    lines += start.lines
    if store.apart:
        lines.append(f"checkpoints: {store}")
    if resume and not start.step:
        lines.append(f"nothing to resume: {store} has no checkpoint; starting at step 0")
    lines.append(f"run folder: {folder}")
    print(*lines, sep="\n", flush=True)


def notes_on_files(dataset: ShardDataset) -> list[str]:
    """Return what was left out of folders of images, and when shards are better."""
    notes = [f"note: {note}" for part in dataset.listed for note in part.notes]
    if files := [part for part in dataset.listed if part.digest_of == NAMES_AND_SIZES]:
        notes.append(
            f"note: {files[0].path} is read file by file; shards of it (jepa-shards) are read with "
            "fewer operations, which matters on network and hard disks, and show damaged images before a run"
        )
    return notes


def find_places(world: World, device: torch.device, precision: Precision) -> list[Place]:
    """Return the places of all processes by rank; all must call it."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tflops = round(matrix_peak(device, precision) / 1e12, 4)
    return all_gather_object(Place(world.rank, world.local_rank, platform.node(), str(device), model, tflops))


def to_dict(places: Sequence[Place], precision: Precision) -> dict[str, Any]:
    """Return the topology for ``run.json``: places, the peak that ``mfu`` is relative to, and the id of a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "nodes": len({place.host for place in places}),
        "mfu_peak": {
            "measured": "large square matrix product, at the start",
            "precision": precision,
            "devices": sorted({place.model for place in places}),
            "tflops_a_process": sum(place.matrix_tflops for place in places) / len(places),
        },
        "places": [asdict(place) for place in places],
        **({"slurm_job": job} if job else {}),
    }


SLOW = 0.8
"""A device below this fraction of the fastest one's speed is reported: all others wait for it in every step."""


def describe(places: Sequence[Place], precision: Precision) -> list[str]:
    """Return the lines printed at a start: devices, nodes, speed, and each device much slower than the fastest."""
    count = len(places)
    models = " and ".join(sorted({place.model for place in places}))
    hosts = Counter(place.host for place in places)
    counts = ", ".join(f"{host} ({n})" for host, n in hosts.items())
    nodes = f"{len(hosts)} node{'s' if len(hosts) > 1 else ''}"
    least, most = (f(place.matrix_tflops for place in places) for f in (min, max))
    speed = f"{most:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    lines = [
        f"device: {models}, {count} process{'es' if count > 1 else ''}",
        f"topology: {nodes}: {counts}",
        f"mfu: relative to {speed} TFLOP/s a process: a large matrix product in {precision} on {models}, measured now",
    ]
    lines += [
        f"note: rank {place.rank} on {place.host} ({place.device}) does {place.matrix_tflops / most:.0%} of the fastest"
        for place in places
        if place.matrix_tflops < SLOW * most and place.device != "cpu"  # CPUs have other users
    ]
    return lines
