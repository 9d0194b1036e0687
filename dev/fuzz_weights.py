"""Kinds of fuzz.py: weights and checkpoints of all formats, damaged, non-finite, or with another structure."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fuzz import Harmed, damaged, temporary_folder
from safetensors.torch import save_file

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.engine.checkpoint.dcp import save_sharded
from jepa_kit.engine.checkpoint.files import FORMAT, HEADER, checksum
from jepa_kit.engine.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint
from jepa_kit.engine.checkpoint.state_dict import optimizer_state
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.files import write_archive
from jepa_kit.from_config import build_recipe
from jepa_kit.interop import hf
from jepa_kit.interop.formats import read, read_encoder, write
from jepa_kit.interop.weights import Architecture, EncoderWeights, Provenance, Reading

Cases = Iterator[tuple[str, Callable[[], object]]]
HEADS = 2
FORMATS = ("official", "jepa_kit", "hf", "timm", "safetensors", "onnx")
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1e300, float("nan"), float("inf"), "", "x", "ü" * 300, [], {}, [[]], {"": None}, (1, 2),
    b"\0",
)  # fmt: skip
"""Values that may stand where another is expected."""


folder = functools.partial(temporary_folder, "weights")


@functools.cache
def config() -> Any:
    """Return the config of a run of a tiny ViT."""
    return config_from_dict(
        {
            "masker": {"name": "multiblock"},
            "encoder": {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": HEADS, "patch_size": 8},
            "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
            "target": {"name": "representation"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema"},
            "data": {"image_size": 32},
            "train": {"batch_size": 4, "epochs": 2, "steps_per_epoch": 3, "precision": "float32"},
            "optim": {"warmup_epochs": 1},
        }
    )


@functools.cache
def checkpoint() -> Checkpoint:
    """Return a checkpoint of that run, with optimizer moments."""
    torch.manual_seed(0)
    jepa = build_recipe(config())
    optimizer = build_optimizer(jepa)
    for parameter in jepa.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return Checkpoint(3, jepa.state_dict(), optimizer_state(optimizer), config().to_dict(), {}, {"samples": 12})


@functools.cache
def weights() -> EncoderWeights:
    """Return the weights of a tiny encoder."""
    shape = Architecture(image_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=HEADS, mlp_hidden=40)
    seeded = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=seeded) for k, v in shape.build().state_dict().items()}
    return EncoderWeights(state=state, architecture=shape, provenance=Provenance(encoder="target", source="x", step=3))


@functools.cache
def original(format: str) -> Path:
    """Return an undamaged file or folder of a format."""
    path = folder() / f"{format}.original"
    write(checkpoint() if format in ("official", "jepa_kit") else weights(), path, format)  # type: ignore[arg-type]
    return path


@functools.cache
def content(format: str) -> Any:
    """Return the content of the undamaged file."""
    return read(original(format), None, Reading(num_heads=HEADS))


def fresh(name: str) -> Path:
    """Return an empty folder for a case."""
    place = folder() / name
    shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    return place


def compare(found: Any, expected: Any) -> None:
    """Raise Harmed if a checkpoint or weights are not the original's."""
    names = ("model", "optimizer", "config", "data", "step") if isinstance(expected, Checkpoint) else (
        "state", "architecture", "table"
    )  # fmt: skip
    for name in names:
        if not same(getattr(found, name), getattr(expected, name)):
            raise Harmed(f"{name} is another")
    if isinstance(expected, EncoderWeights) and replace(found.provenance, source="x") != expected.provenance:
        raise Harmed(f"provenance is another: {found.provenance}")


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, with tensors bit for bit."""
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    return bool(a == b)


def damaged_files(format: str, seed: int) -> Cases:
    """Yield files with a checksum and damaged bytes."""
    chance = random.Random(f"{format} {seed}")
    while True:
        source = original(format)
        files = sorted(f for f in source.iterdir() if f.name != "README.md") if source.is_dir() else [source]
        file = chance.choice(files)
        how, data = damaged(file.read_bytes(), chance)

        def call(source: Path = source, file: Path = file, data: bytes = data) -> None:
            place = fresh("x")
            if source.is_dir():
                shutil.copytree(source, place)
                (place / file.name).write_bytes(data)
            else:
                place.write_bytes(data)
            compare(read(place, None, Reading(num_heads=HEADS)), content(format))

        yield f"{file.name}: {how}", call


def foreign(kind: str, state: dict[str, torch.Tensor]) -> Path:
    """Return a file of another library, which has no checksum of jepa_kit."""
    place = fresh("y")
    if kind == "torch":
        torch.save(state, place)
    elif kind == "timm":
        save_file({"pos_embed": weights().table[None], **state}, place)
    else:
        place.mkdir()
        named = hf.to_names(replace(weights(), state=state))
        save_file({name: value.contiguous() for name, value in named.items()}, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(hf.to_config(weights().architecture)))
    return place


def foreign_files(seed: int) -> Cases:
    """Yield damaged files without a checksum: if accepted, all numbers are finite and all names unchanged."""
    chance = random.Random(f"foreign {seed}")
    while True:
        kind = chance.choice(("timm", "hf"))
        place = foreign(kind, weights().state)
        file = chance.choice(sorted(place.iterdir())) if place.is_dir() else place
        how, data = damaged(file.read_bytes(), chance)

        def call(kind: str = kind, name: str = file.name, data: bytes = data) -> None:
            place = foreign(kind, weights().state)
            (place / name if place.is_dir() else place).write_bytes(data)
            found = read_encoder(place, None, num_heads=HEADS)
            if not all(bool(torch.isfinite(x).all()) for x in (*found.state.values(), found.table)):
                raise Harmed("weights that are not finite")
            found.module()

        yield f"{kind} {file.name}: {how}", call


def not_finite(seed: int) -> Cases:
    """Yield files with one NaN or infinite number and a correct checksum."""
    chance = random.Random(f"finite {seed}")
    while True:
        format = chance.choice((*FORMATS, "foreign torch", "foreign timm", "foreign hf"))
        name = chance.choice(sorted(checkpoint().model if format in ("official", "jepa_kit") else weights().state))
        value, place = chance.choice((float("nan"), float("inf"), -float("inf"))), chance.random()

        def call(format: str = format, name: str = name, value: float = value, place: float = place) -> None:
            whole = format in ("official", "jepa_kit")
            state = dict(checkpoint().model if whole else weights().state)
            bad = state[name].clone()
            bad.view(-1)[int(place * bad.numel())] = value
            state[name] = bad
            target = fresh("z")
            if format.startswith("foreign "):
                target = foreign(format.removeprefix("foreign "), state)
            elif whole:
                write(replace(checkpoint(), model=state), target, format)  # type: ignore[arg-type]
            else:
                write(replace(weights(), state=state), target, format)  # type: ignore[arg-type]
            size = (32, 32) if format == "foreign torch" else None
            read(target, None, Reading(num_heads=HEADS, image_size=size, allow_unchecked=True))
            raise Harmed(f"{value} in {name}")

        yield f"{format}: {value} in {name}", call


def changed(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """Return a value with one part replaced, removed or added."""
    if isinstance(value, dict) and value and depth < 6 and chance.random() < 0.85:
        key = chance.choice(sorted(value, key=str))
        way = chance.random()
        if way < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.25:
            return {**value, chance.choice(("blocks.1.x", "blocks.x.y", "extra", 3)): value[key]}
        return {**value, key: changed(value[key], chance, depth + 1)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance, depth + 1), *value[place + 1 :]]
    if isinstance(value, torch.Tensor) and value.ndim and chance.random() < 0.7:
        ways = (value[None], value[:0], value.flatten(), value.long(), value.to(torch.complex64), value.to_sparse())
        return chance.choice(ways)
    return chance.choice(ODD)


def structures(seed: int) -> Cases:
    """Yield archives with another structure and correct CRCs."""
    chance = random.Random(f"structure {seed}")
    while True:
        format = chance.choice(("official", "jepa_kit"))
        held = torch.load(original(format), weights_only=True)
        for _ in range(chance.choice((1, 1, 2))):
            held = changed(held, chance)

        def call(held: Any = held) -> None:
            place = fresh("s")
            torch.save(held, place)
            found = read(place, None, Reading(num_heads=HEADS))
            model = found.model if isinstance(found, Checkpoint) else found.state
            if not all(bool(torch.isfinite(x).all()) for x in model.values()):
                raise Harmed("weights that are not finite")
            read_encoder(place, None, num_heads=HEADS).module()

        yield format, call


def run_folders(seed: int) -> Cases:
    """Yield damaged checkpoints in a run folder, read to resume and as a config."""
    chance = random.Random(f"run {seed}")
    place = folder() / "run"
    place.mkdir(exist_ok=True)
    whole = save_checkpoint(place, checkpoint()).read_bytes()
    while True:
        how, data = damaged(whole, chance)
        as_config = chance.random() < 0.5

        def call(data: bytes = data, as_config: bool = as_config) -> None:
            file = fresh("checkpoint_00000003.pt")
            file.write_bytes(data)
            if as_config:
                found = load_config(file).to_dict()
                if {k: v for k, v in found.items() if k != "versions"} != {
                    k: v for k, v in config().to_dict().items() if k != "versions"
                }:
                    raise Harmed("the config is another")
                return
            compare(load_checkpoint(file), checkpoint())

        yield f"{'config of ' if as_config else ''}checkpoint: {how}", call


@functools.cache
def in_shards() -> Path:
    """Return the same checkpoint as a folder of shards."""
    place = folder() / "shards" / "checkpoint_00000003"
    saved = checkpoint()
    save_sharded(place, saved.model, saved.optimizer)
    files = {file.name: [file.stat().st_size, checksum(file)] for file in sorted(place.iterdir())}
    about = {name: getattr(saved, name) for name in ("step", "config", "versions", "data", "origin", "position")}
    write_archive({"format": FORMAT, **about, "files": files}, place / HEADER)
    return place


def sharded(seed: int) -> Cases:
    """Yield sharded checkpoints with one damaged or missing file."""
    chance = random.Random(f"sharded {seed}")
    while True:
        source = in_shards()
        file = chance.choice(sorted(source.iterdir()))
        gone = chance.random() < 0.05
        how, data = ("gone", b"") if gone else damaged(file.read_bytes(), chance)

        def call(source: Path = source, name: str = file.name, data: bytes = data, gone: bool = gone) -> None:
            place = fresh("checkpoint_00000003")
            shutil.copytree(source, place)
            (place / name).unlink() if gone else (place / name).write_bytes(data)
            compare(load_checkpoint(place), checkpoint())

        yield f"{file.name}: {how}", call


KINDS: dict[str, Callable[[int], Cases]] = {
    **{f"weights.{format}": functools.partial(damaged_files, format) for format in FORMATS},
    "weights.foreign": foreign_files,
    "weights.not_finite": not_finite,
    "weights.structure": structures,
    "checkpoints.file": run_folders,
    "checkpoints.sharded": sharded,
}
