"""The sections of a recording (record.py): what they run, and what they keep of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "Agg",
    "PYTHONPATH": str(ROOT),
    "PYTHONHASHSEED": "0",
}
os.environ.update(ENVIRONMENT)  # before torch is imported

CORE = "MASKERS TrainLoader build_masker epoch_order load_config load_encoder open_shards training_views"
NAMES = {"jepa_kit": CORE.split(), "projects/ijepa": ["check", "read_fixture"]}
"""Folder -> all names that are imported from it, whatever module defines them; after a renaming change them here."""
SAVED, STEPS = 30, 32
"""Steps of the checkpoint that is resumed later, and of a run."""
TRAIN_SCENES, TEST_SCENES = 240, 96
CLOCKED = re.compile(r"(images|tokens)_per_second|data_wait|tflops|mfu|.*memory_gib|gflop_per_image|.*seconds")
"""Keys of metrics.jsonl that a clock or the machine's memory gave."""
PLACED = ("checkpoint", "shards", "config", "versions", "reason")
"""Keys of health.py's figures that say from where they are, or put them in a sentence."""
LOCAL = re.compile(r"versions|.*\.(shards|output_dir)")
"""Keys of a resolved config that differ from place to place."""

COMMON = [
    "train.batch_size=16",
    "train.epochs=4",
    "train.steps_per_epoch=8",
    "train.precision=float32",
    "train.device=cpu",
    "train.log_every=1",
    f"train.checkpoint_every={SAVED}",
    "train.keep_checkpoints=2",
    "train.tensorboard=false",
    "data.num_workers=0",
]
SMALL = [
    *(f"encoder.{text}" for text in ("embed_dim=48", "depth=2", "num_heads=3")),
    *(f"predictor.{text}" for text in ("width=24", "depth=2", "num_heads=3")),
    "optim.warmup_epochs=1",
]


@dataclass(frozen=True)
class Training:
    """A run: a config file, what is changed of it, and the number of processes."""

    config: str
    overrides: Sequence[str]
    processes: int = 1


TRAININGS = {
    "quickstart": Training(
        "quickstart.yaml",
        [f"evaluate.{text}" for text in ("every=16", "samples=32", "probe=knn", "probe_samples=64", "label=shape")],
    ),
    "released": Training(
        "released_in1k_vith14.yaml",
        [*SMALL, "data.image_size=168", "train.accumulate=2", "train.parallel=ddp"],
        processes=2,
    ),
    "fsdp": Training(
        "corrected_in1k_vitb16.yaml",
        [
            *SMALL,
            "masker={name: mixture, maskers: [{name: multiblock}, {name: multigroup}, {name: inverse_block}]}",
            "loss=[{name: smooth_l1}, {name: cosine, weight: 0.5}]",
            *("encoder.drop_path=0.2", "encoder.patch_size=8", "data.image_size=64", "data.flip=0.5"),
            *("data.num_workers=1", "optim.clip_grad=0.5", "train.activation_checkpointing=true"),
            *("train.parallel=fsdp", "train.checkpoint=sharded"),
        ],
        processes=2,
    ),
}
PROTOCOLS = {
    "finetune": "{name: finetune, epochs: 2, batch_size: 64}",
    "logistic": "{name: logistic, subsets: [50%, all], draws: 2}",
    "paper_transfer": "{name: paper_transfer, dataset: cifar100}",
}
"""Options of protocols that need some, or that take long without them."""


@cache
def found(name: str) -> Any:
    """Return an object of ``NAMES`` from the one module in its folder that defines it at the top level.

    Raises:
        ImportError: no module defines it, or several do.
    """
    (folder,) = (folder for folder, names in NAMES.items() if name in names)
    defined = re.compile(rf"^(?:(?:class|def) {name}\b|{name}(?:: .+)? = )", re.M)
    files = [file for file in sorted((ROOT / folder).rglob("*.py")) if defined.search(file.read_text())]
    if len(files) != 1:
        raise ImportError(
            f"{name} must be defined by one module in {folder}, not {len(files)}: see NAMES in {__file__}"
        )
    module = importlib.import_module(".".join(files[0].relative_to(ROOT).with_suffix("").parts))
    if not Path(module.__file__ or "").is_relative_to(ROOT):
        raise ImportError(f"{module.__name__} comes from {module.__file__}, which is not in {ROOT}")
    return getattr(module, name)


def run(*words: object, processes: int = 1) -> str:
    """Run a program of the repository, under torchrun if there are several processes, and return what it printed.

    Raises:
        RuntimeError: its status is not 0; the message ends with its last lines.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(word) for word in words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{last}")
    return done.stdout


# --- what tells tensors and files apart ---


def digest(*arrays: Any) -> str:
    """Return the SHA-256 of arrays with their types and shapes."""
    import numpy as np

    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.dtype.str} {array.shape};".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def fingerprint(tensor: Any) -> str | float:
    """Return a tensor's SHA-256 with its float64 norm, which gives a comparison a size; a single number as it is."""
    if not tensor.ndim:
        return float(tensor)
    return f"{digest(tensor.detach().numpy())} norm {float(tensor.double().norm())!r}"


def state_in(checkpoint: Path) -> dict[str, Any]:
    """Return the fingerprints of a checkpoint's tensors: weights and buffers, and the optimizer's by parameter."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as scratch:
        file = checkpoint
        if checkpoint.is_dir():
            file = Path(scratch) / "whole.pt"
            dcp_to_torch_save(checkpoint, file)
        content = torch.load(file, weights_only=True)
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    for key in (key for key in content if "/" in key):  # shards have flat names: optimizer/encoder.norm.bias/exp_avg
        part, name, *rest = key.split("/")
        if rest:
            state[part].setdefault(name, {})[rest[0]] = content[key]
        else:
            state[part][name] = content[key]
    state = {part: content.get(part) or state[part] for part in state}
    return {
        "model": {name: fingerprint(tensor) for name, tensor in state["model"].items()},
        "optimizer": {
            name: {key: fingerprint(tensor) for key, tensor in held.items()}
            for name, held in state["optimizer"].items()
        },
    }


# --- the sections of a recording ---


def machine() -> dict[str, str]:
    """Return what the bits of a sum may depend on."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    packages = ("torch", "numpy", "scipy", "scikit-learn", "pillow")
    return {
        "commit": commit.stdout.strip(),
        "machine": platform.machine(),
        "cpu": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def make_scenes(folder: Path) -> dict[str, str]:
    """Make shards of training and test scenes, unless they are there; return the digests of their files."""
    for name, count, seed in (("train", TRAIN_SCENES, 0), ("test", TEST_SCENES, 1)):
        size = ["--num-scenes", count, "--image-size", 64, "--samples-per-shard", 64, "--seed", seed, "--workers", 1]
        if not (folder / name / "index.json").exists():
            run("tools/make_shards.py", "synthetic:scenes", folder / name, *size)
    files = sorted(folder.glob("*/*.tar"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train(name: str, folder: Path, shards: Path, config: Path | None = None) -> None:
    """Run one of ``TRAININGS`` in a folder; with ``config``, a run folder, resume from its latest checkpoint."""
    one = TRAININGS[name]
    overrides = [*COMMON, *one.overrides] if config is None else ["--resume"]
    file = ROOT / "projects/ijepa/configs" / one.config if config is None else config
    words = ["--config-file", file, "--output-dir", folder, f"data.shards={shards / 'train'}", *overrides]
    run("tools/train_net.py", *words, processes=one.processes)


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a run came to: the lines of its metrics without times, and its last state."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    last = max(folder.glob(f"checkpoint_{STEPS:08d}*"))
    return {
        "lines": [{key: value for key, value in line.items() if not CLOCKED.fullmatch(key)} for line in lines],
        "state": state_in(last),
    }


def features(checkpoint: Path) -> str:
    """Return the fingerprint of the tokens that the encoder of a checkpoint gives for fixed images."""
    import torch

    encoder = found("load_encoder")(checkpoint)
    size = 168 if encoder.patch_size == 14 else 64
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return fingerprint(encoder(images))


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested mappings, with its place, as ``data.image_size``."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{place}.{key}".lstrip("."))
    else:
        yield place, value


def resolved(folder: Path) -> dict[str, Any]:
    """Return the run's config with every default, without what differs from place to place."""
    import yaml

    content = yaml.safe_load((folder / "config.yaml").read_text())
    return {key: value for key, value in flat(content) if not LOCAL.match(key)}


def record_training(name: str, folder: Path, shards: Path) -> dict[str, Any]:
    """Train one of ``TRAININGS`` and return what it came to."""
    train(name, folder, shards)
    (saved,) = folder.glob(f"checkpoint_{SAVED:08d}*")
    return {"config": resolved(folder), **outcome(folder), f"features at {SAVED}": features(saved)}


def record_parity() -> dict[str, Any]:
    """Return the largest absolute and relative difference of each kind of quantity from the fixture, and a digest of
    all differences; in two precisions."""
    import torch

    fixture, precisions = str(ROOT / "tests/fixtures/released_step"), {}
    for dtype in (torch.float64, torch.float32):
        report = found("check")(found("read_fixture")(fixture), device=torch.device("cpu"), dtype=dtype)
        kinds: dict[str, dict[str, float]] = {}
        for quantity, gaps in report.rows.items():
            kind = kinds.setdefault(re.split(r"/|, step", quantity)[0], {"absolute": 0.0, "relative": 0.0})
            kind.update({name: max(kind[name], gap) for name, gap in zip(kind, gaps, strict=True)})
        every = hashlib.sha256(repr([*report.rows.values()]).encode()).hexdigest()
        precisions[str(dtype)] = {"largest": kinds, "all": every}
    return precisions


KEYS = ("protocol", "network", "label", "metric", "variant")
"""Of a row of results: what it is about."""


def record_protocols(run_folder: Path, shards: Path, scratch: Path) -> dict[str, Any]:
    """Return the figures of every protocol that ``eval_net.py --list`` names, for the run and the baselines."""
    names = re.findall(r"^(\w+): ", run("tools/eval_net.py", "--list"), flags=re.M)
    file = scratch / "results.json"
    asked = [word for name in names for word in ("--protocol", PROTOCOLS.get(name, name))]
    parts = ["--train-shards", shards / "train", "--test-shards", shards / "test", "--label", "shape"]
    run("tools/eval_net.py", "--checkpoint", run_folder, *asked, *parts, "--output", file)
    content = json.loads(file.read_text())
    rows: dict[str, Any] = {name: {} for name in names}
    for row in content["rows"]:
        figures = rows[row["protocol"]]
        key = " ".join(row[part] for part in KEYS[1:]).strip()
        assert key not in figures, key
        figures["options"] = row["options"]
        figures[key] = {name: value for name, value in row.items() if name not in (*KEYS, "options", "seconds")}
    return rows


def record_tools(run_folder: Path, shards: Path, scratch: Path) -> dict[str, Any]:
    """Return digests of the weights that convert_checkpoint.py writes, and the figures of health.py, for a run."""
    weights = {}
    for form in ("official", "hf", "timm", "safetensors"):
        out = scratch / f"weights.{form}"
        run("tools/convert_checkpoint.py", "--from", "jepa_kit", "--to", form, run_folder, out)
        weights[form] = weights_in(out)
    file = scratch / "health.json"
    run("tools/health.py", "--checkpoint", run_folder, "--shards", shards / "test", "--images", 64, "--output", file)
    return {"weights": weights, "health": without_times(json.loads(file.read_text()))}


def weights_in(path: Path) -> str:
    """Return one digest of all tensors in a file of safetensors or torch, or in a folder that holds one."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(next(path.glob("*.safetensors")) if path.is_dir() else path)
    except SafetensorError:
        content = torch.load(path, weights_only=True)
    tensors = {name: value for name, value in flat(content) if isinstance(value, torch.Tensor)}
    return hashlib.sha256(repr([(name, fingerprint(tensors[name])) for name in sorted(tensors)]).encode()).hexdigest()


def without_times(value: Any) -> Any:
    """Return plain values without what depends on the clock or on the place of files."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not CLOCKED.fullmatch(k) and k not in PLACED}
    return [without_times(part) for part in value] if isinstance(value, list) else value
