"""Train and evaluate one cell, or evaluate one baseline, in a process of its own, and write its record.

    python -m jepa_kit.studies.worker JOB.json [--cores 0,1] [--follow-stdin] [--crashed STATUS]

The run of a cell resumes from its latest checkpoint. --cores: those that it may use. --follow-stdin: if stdin is
closed, because the process that started this one has died, it stops as after SIGTERM. --crashed: write the record of a
worker that ended with STATUS without writing one. Exit status: 0 if there is a record without a failure, 1 with one, 75
or 130 after a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jepa_kit.config import Config, config_from_dict, versions
from jepa_kit.distributed.signals import EX_TEMPFAIL, INTERRUPTED, Preempted, requeue
from jepa_kit.errors import first_line
from jepa_kit.studies.records import Record, read_record, write_record

if TYPE_CHECKING:
    import torch

    from jepa_kit.data.shards.dataset import ShardDataset
    from jepa_kit.evaluation.feature_cache import FeatureStore
    from jepa_kit.evaluation.feature_sources import Network
    from jepa_kit.evaluation.health.measure import Which
    from jepa_kit.recipe import Recipe

FAILURES = (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError)
"""Errors of a run that become the reason of its row; any other is a bug, which its log shows."""
PATIENCE = timedelta(days=7)
"""Timeout of collectives: one process may need hours for its last protocol."""
HEALTH_IMAGES = 256
LOG = "log.txt"
"""File in a job's folder with what its worker prints."""


def follow_stdin() -> None:
    """Send this process SIGTERM as soon as stdin is closed."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be open at the interpreter's exit
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


class StoppedError(Exception):
    """A signal stopped the worker outside the steps of a run, which handle signals themselves."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


@contextmanager
def stops_at_signals() -> Iterator[None]:
    """Raise StoppedError at a signal that ends a job; without this, an evaluation would count as crashed."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(job: Mapping[str, Any]) -> int:
    """Do a job and write its record; return the exit status.

    Args:
        job: as ``jepa_kit.studies.jobs.job_file`` writes it.
    """
    results = Path(job["results"])
    before = read_record(results, job["id"])
    try:
        with stops_at_signals():
            found = do(job, before)
    except (Preempted, StoppedError) as stopped:
        print(stopped, flush=True)
        return leave(stopped.number)
    except KeyboardInterrupt:
        return INTERRUPTED
    except FAILURES as error:
        traceback.print_exception(error)
        if is_first():
            fail(job, first_line(error).replace(job["run"], "RUN"))
        return 1
    if is_first():
        write_record(found, results)
    return 0


def do(job: Mapping[str, Any], before: Record | None) -> Record:
    """Train and evaluate what a job lacks, and return its record.

    Args:
        job: as for ``work``.
        before: the record of an earlier call, whose rows are kept.
    """
    config = config_from_dict(job["config"], source=job["title"])
    config = replace(config, train=replace(config.train, output_dir=job["run"]))
    found = Record(
        id=job["id"],
        kind=job["kind"],
        title=job["title"],
        seed=job["seed"],
        rows={} if before is None else before.rows,
        data=job["data"],
        config=job["config"],
        versions=versions(),
        machine=about_machine(config),
    )
    if job["kind"] == "cell":
        train_to_the_end(config, job["steps"])
    return evaluate_job(job, config, found)


def is_first() -> bool:
    """Return whether this is the first of a cell's processes."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def fail(job: Mapping[str, Any], reason: str) -> None:
    """Write the record of a failed job; what an earlier call measured stays in it."""
    results = Path(job["results"])
    given: dict[str, Any] = {key: job[key] for key in ("id", "kind", "title", "seed", "config", "data")}
    record = read_record(results, job["id"]) or Record(**given, versions=versions())
    write_record(replace(record, state="failed", reason=reason), results)


def about_machine(config: Config) -> dict[str, Any]:
    """Return device and threads of this process, for the cost of a run."""
    import torch

    from jepa_kit.distributed.collectives import choose_device, read_environment

    device = choose_device(config.train.device, read_environment())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}


def cpu_name() -> str:
    """Return the model of the CPU."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def train_to_the_end(config: Config, steps: int) -> None:
    """Train a run, or resume it, until it has its last step."""
    from jepa_kit.engine.checkpoint.manager import store_of
    from jepa_kit.training import train

    newest = store_of(config).newest()
    if newest is None or newest.step < steps:
        train(config, resume=True)


def evaluate_job(job: Mapping[str, Any], config: Config, found: Record) -> Record:
    """Return the record with the evaluations that it lacks, and for a cell with its cost and health."""
    from jepa_kit.distributed.collectives import choose_device, process_group, read_environment
    from jepa_kit.engine.build import open_together
    from jepa_kit.evaluation.feature_cache import FeatureStore
    from jepa_kit.evaluation.feature_sources import config_networks, encoder_named, run_networks
    from jepa_kit.evaluation.features import latest_checkpoint, load_run
    from jepa_kit.files import sha256_of

    folder, world = Path(config.train.output_dir), read_environment()
    device = choose_device(config.train.device, world)
    missing = [entry for entry in job["evaluations"] if entry["id"] not in found.rows]
    with process_group(world, device, patience=PATIENCE):
        train, test = open_together(config, job["train"]), open_together(config, job["test"])
        if job["kind"] == "cell":
            file = latest_checkpoint(folder)
            loaded = load_run(file, trust_imports=True)
            which = encoder_named(loaded.jepa)
            health = measure(loaded.jepa.to(device), config, test, which, device)
            found = replace(found, health=health, training=training_cost(folder, job))
            found = replace(found, reason=f"{health['state']}: {health['reason']}" if found.collapsed else "")
            networks = run_networks(
                loaded, encoders=[which], baselines=(), device=device, checkpoint_sha256=sha256_of(file)
            )
        else:
            networks = config_networks(config, baselines=[job["baseline"]], device=device)
        features = folder / "features"
        rows = dict(found.rows)
        for entry in missing:
            rows[entry["id"]] = evaluate_protocol(
                entry, job, config, networks, train, test, FeatureStore(features, world), device
            )
        if world.is_main:
            shutil.rmtree(features, ignore_errors=True)
    return replace(found, rows=rows)


def evaluate_protocol(
    entry: Mapping[str, Any],
    job: Mapping[str, Any],
    config: Config,
    networks: Sequence[Network],
    train: ShardDataset,
    test: ShardDataset,
    store: FeatureStore,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return the rows of one protocol, as plain values."""
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.data.workers import choose_workers
    from jepa_kit.evaluation.evaluate import evaluate
    from jepa_kit.precision import precision_of

    rows = evaluate(
        networks,
        train,
        test,
        ImageOptions.from_config(
            config.data,
            num_workers=choose_workers(config.data.num_workers, device),
            precision=precision_of(config),
        ),
        protocols=[entry["spec"]],
        labels=job["labels"],
        layers=entry["layers"],
        seed=job["protocol_seed"],
        store=store,
        device=device,
        progress=True,
    )
    return [asdict(row) for row in rows]


def measure(jepa: Recipe, config: Config, dataset: ShardDataset, which: Which, device: torch.device) -> dict[str, Any]:
    """Return state, reason and figures of the health of a trained recipe on held-out images."""
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.evaluation.health.measure import measure_health
    from jepa_kit.evaluation.health.verdict import judge
    from jepa_kit.evaluation.images import random_samples, read_images
    from jepa_kit.from_config import masker_of
    from jepa_kit.precision import precision_of

    images = read_images(dataset, ImageOptions.from_config(config.data), random_samples(dataset, HEALTH_IMAGES, seed=0))
    verdict = judge(
        measure_health(
            jepa,
            images,
            masker_of(config),
            encoder=which,
            mean=config.data.mean,
            std=config.data.std,
            device=device,
            precision=precision_of(config),
        )
    )
    return {**asdict(verdict), "collapsed": verdict.collapsed}


def training_cost(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return steps, images, TFLOP and hours of a run; hours are those of its steps, also of earlier processes."""
    from jepa_kit.engine.logging.telemetry import read_metrics

    seconds, samples = 0.0, 0.0
    for line in read_metrics(folder):
        if line.get("images_per_second"):
            seconds += (line["samples"] - samples) / line["images_per_second"]
            samples = line["samples"]
    return {key: job[key] for key in ("steps", "images", "tflop")} | {"hours": seconds / 3600}


def leave(number: int) -> int:
    """Return the status after a signal; inside a Slurm job, SIGUSR1 requeues it."""
    if is_first() and number == signal.SIGUSR1 and (done := requeue()):
        print(done, flush=True)
    return INTERRUPTED if number == signal.SIGINT else EX_TEMPFAIL


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker; return its exit status."""
    parser = argparse.ArgumentParser(prog="jepa_kit.studies.worker", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--cores", metavar="LIST")
    parser.add_argument("--follow-stdin", action="store_true")
    parser.add_argument("--crashed", type=int, metavar="STATUS")
    arguments = parser.parse_args(argv)
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    if arguments.crashed is not None:
        record = read_record(Path(job["results"]), job["id"])
        if record is None or record.state != "failed":
            fail(job, f"its process ended with status {arguments.crashed}; its output shows more")
        return 1
    if arguments.cores is not None:
        os.sched_setaffinity(0, map(int, arguments.cores.split(",")))
    if arguments.follow_stdin:
        follow_stdin()
    return work(job)


if __name__ == "__main__":
    sys.exit(main())
