"""Is this the real I-JEPA? Runs a recording of the released code again, through the toolkit's ordinary parts.

A fixture is two files: NAME.json (sizes and settings under ``meta``, and loss, learning rate, weight decay and momentum
of each step under ``trajectory``) and NAME.safetensors (weights before and after, images, masks, and what each
part gave and which gradients it got at step 0, under the released parameter names). Nothing about one fixture is
built in: sizes, number of blocks, schedules and precision are read from it.

    B images    N patches of an image    C contexts    M target blocks of an image    L patches of a set
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jepa_kit.config import Config, config_from_dict
from jepa_kit.engine.checkpoint import check_state
from jepa_kit.engine.optimizer import build_optimizer
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.interop.official import encoder_from_official, predictor_from_official, predictor_name_to_official
from jepa_kit.recipe import JEPA, build_recipe, patch_grid_of
from jepa_kit.structures import Grid, MaskBatch, PatchSets, SetLengths

EXAMPLE = """example:
  python projects/ijepa/check_parity.py tests/fixtures/released_step
  python projects/ijepa/check_parity.py my_run.json --tolerance 1e-6
"""

NEEDED = (
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "predictor_embed_dim", "predictor_depth"),
    *("batch_size", "epochs", "iterations_per_epoch", "warmup_epochs"),
    *("start_lr", "ref_lr", "final_lr", "wd", "final_wd", "ema"),
)
"""What ``meta`` must say; what else it may say has the released code's default."""


@dataclass
class Fixture:
    """A recording of the released code.

    Args:
        meta: sizes and settings.
        trajectory: for each step its loss, lr, weight_decay and momentum.
        tensors: by name; those that were looked at are in ``used``.
    """

    meta: dict[str, Any]
    trajectory: list[dict[str, float]]
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.meta.get("dtype", "torch.float64").removeprefix("torch."))

    def take(self, name: str) -> Tensor:
        """A tensor by name; ValueError where there is none."""
        if name not in self.tensors:
            raise ValueError(f"the fixture has no tensor {name!r}; it has {_few(self.tensors)}")
        self.used.add(name)
        return self.tensors[name]

    def state(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin with ``prefix``, without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.take(name) for name in names}

    def sets(self, step: int, kind: str) -> list[Tensor]:
        """The sets of a kind (context, target) at a step: a list of [B, L]."""
        prefix = f"masks/{step}/{kind}/"
        found = self.state(prefix)
        if not found:
            raise ValueError(f"the fixture has no tensor {prefix}0, so step {step} has no {kind} patches")
        return [found[str(i)] for i in range(len(found))]


def read_fixture(path: str) -> Fixture:
    """Reads both files of a fixture, named by either of them or by what they share.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file that is not JSON or safetensors, or without ``meta`` and ``trajectory``.
    """
    stem = re.sub(r"\.(json|safetensors)$", "", path)
    files = {suffix: Path(stem + suffix) for suffix in (".json", ".safetensors")}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; a fixture is NAME.json and NAME.safetensors")
    try:
        content = json.loads(files[".json"].read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{files['.json']} is not JSON: {error}") from error
    try:
        tensors = load_file(files[".safetensors"])
    except SafetensorError as error:
        raise ValueError(f"{files['.safetensors']} is not a safetensors file: {error}") from error
    for key in ("meta", "trajectory"):
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{files['.json']} has no {key!r}: it is not a recording of training steps")
    return Fixture(content["meta"], content["trajectory"], tensors)


def config_of(meta: Mapping[str, Any]) -> Config:
    """The fixture's settings as an ordinary config.

    Raises:
        ValueError: a setting that the fixture lacks, or that the toolkit refuses.
    """
    missing = [key for key in NEEDED if key not in meta]
    if missing:
        raise ValueError(f"the fixture's meta has no {', '.join(missing)}")
    eps = meta.get("layer_norm_eps", 1e-6)
    optimizer = meta.get("optimizer", "")
    return config_from_dict(
        {
            # The masks are the fixture's own.
            "masker": {"name": "multiblock"},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "mlp_ratio": meta.get("mlp_ratio", 4.0),
                "norm_eps": eps,
            },
            "predictor": {
                "name": "vit",
                "width": meta["predictor_embed_dim"],
                "depth": meta["predictor_depth"],
                "num_heads": meta.get("predictor_num_heads", meta["num_heads"]),
                "mlp_ratio": meta.get("mlp_ratio", 4.0),
                "norm_eps": eps,
            },
            "target": {"name": "representation"},
            "loss": {"name": "smooth_l1"},
            "target_update": {"name": "ema", "momentum": list(meta["ema"])},
            "data": {"image_size": meta["img_size"]},
            "optim": {
                "lr": meta["ref_lr"],
                "start_lr": meta["start_lr"],
                "final_lr": meta["final_lr"],
                "warmup_epochs": meta["warmup_epochs"],
                "weight_decay": [meta["wd"], meta["final_wd"]],
                "betas": _numbers(r"betas=\(([^)]*)\)", optimizer, [0.9, 0.999]),
                "eps": _numbers(r"eps=([\d.e+-]+)", optimizer, [1e-8])[0],
                "stretch": meta.get("ipe_scale", 1.0),
            },
            "train": {
                "batch_size": meta["batch_size"],
                "epochs": meta["epochs"],
                "steps_per_epoch": meta["iterations_per_epoch"],
                "precision": "float32",
                "attention": "auto",
            },
        },
        source="the fixture's meta",
    )


def _numbers(pattern: str, text: str, default: list[float]) -> list[float]:
    found = re.search(pattern, text)
    return [float(x) for x in found[1].split(",")] if found else default


def masks_of(fixture: Fixture, step: int, grid: Grid) -> MaskBatch:
    """The masks of a step, in the released order: block by block, then context by context, then image by image."""
    contexts, targets = fixture.sets(step, "context"), fixture.sets(step, "target")
    b, c, m = len(contexts[0]), len(contexts), len(targets)
    context_of = torch.arange(c * b).repeat(m)
    return MaskBatch(
        context=_pack(contexts),
        targets=_pack([block for block in targets for _ in range(c)]),
        grid=grid,
        context_of=context_of,
    )


def _pack(sets: list[Tensor]) -> PatchSets:
    """Tables [B, L_i], one after another."""
    b = len(sets[0])
    lengths = SetLengths([s.shape[1] for s in sets for _ in range(b)])
    return PatchSets(torch.cat([s.flatten() for s in sets]), torch.arange(b).repeat(len(sets)), lengths)


@dataclass
class Report:
    """Differences by quantity; NaN counts as a difference."""

    tolerance: float
    rows: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, quantity: str, ours: Tensor | float, released: Tensor | float) -> None:
        """Compares two values; several under one name keep the largest difference.

        The relative difference is the largest absolute one over the largest magnitude of the released tensor.
        """
        x, y = (torch.as_tensor(v, dtype=torch.float64).detach().flatten() for v in (ours, released))
        if x.shape != y.shape:
            raise ValueError(f"{quantity} has {x.numel()} numbers, but the fixture has {y.numel()}")
        gap, size = float((x - y).abs().max()), float(y.abs().max())
        relative = gap / size if size else (0.0 if gap == 0 else float("inf"))
        old = self.rows.get(quantity, (0.0, 0.0))
        self.rows[quantity] = (_worse(gap, old[0]), _worse(relative, old[1]))

    def failed(self) -> list[str]:
        return [name for name, gaps in self.rows.items() if not all(gap <= self.tolerance for gap in gaps)]

    def print(self) -> None:
        width = max(map(len, self.rows))
        print(f"{'quantity':{width}}  {'absolute':>9}  {'relative':>9}")
        failed = set(self.failed())
        for name, (absolute, relative) in self.rows.items():
            print(f"{name:{width}}  {absolute:9.1e}  {relative:9.1e}{'  <-- above' if name in failed else ''}")


def _worse(a: float, b: float) -> float:
    return a if a != a or a > b else b


def compare_first_step(fixture: Fixture, jepa: JEPA, grid: Grid, report: Report) -> None:
    """What each part gives at step 0, and the gradient of every parameter."""
    images = fixture.take("images")[0]
    masks = masks_of(fixture, 0, grid)
    assert jepa.target_encoder is not None
    has = fixture.tensors.__contains__
    with torch.no_grad():
        if has("step0/encoder_full_output"):
            report.add("encoder, all patches", jepa.encoder(images), fixture.take("step0/encoder_full_output"))
        if has("step0/target_encoder_output"):
            full, recorded = jepa.target_encoder(images), fixture.take("step0/target_encoder_output")
            report.add("target encoder", full, recorded)
    out = jepa(images, masks)
    out.loss.backward()
    report.add("encoder, context", out.prediction.context, fixture.take("step0/context_encoder_output"))
    report.add("target", out.prediction.target, fixture.take("step0/target"))
    report.add("prediction", out.prediction.prediction, fixture.take("step0/prediction"))
    report.add("loss, step 0", out.loss, fixture.trajectory[0]["loss"])
    for name, parameter in released_parameters(jepa).items():
        if has(f"step0/grad/{name}"):
            assert parameter.grad is not None
            report.add(f"gradient {name}", parameter.grad, fixture.take(f"step0/grad/{name}"))
    jepa.zero_grad(set_to_none=True)


def released_parameters(jepa: JEPA) -> dict[str, Tensor]:
    """All trained parameters under the released names, ``encoder/`` and ``predictor/`` before them."""
    encoder: dict[str, Tensor] = {f"encoder/{name}": p for name, p in jepa.encoder.named_parameters()}
    return encoder | {
        f"predictor/{predictor_name_to_official(name)}": p for name, p in jepa.predictor.named_parameters()
    }


def compare_run(fixture: Fixture, jepa: JEPA, config: Config, grid: Grid, report: Report) -> None:
    """Every step's schedules and loss, then the final weights."""
    optim, train = config.optim, config.train
    assert train.steps_per_epoch is not None
    schedule = Schedule(
        epochs=train.epochs,
        steps_per_epoch=train.steps_per_epoch,
        lr=optim.lr,
        start_lr=optim.start_lr,
        final_lr=optim.final_lr,
        warmup_epochs=optim.warmup_epochs,
        weight_decay=optim.weight_decay,
        momentum=jepa.momentum,
        stretch=optim.stretch,
    )
    optimizer = build_optimizer(jepa, betas=optim.betas, eps=optim.eps)
    images = fixture.take("images")
    for step, recorded in enumerate(fixture.trajectory):
        hyper = schedule(step)
        for name in ("lr", "weight_decay", "momentum"):
            report.add(f"schedule of {name}", getattr(hyper, name), recorded[name])
        out = train_step(jepa, optimizer, hyper, images[step % len(images)], masks_of(fixture, step, grid))
        report.add(f"loss, step {step}", out.loss, recorded["loss"])
    trained = released_parameters(jepa)
    assert jepa.target_encoder is not None
    trained |= {f"target_encoder/{name}": p for name, p in jepa.target_encoder.named_parameters()}
    for name, recorded_weight in fixture.state("final/").items():
        if not name.endswith("pos_embed"):
            report.add(f"final {name}", trained[name], recorded_weight)


def load_first_weights(fixture: Fixture, jepa: JEPA, report: Report) -> None:
    """The weights before step 0; position tables are compared, not loaded, as ours come from the formula."""
    rename = {
        "encoder": encoder_from_official,
        "predictor": predictor_from_official,
        "target_encoder": encoder_from_official,
    }
    states = {part: fixture.state(f"init/{part}/") for part in rename}
    for part, ours in rename.items():
        module, state = getattr(jepa, part), ours(states[part])
        check_state(module.state_dict(), state, f"the {part} of the fixture's meta")
        module.load_state_dict(state)
    for part, name in (("encoder", "pos_embed"), ("predictor", "predictor_pos_embed")):
        if name in states[part]:
            report.add(f"positions of the {part}", getattr(jepa, part).pos_embed, states[part][name])


def check(fixture: Fixture, tolerance: float) -> Report:
    """Runs the whole fixture.

    Raises:
        ValueError: a fixture that lacks what is needed, or whose shapes do not fit its own settings.
    """
    report = Report(tolerance)
    config = config_of(fixture.meta)
    jepa = build_recipe(config).to(fixture.dtype).train()
    load_first_weights(fixture, jepa, report)
    grid = patch_grid_of(config)
    compare_first_step(fixture, jepa, grid, report)
    compare_run(fixture, jepa, config, grid, report)
    return report


def _few(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def main(argv: list[str] | None = None) -> int:
    """Prints every difference; 0 where all are within the tolerance, 1 where one is not, 2 for a bad fixture."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fixture", metavar="FIXTURE", help="NAME.json, NAME.safetensors, or NAME")
    parser.add_argument(
        "--tolerance", type=float, default=1e-8, help="largest absolute and relative difference (default: 1e-8)"
    )
    args = parser.parse_args(argv)
    try:
        fixture = read_fixture(args.fixture)
        report = check(fixture, args.tolerance)
    except (FileNotFoundError, ValueError) as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    report.print()
    left = sorted(set(fixture.tensors) - fixture.used)
    if left:
        print(f"\nin the fixture but not compared: {_few(left)}")
    if not fixture.state("final/"):
        print("\nthe fixture has no final weights: they are not compared")
    failed = report.failed()
    verdict = (
        f"{len(failed)} of {len(report.rows)} quantities differ by more than" if failed else "all quantities within"
    )
    print(f"\n{len(fixture.trajectory)} steps in {fixture.dtype}: {verdict} {args.tolerance:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
