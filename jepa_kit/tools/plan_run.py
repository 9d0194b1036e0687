"""Plans a run before it is started: parameters, FLOP, memory, steps, data, network and GPU hours, by formula.

examples:
  # ViT-H/14 on 16 A100, at 40 % of their peak
  python tools/plan_run.py --config-file projects/ijepa/configs/released_in1k_vith14.yaml --gpus 16 --device a100

  # several numbers of GPUs, in a table
  python tools/plan_run.py --config-file projects/ijepa/configs/in1k_vitl16.yaml --gpus 8,64,512 --device h200 \\
      --peak-share 0.5

  # what share of the peak a known number of GPU hours means
  python tools/plan_run.py --config-file projects/ijepa/configs/released_in1k_vith14.yaml --gpus 16 --device a100 \\
      --gpu-hours 1152

  # a card that is not in the list, by its peak in TFLOP/s and its memory in GB; this machine's CPU, measured
  python tools/plan_run.py --config-file FILE --gpus 4 --peak 380 --memory 96
  python tools/plan_run.py --config-file projects/ijepa/configs/quickstart.yaml --gpus 1 --device cpu

  # for programs; with another batch
  python tools/plan_run.py --config-file FILE --gpus 32 --device h100 --json train.batch_size=4096

The formulas are in jepa_kit/planning/flops.py and memory.py, with what they leave out; docs/clusters.md says how well
they hold. Peaks are the makers' (dense), in train.precision.
Exit status: 0, or 2 for a mistake in the config or the command.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from jepa_kit.arguments import add_config, run_tool, tool_parser
from jepa_kit.config import Config, load_config
from jepa_kit.data.shards.resolve import indexed_samples
from jepa_kit.planning.device_specs import DEVICES, Device, this_cpu
from jepa_kit.planning.flops import FORMULA
from jepa_kit.planning.planner import Assumptions, Plan, describe, plan_run, table

IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("plan_run.py", __doc__)
    add_config(p)
    p.add_argument("--gpus", required=True, metavar="N[,N...]", help="devices, 1 to 4096; several make a table")
    p.add_argument("--device", choices=[*sorted(DEVICES), "cpu"], help="which; cpu measures this machine's")
    p.add_argument(
        "--peak", type=float, metavar="TFLOPS", help="of matrix products in the run's precision, dense (the device's)"
    )
    p.add_argument("--memory", type=float, metavar="GB", help="of each device, in 10^9 bytes (the device's)")
    p.add_argument(
        "--peak-share", type=float, default=0.4, metavar="SHARE", help="of the published peak that is reached (0.4)"
    )
    p.add_argument(
        "--gpu-hours", type=float, metavar="H", help="of a run that was made: says what share of the peak that is"
    )
    p.add_argument(
        "--samples", type=int, metavar="N", help=f"images of the data set (those of data.shards; else {IMAGENET:,})"
    )
    p.add_argument(
        "--bytes-per-image", type=float, default=110e3, metavar="N", help="encoded (110000, ImageNet's mean)"
    )
    p.add_argument(
        "--decode-ms", type=float, metavar="MS", help="time of one core for an image; tells the cores needed"
    )
    p.add_argument("--json", action="store_true", help="plain JSON")
    return p


def numbers(text: str) -> list[int]:
    """'8,64' -> [8, 64].

    Raises:
        ValueError: no numbers from 1 to 4096.
    """
    parts = text.split(",")
    if not all(part.isdigit() and 1 <= int(part) <= 4096 for part in parts):
        raise ValueError(f"--gpus (={text!r}) must be numbers from 1 to 4096, such as 8 or 8,64,512")
    return [int(part) for part in parts]


def device_of(name: str | None, peak: float | None, memory: float | None) -> Device:
    """The device of the list, this machine's CPU, or one of which peak (TFLOP/s) and memory (GB) are given.

    Raises:
        ValueError: neither a name nor both figures, or a figure that is not above 0 and finite.
    """
    for option, value in (("--peak", peak), ("--memory", memory)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option} (={value}) must be above 0 and finite")
    if name is None and (peak is None or memory is None):
        raise ValueError("--device must name a device, or --peak and --memory give its figures")
    if name is None:
        return Device("device as given", None, None, None, 0.0, "as given").given(peak, memory)
    return (this_cpu() if name == "cpu" else DEVICES[name]).given(peak, memory)


def samples_of(config: Config, given: int | None) -> int:
    """Return images of the data set: as given, by the index of the config's shards, or ImageNet's if it names none.

    Raises:
        ValueError: the shards have no index here; planning opens no data, and runs no `pipe:` command.
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
    """The share of the published peak at which the run takes so many GPU hours."""
    return plan.workload.flop / (gpu_hours * 3600 * given.device.peak(plan.precision) * 1e12)


def run(arguments: argparse.Namespace) -> None:
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
    if arguments.json:
        found = {"assumptions": asdict(given), "formula": FORMULA, "plans": [plan.to_dict() for plan in plans]}
        print(json.dumps(found | ({} if share is None else {"implied_share_of_peak": share}), indent=1))
        return
    print(describe(plans[0], given) if len(plans) == 1 else table(plans))
    if share is not None:
        print(f"{hours:,.0f} GPU hours would be {share:.1%} of the published peak")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("plan_run.py", lambda: run(parser().parse_intermixed_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
