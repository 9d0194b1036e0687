"""Compute parameters, FLOP, memory, steps, data, network traffic and GPU hours of a run before it starts.

examples:
  # ViT-H/14 on 16 A100, at 40 % of their peak
  python tools/plan_run.py --config-file projects/ijepa/configs/released_in1k_vith14.yaml --gpus 16 --device a100

  # a table for several numbers of GPUs
  python tools/plan_run.py --config-file projects/ijepa/configs/in1k_vitl16.yaml --gpus 8,64,512 --device h200 \\
      --peak-share 0.5

  # the fraction of the peak that a known number of GPU hours implies
  python tools/plan_run.py --config-file projects/ijepa/configs/released_in1k_vith14.yaml --gpus 16 --device a100 \\
      --gpu-hours 1152

  # an unlisted device, by its peak in TFLOP/s and its memory in GB; the CPU of this machine, which is measured
  python tools/plan_run.py --config-file FILE --gpus 4 --peak 380 --memory 96
  python tools/plan_run.py --config-file projects/ijepa/configs/quickstart.yaml --gpus 1 --device cpu

  # output as JSON; with another batch size
  python tools/plan_run.py --config-file FILE --gpus 32 --device h100 --json train.batch_size=4096

The formulas, and what they leave out, are in jepa_kit/planning/flops.py and memory.py; docs/clusters.md compares them
with measurements. Peaks are those that the vendor publishes for dense products in train.precision.
Exit status: 0, 2 for a mistake in the config or the command, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from jepa_kit.arguments import Show, add_config, add_json, run_tool, run_with_json, tool_parser
from jepa_kit.config import Config, load_config
from jepa_kit.data.shards.resolve import indexed_samples
from jepa_kit.planning.device_specs import DEVICES, Device, this_cpu
from jepa_kit.planning.flops import FORMULA
from jepa_kit.planning.planner import Assumptions, Plan, describe, plan_run, table

IMAGENET = 1_281_167
"""Number of training images of ImageNet-1k."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("plan_run.py", __doc__)
    add_config(p)
    p.add_argument(
        "--gpus", required=True, metavar="N[,N...]", help="number of devices, 1 to 4096; several give a table"
    )
    p.add_argument("--device", choices=[*sorted(DEVICES), "cpu"], help="device; cpu measures the CPU of this machine")
    p.add_argument(
        "--peak",
        type=float,
        metavar="TFLOPS",
        help="peak of dense products in the run's precision (default: the device's)",
    )
    p.add_argument("--memory", type=float, metavar="GB", help="per device, in 10^9 bytes (default: the device's)")
    p.add_argument(
        "--peak-share",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="fraction of the peak that is reached (default: 0.4)",
    )
    p.add_argument(
        "--gpu-hours",
        type=float,
        metavar="H",
        help="of a measured run: prints the fraction of the peak that it reached",
    )
    p.add_argument("--samples", type=int, metavar="N", help=f"images (default: those of data.shards, or {IMAGENET:,})")
    p.add_argument(
        "--bytes-per-image",
        type=float,
        default=110e3,
        metavar="N",
        help="encoded size (default: 110000, the mean of ImageNet)",
    )
    p.add_argument(
        "--decode-ms", type=float, metavar="MS", help="time of one core per image; gives the number of cores needed"
    )
    add_json(p)
    return p


def numbers(text: str) -> list[int]:
    """Return the numbers of a list such as '8,64'.

    Raises:
        ValueError: one is not from 1 to 4096.
    """
    parts = text.split(",")
    if not all(part.isdigit() and 1 <= int(part) <= 4096 for part in parts):
        raise ValueError(f"--gpus (={text!r}) must be numbers from 1 to 4096, such as 8 or 8,64,512")
    return [int(part) for part in parts]


def device_of(name: str | None, peak: float | None, memory: float | None) -> Device:
    """Return a listed device, the CPU of this machine, or a device with this peak (TFLOP/s) and memory (GB).

    Raises:
        ValueError: neither a name nor both numbers are given, or a number is not above 0 and finite.
    """
    for option, value in (("--peak", peak), ("--memory", memory)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option} (={value}) must be above 0 and finite")
    if name is None and (peak is None or memory is None):
        raise ValueError("--device must name a device, or --peak and --memory must be given")
    if name is None:
        return Device("device as given", None, None, None, 0.0, "as given").given(peak, memory)
    return (this_cpu() if name == "cpu" else DEVICES[name]).given(peak, memory)


def samples_of(config: Config, given: int | None) -> int:
    """Return the number of images: ``given``, or that of the config's shards, or ImageNet's if it has none.

    Raises:
        ValueError: the shards have no index on this machine; planning opens no data, and runs no `pipe:` command.
    """
    if given is not None:
        return given
    if config.data.shards is None:
        return IMAGENET
    found = indexed_samples(config.data.shards)
    if found is None:
        raise ValueError(
            f"--samples N must be given: data.shards (={config.data.shards!r}) has no index.json on this machine, and "
            "planning opens no data"
        )
    return found


def implied_share(plan: Plan, given: Assumptions, gpu_hours: float) -> float:
    """Return the fraction of the published peak at which the run takes so many GPU hours."""
    return plan.workload.flop / (gpu_hours * 3600 * given.device.peak(plan.precision) * 1e12)


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Print the plan."""
    gpus = numbers(arguments.gpus)
    hours = arguments.gpu_hours
    if hours is not None and not (hours > 0 and math.isfinite(hours)):
        raise ValueError(f"--gpu-hours (={hours}) must be above 0 and finite")
    config = load_config(arguments.config_file, arguments.overrides, trust_imports=arguments.trust_imports)
    given = Assumptions(
        device=device_of(arguments.device, arguments.peak, arguments.memory),
        peak_share=arguments.peak_share,
        samples=samples_of(config, arguments.samples),
        bytes_per_image=arguments.bytes_per_image,
        decode_ms=arguments.decode_ms,
    )
    plans = plan_run(config, gpus, given)
    share = None if hours is None else implied_share(plans[0], given, hours)
    found = {"assumptions": asdict(given), "formula": FORMULA, "plans": [asdict(plan) for plan in plans]}
    text = describe(plans[0], given) if len(plans) == 1 else table(plans)
    if share is not None:
        text += f"\n{hours:,.0f} GPU hours would be {share:.1%} of the published peak"
    show(text, found | ({} if share is None else {"implied_share_of_peak": share}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("plan_run.py", lambda: run_with_json(run, parser().parse_intermixed_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
