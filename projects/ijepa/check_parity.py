"""Repeat a recorded training run of the released I-JEPA code with the parts of jepa_kit, and compare all numbers.

A fixture is two files, NAME.json and NAME.safetensors (see parity_fixture.py). It gives sizes, number of blocks,
schedules and precision. All quantities in it are compared; those that it lacks are listed.

    B images    N patches of an image    C contexts    M target blocks of an image    L patches of a set    D width
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "projects.ijepa"  # for the relative import

import torch
from torch import Tensor

from jepa_kit.arguments import run_tool
from jepa_kit.config import Config, config_from_dict
from jepa_kit.distributed.collectives import World, choose_device
from jepa_kit.engine.checkpoint.format import check_state
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.from_config import build_recipe, patch_grid_of
from jepa_kit.interop.official import TABLE, encoder_from_official, predictor_from_official, predictor_name_to_official
from jepa_kit.recipe import JEPA
from jepa_kit.structures import Grid, MaskBatch, PatchSets, View
from jepa_kit.trials.recorded import tolerance_of

from .parity_fixture import DTYPES, Fixture, adamw_of, check_tensors, few, read_fixture

EXAMPLE = """example:
  python projects/ijepa/check_parity.py tests/fixtures/released_step
  python projects/ijepa/check_parity.py my_run.json --tolerance 1e-6
  python projects/ijepa/check_parity.py tests/fixtures/released_step --device cuda --dtype float32
"""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
"""Default of the largest absolute and relative difference. On a CPU, the recording in tests/fixtures (float64) is
reproduced within 3e-15 in float64 and within 1.0e-6 (relative: 4.0e-7) in float32, whose rounding error is 6e-8."""

ANY_SCHEDULE = {"warmup_epochs": 0, "start_lr": 0.0, "ref_lr": 1e-3, "final_lr": 0.0}
"""Replaces the fixture's schedule in the config, whose checks it may fail, as by a warm-up longer than the run."""


def config_of(meta: Mapping[str, Any]) -> Config:
    """Return the config of the fixture's settings.

    Raises:
        ValueError: a setting that jepa_kit rejects.
    """
    norm_eps = meta.get("layer_norm_eps", 1e-6)
    betas, eps = adamw_of(meta)
    return config_from_dict(
        {
            # not used: the masks come from the fixture
            "masker": {"name": "multiblock"},
            "encoder": {
                "name": "vit",
                "patch_size": meta["patch_size"],
                "embed_dim": meta["embed_dim"],
                "depth": meta["depth"],
                "num_heads": meta["num_heads"],
                "mlp_ratio": meta.get("mlp_ratio", 4.0),
                "norm_eps": norm_eps,
            },
            "predictor": {
                "name": "vit",
                "width": meta["predictor_embed_dim"],
                "depth": meta["predictor_depth"],
                "num_heads": meta.get("predictor_num_heads", meta["num_heads"]),
                "mlp_ratio": meta.get("mlp_ratio", 4.0),
                "norm_eps": norm_eps,
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
                "betas": betas,
                "eps": eps,
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


def masks_of(fixture: Fixture, step: int, grid: Grid) -> MaskBatch:
    """Return the masks of a step in the released order: by target block, then by context, then by image."""
    contexts, targets = (fixture.sets(step, kind, grid[0] * grid[1]) for kind in ("context", "target"))
    b, c, m = len(contexts[0]), len(contexts), len(targets)
    context_of = torch.arange(c * b).repeat(m)
    return MaskBatch(
        context=_pack(contexts),
        targets=_pack([block for block in targets for _ in range(c)]),
        grid=grid,
        context_of=context_of,
    )


def _pack(sets: list[Tensor]) -> PatchSets:
    """Concatenate sets [B, L_i]."""
    return PatchSets.pack([patches for s in sets for patches in s], torch.arange(len(sets[0])).repeat(len(sets)))


@dataclass
class Report:
    """Largest absolute and relative difference of each quantity; NaN counts as a difference."""

    tolerance: float
    rows: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, quantity: str, ours: Tensor | float, released: Tensor | float) -> None:
        """Compare two values; the largest difference of a quantity is kept.

        The relative difference is the largest absolute one over the largest magnitude of the released tensor.

        Raises:
            ValueError: the shapes differ, apart from dimensions of size 1.
        """
        x, y = (torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in (ours, released))
        if x.squeeze().shape != y.squeeze().shape:
            raise ValueError(f"{quantity} has shape {tuple(x.shape)}, but in the fixture {tuple(y.shape)}")
        x, y = x.flatten(), y.flatten()
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


def compare_first_step(fixture: Fixture, jepa: JEPA, images: Tensor, masks: MaskBatch, report: Report) -> None:
    """Compare the outputs of all parts at step 0 for images [B, 3, h, w], and the gradient of every parameter."""
    assert jepa.target_encoder is not None
    with torch.no_grad():
        everywhere = jepa.encoder(images), jepa.target_encoder(images)
    out = jepa(View(images, masks))
    out.loss.backward()
    made = out.prediction
    n, context, target = math.prod(masks.grid), masks.context.lengths.longest, masks.targets.lengths.longest
    outputs = {
        "encoder_full_output": ("encoder, all patches", everywhere[0], n),
        "context_encoder_output": ("encoder, context", made.context, context),
        "target_encoder_output": ("target encoder", everywhere[1], n),
        "target": ("target", made.target, target),
        "prediction": ("prediction", made.prediction, target),
    }
    for name, (quantity, tokens, length) in outputs.items():
        recorded = fixture.find(f"step0/{name}", quantity)
        if recorded is not None:
            report.add(quantity, tokens.unflatten(0, (-1, length)), recorded)  # packed [S * L, D] -> [S, L, D]
    if "step0_mean_squared_error" in fixture.meta:
        error = (made.prediction - made.target).square().mean()
        report.add("mean squared error, step 0", error, fixture.meta["step0_mean_squared_error"])
    parameters = released_parameters(jepa)
    for part in ("encoder", "predictor"):
        gradients = fixture.group(f"step0/grad/{part}/", parameters[part].keys(), f"gradients of the {part}")
        for name, gradient in gradients.items():
            ours = parameters[part][name].grad
            assert ours is not None
            report.add(f"gradient {part}/{name}", ours, gradient)
    jepa.zero_grad(set_to_none=True)


def released_parameters(jepa: JEPA) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of encoder, predictor and target encoder by their released names."""
    assert jepa.target_encoder is not None
    return {
        "encoder": dict(jepa.encoder.named_parameters()),
        "predictor": {predictor_name_to_official(name): p for name, p in jepa.predictor.named_parameters()},
        "target_encoder": dict(jepa.target_encoder.named_parameters()),
    }


def schedule_of(meta: Mapping[str, Any], jepa: JEPA) -> Schedule:
    """Return the schedules of the fixture's settings."""
    return Schedule(
        epochs=meta["epochs"],
        steps_per_epoch=meta["iterations_per_epoch"],
        lr=meta["ref_lr"],
        start_lr=meta["start_lr"],
        final_lr=meta["final_lr"],
        warmup_epochs=meta["warmup_epochs"],
        weight_decay=(meta["wd"], meta["final_wd"]),
        momentum=jepa.momentum,
        stretch=meta.get("ipe_scale", 1.0),
    )


def compare_run(
    fixture: Fixture, jepa: JEPA, config: Config, images: Tensor, masks: Sequence[MaskBatch], report: Report
) -> None:
    """Compare schedules and loss of every step for images [K, B, 3, h, w], then the final weights."""
    schedule = schedule_of(fixture.meta, jepa)
    optimizer = optimizer_of(jepa, config.optim)
    parameters = released_parameters(jepa)
    if "no_weight_decay" in fixture.meta:
        plain = {id(p) for group in optimizer.param_groups if not group["decayed"] for p in group["params"]}
        names = {
            f"{part}/{name}" for part, of_part in parameters.items() for name, p in of_part.items() if id(p) in plain
        }
        report.add("parameters without weight decay", len(names ^ set(fixture.meta["no_weight_decay"])), 0.0)
    for step, recorded in enumerate(fixture.trajectory):
        hyper = schedule(step)
        out = train_step(jepa, optimizer, hyper, [View(images[step % len(images)], masks[step])])
        for name in ("lr", "weight_decay", "momentum"):
            if name in recorded:
                report.add(f"schedule of {name}", getattr(hyper, name), recorded[name])
        if "loss" in recorded:
            report.add(f"loss, step {step}", out.loss, recorded["loss"])
    for part, of_part in parameters.items():
        weights = fixture.group(f"final/{part}/", of_part.keys(), f"final weights of the {part}")
        for name, weight in weights.items():
            report.add(f"final {part}/{name}", of_part[name], weight)


def load_first_weights(fixture: Fixture, jepa: JEPA, report: Report) -> None:
    """Load the weights before step 0; compare position tables, which jepa_kit computes from the formula."""
    for part in ("encoder", "predictor", "target_encoder"):
        convert = predictor_from_official if part == "predictor" else encoder_from_official
        module, state = getattr(jepa, part), convert(fixture.state(f"init/{part}/"))
        check_state(module.state_dict(), state, f"the {part} of the fixture's meta (checkpoint: init/{part}/)")
        module.load_state_dict(state)
        tables = [name for when in ("init", "final") if (name := f"{when}/{part}/{TABLE[part]}") in fixture.tensors]
        for name in tables:
            report.add(f"positions of the {part}", module.pos_embed, fixture.take(name))
        if not tables:
            fixture.not_recorded.append(f"positions of the {part} (init/{part}/{TABLE[part]})")


def check(
    fixture: Fixture, *, device: torch.device, dtype: torch.dtype | None = None, tolerance: float | None = None
) -> Report:
    """Run the whole fixture and return all differences from it.

    Args:
        fixture: the recording; its numbers are compared without conversion, for any ``dtype``.
        device: runs the steps.
        dtype: of the steps; None for the fixture's.
        tolerance: largest absolute and relative difference; None for that of ``TOLERANCE``.

    Raises:
        ValueError: the fixture is incomplete, or a tensor contradicts its settings.
    """
    dtype = dtype or fixture.dtype
    report = Report(TOLERANCE[dtype] if tolerance is None else tolerance)
    config = config_of(fixture.meta | ANY_SCHEDULE)
    check_tensors(fixture, config.data.image_size)
    grid = patch_grid_of(config)
    masks = [masks_of(fixture, step, grid).to(device) for step in range(len(fixture.trajectory))]
    images = fixture.take("images").to(device, dtype)
    jepa = build_recipe(config).to(device, dtype).train()
    load_first_weights(fixture, jepa, report)
    positions = len(report.rows)
    compare_first_step(fixture, jepa, images[0], masks[0], report)
    compare_run(fixture, jepa, config, images, masks, report)
    if len(report.rows) == positions:
        raise ValueError("the fixture has nothing of a run to compare: no step0/, no final/, no numbers of a step")
    strange = [name for name in fixture.left() if name.startswith(("init/", "step0/grad/", "final/"))]
    if strange:
        raise ValueError(f"the fixture has {few(strange)}: no parameter has this name")
    return report


def run(argv: list[str] | None) -> int:
    """Print every difference; return 1 if one exceeds the tolerance, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fixture", metavar="FIXTURE", help="NAME.json, NAME.safetensors, or NAME")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N, or auto")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the steps (default: that of the fixture)")
    parser.add_argument(
        "--tolerance",
        type=tolerance_of,
        help="largest absolute and relative difference (default: 1e-8 in float64, 1e-5 in float32)",
    )
    args = parser.parse_args(argv)
    device = choose_device(args.device, World())
    fixture = read_fixture(args.fixture)
    dtype = DTYPES[args.dtype] if args.dtype else fixture.dtype
    report = check(fixture, device=device, dtype=dtype, tolerance=args.tolerance)
    report.print()
    if fixture.not_recorded:
        print("\nnot in the fixture, so not compared:")
        print("\n".join(f"  {quantity}" for quantity in fixture.not_recorded))
    if left := fixture.left():
        print(f"\nin the fixture, but not compared: {few(left)}")
    failed = report.failed()
    verdict = (
        f"{len(failed)} of {len(report.rows)} quantities differ by more than" if failed else "all quantities within"
    )
    print(f"\n{len(fixture.trajectory)} steps in {dtype} on {device.type}: {verdict} {report.tolerance:g}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return its exit status: 0, 1 for a difference, 2 for a bad fixture."""
    return run_tool("check_parity", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
