"""Read and check a recording of the released code, and keep track of which of its tensors are compared.

NAME.json            meta         sizes and settings
                     trajectory   loss, lr, weight_decay and momentum of each step
NAME.safetensors     images                    [K, B, 3, h, w]: step i uses images[i % K]
                     masks/<step>/context/<c>  [B, L] patch numbers, and masks/<step>/target/<m> likewise
                     init/, final/             weights of encoder, predictor, target_encoder, under the released names
                     step0/, step0/grad/       outputs of each part at step 0, and the gradient of each parameter

Settings, the steps of ``trajectory``, images, masks and ``init/`` are required: the run is repeated from them. All
others are optional, and compared if present.

    K batches of images    B images    C contexts    M target blocks of an image    L patches of a set
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SIZES = (
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "predictor_embed_dim", "predictor_depth"),
    *("batch_size", "epochs", "iterations_per_epoch"),
)
NUMBERS = ("warmup_epochs", "start_lr", "ref_lr", "final_lr", "wd", "final_wd")
NEEDED = (*SIZES, *NUMBERS, "ema")
"""Required keys of ``meta``; others have the defaults of the released code."""

OPTIONAL = (
    *("predictor_num_heads", "mlp_ratio", "layer_norm_eps", "num_context_blocks", "num_target_blocks"),
    *("ipe_scale", "optimizer", "dtype", "steps", "no_weight_decay", "step0_mean_squared_error"),
)
OF_A_STEP = ("loss", "lr", "weight_decay", "momentum")
LARGEST = 10**9
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Fixture:
    """A recording of the released code.

    Args:
        meta: sizes and settings.
        trajectory: for each step its loss, lr, weight_decay and momentum.
        tensors: by name.
        used: names of the tensors that were read.
        not_recorded: quantities that were looked up, but are missing.
    """

    meta: dict[str, Any]
    trajectory: list[dict[str, float]]
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)
    not_recorded: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.meta.get("dtype", "float64").removeprefix("torch.")]

    def take(self, name: str) -> Tensor:
        """Return a tensor by name; raise ValueError if there is none."""
        if name not in self.tensors:
            raise ValueError(f"the fixture has no tensor {name!r}; it has {few(self.tensors)}")
        self.used.add(name)
        return self.tensors[name]

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return all tensors whose names begin with ``prefix``, by the rest of their names."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.take(name) for name in names}

    def find(self, name: str, quantity: str) -> Tensor | None:
        """Return a tensor by name; if there is none, note ``quantity`` and return None."""
        if name in self.tensors:
            return self.take(name)
        self.not_recorded.append(f"{quantity} ({name})")
        return None

    def group(self, prefix: str, names: Collection[str], quantity: str) -> dict[str, Tensor]:
        """Return the tensors ``prefix`` + name in the order of ``names``; if all are missing, note ``quantity``.

        Raises:
            ValueError: only some are missing.
        """
        lacking = [name for name in names if prefix + name not in self.tensors]
        if len(lacking) == len(names):
            self.not_recorded.append(f"{quantity} ({prefix}, {len(names)} tensors)")
            return {}
        if lacking:
            raise ValueError(
                f"the fixture lacks {len(lacking)} of {len(names)} tensors of {prefix} (it must have all or none): "
                f"{few(lacking)}"
            )
        return {name: self.take(prefix + name) for name in names}

    def left(self) -> list[str]:
        """Return the names of unread tensors (masks of later steps as one) and of unknown settings that are set."""
        later = re.compile(r"masks/\d+/(context|target)/\d+")
        names = {"masks of later steps" if later.fullmatch(name) else name for name in self.tensors.keys() - self.used}
        known = (*NEEDED, *OPTIONAL)
        return sorted(names) + [f"meta.{key}" for key, value in self.meta.items() if value and key not in known]

    def sets(self, step: int, kind: str, num_patches: int) -> list[Tensor]:
        """Return the sets of a kind (context, target) at a step: a list of int64 [B, L].

        Args:
            step: from 0.
            kind: ``context`` or ``target``.
            num_patches: of an image.

        Raises:
            ValueError: no sets, sets not numbered from 0, or tensors that are not patch numbers [B, L] of one shape.
        """
        prefix = f"masks/{step}/{kind}/"
        found = self.state(prefix)
        if not found:
            raise ValueError(f"the fixture has no tensor {prefix}0, so step {step} has no {kind} patches")
        count = self.meta.get(f"num_{kind}_blocks", len(found))
        if len(found) != count or any(str(i) not in found for i in range(count)):
            raise ValueError(f"{prefix} must have sets 0 to {count - 1}, not {few(found)}")
        tables = [found[str(i)] for i in range(count)]
        b, first = self.meta["batch_size"], tables[0]
        for i, table in enumerate(tables):
            if table.dtype not in (torch.int64, torch.int32) or table.ndim != 2 or len(table) != b or not table.numel():
                raise ValueError(
                    f"{prefix}{i} must be patch numbers [B, L] in int64 with B = {b} (batch_size of meta), not "
                    f"{table.dtype} of shape {tuple(table.shape)}"
                )
            lowest, highest = int(table.min()), int(table.max())
            if lowest < 0 or highest >= num_patches:
                bad = lowest if lowest < 0 else highest
                raise ValueError(f"{prefix}{i} has patch {bad}, but an image has patches 0 to {num_patches - 1}")
            if (table.sort(dim=1).values.diff(dim=1) == 0).any():
                raise ValueError(f"{prefix}{i} has a patch twice in one image")
            if table.shape != first.shape:
                raise ValueError(
                    f"{prefix}{i} has {table.shape[1]} patches per image, but {prefix}0 has {first.shape[1]}: the "
                    "released code truncates the sets of a step to one length"
                )
        return [table.long() for table in tables]


def read_fixture(path: str) -> Fixture:
    """Read both files of a fixture.

    Args:
        path: either file, or both without their suffix.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is not JSON or safetensors, or its settings or steps are invalid.
    """
    stem = re.sub(r"\.(json|safetensors)$", "", path)
    files = {suffix: Path(stem + suffix) for suffix in (".json", ".safetensors")}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; a fixture is NAME.json and NAME.safetensors")
    try:
        content = json.loads(files[".json"].read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{files['.json']} is not JSON: {error}") from error
    try:
        tensors = load_file(files[".safetensors"])
    except SafetensorError as error:
        raise ValueError(f"{files['.safetensors']} is not a safetensors file: {error}") from error
    for key in ("meta", "trajectory"):
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{files['.json']} has no {key!r}: it is not a recording of training steps")
    fixture = Fixture(content["meta"], content["trajectory"], tensors)
    _check_meta(fixture.meta)
    _check_trajectory(fixture)
    return fixture


def _check_meta(meta: Any) -> None:
    """Raise ValueError for wrong types and ranges, except of sizes, which the config checks."""
    if not isinstance(meta, dict):
        raise ValueError(f"the fixture's meta (={_short(meta)}) must be a mapping of settings")
    missing = [key for key in NEEDED if key not in meta]
    if missing:
        raise ValueError(f"the fixture's meta has no {', '.join(missing)}")

    def check(key: str, right: bool, what: str) -> None:
        if key in meta and not right:
            raise ValueError(f"{key} (={_short(meta[key])}) of the fixture's meta must be {what}")

    for key in NUMBERS:
        check(key, _is_number(meta[key]) and 0 <= meta[key] <= LARGEST, f"a number from 0 to {LARGEST}")
    for key in ("batch_size", "epochs", "iterations_per_epoch", "num_context_blocks", "num_target_blocks", "steps"):
        check(key, _is_count(meta.get(key, 1)), f"a whole number from 1 to {LARGEST}")
    ema = meta["ema"]
    in_range = isinstance(ema, list) and len(ema) == 2 and all(_is_number(m) and 0 <= m <= 1 for m in ema)
    check("ema", in_range, "two numbers from 0 to 1, the first and the last momentum")
    scale = meta.get("ipe_scale", 1.0)
    check(
        "ipe_scale",
        _is_number(scale) and 1 <= scale <= LARGEST,
        f"a number from 1 to {LARGEST}: jepa_kit has no schedule that ends before the run",
    )
    check(
        "final_lr",
        meta["final_lr"] <= meta["ref_lr"],
        f"at most ref_lr (={meta['ref_lr']}): jepa_kit has no learning rate that jumps up after the warm-up",
    )
    dtype = meta.get("dtype", "float64")
    known = isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES
    check("dtype", known, "torch.float32 or torch.float64")
    optimizer = meta.get("optimizer", "AdamW")
    check("optimizer", isinstance(optimizer, str) and "AdamW" in optimizer, "a text with AdamW, its betas and its eps")
    names = meta.get("no_weight_decay", [])
    check("no_weight_decay", isinstance(names, list) and all(isinstance(n, str) for n in names), "a list of names")
    check("step0_mean_squared_error", _is_number(meta.get("step0_mean_squared_error", 0.0)), "a number")


def _check_trajectory(fixture: Fixture) -> None:
    """Raise ValueError if steps are not in order, or if only some of them have a number."""
    steps = fixture.trajectory
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"the fixture's trajectory (={_short(steps)}) must be a list with a mapping for each step")
    for i, step in enumerate(steps):
        if not isinstance(step, dict):
            raise ValueError(f"trajectory[{i}] (={_short(step)}) must be a mapping with {', '.join(OF_A_STEP)}")
        if step.get("step", i) != i:
            raise ValueError(f"trajectory[{i}].step (={_short(step['step'])}) must be {i}: steps are in order, from 0")
        for name in OF_A_STEP:
            if name in step and not _is_number(step[name]):
                raise ValueError(f"trajectory[{i}].{name} (={_short(step[name])}) must be a number")
    for name in OF_A_STEP:
        lacking = [i for i, step in enumerate(steps) if name not in step]
        if len(lacking) == len(steps):
            fixture.not_recorded.append(f"{name} of each step")
        elif lacking:
            raise ValueError(
                f"trajectory[{lacking[0]}] has no {name}, which other steps have: all must have it, or none"
            )
    meta = fixture.meta
    planned = meta["epochs"] * meta["iterations_per_epoch"]
    if len(steps) > planned:
        raise ValueError(
            f"the fixture's trajectory has {len(steps)} steps, but epochs * iterations_per_epoch of meta is {planned}"
        )
    recorded = meta.get("steps", len(steps))
    if len(steps) != recorded and any(name.startswith("final/") for name in fixture.tensors):
        raise ValueError(
            f"the fixture's trajectory has {len(steps)} steps, but its final weights are those after steps "
            f"(={recorded}) of meta"
        )


def check_tensors(fixture: Fixture, image_size: tuple[int, int]) -> None:
    """Check the shape of images, and the precision of images and initial weights.

    Args:
        fixture: the recording.
        image_size: (h, w) of the config.

    Raises:
        ValueError: a shape or precision differs from ``meta``.
    """
    images, shape = fixture.take("images"), (fixture.meta["batch_size"], 3, *image_size)
    if images.ndim != 5 or not len(images) or images.shape[1:] != shape:
        raise ValueError(
            f"images must be [K, B, 3, h, w] with K of 1 or more and the rest {shape} as meta says, not "
            f"{tuple(images.shape)}"
        )
    for name, tensor in fixture.tensors.items():
        of_the_start = name == "images" or (name.startswith("init/") and not name.endswith("pos_embed"))
        if of_the_start and tensor.dtype != fixture.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but the run of the fixture's meta is in {fixture.dtype}")


def adamw_of(meta: Mapping[str, Any]) -> tuple[list[float], float]:
    """Return betas and eps of a text such as ``AdamW(betas=(0.9,0.999), eps=1e-8)``.

    Raises:
        ValueError: betas or eps is not followed by numbers.
    """
    text = meta.get("optimizer", "")
    number = r"([\d.]+(?:e[+-]?\d+)?)"
    found = {
        "betas": re.search(rf"betas\s*[=:]\s*[(\[]\s*{number}\s*,\s*{number}\s*[)\]]", text),
        "eps": re.search(rf"eps\s*[=:]\s*{number}", text),
    }
    for name, match in found.items():
        if name in text and match is None:
            raise ValueError(f"optimizer (={text!r}) of the fixture's meta must have numbers after {name}=")
    betas, eps = found["betas"], found["eps"]
    return [float(betas[1]), float(betas[2])] if betas else [0.9, 0.999], float(eps[1]) if eps else 1e-8


def few(names: Iterable[str], most: int = 8) -> str:
    """Return up to ``most`` of the names as text, and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    return whole or isinstance(value, float)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
