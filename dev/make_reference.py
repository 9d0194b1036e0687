#!/usr/bin/env python
"""Make a reference run of a finished run and its evaluation: a folder in reference/ that ships with jepa_kit.

It gets the weights in float16 without the optimiser, the config, at most 300 lines of metrics.jsonl, curves.png, the
results, and a card. Folders of this machine are left out of all of them. The same run gives the same bytes.

examples:
  python tools/eval_net.py --checkpoint output/scenes --protocol '{name: logistic, subsets: [all]}' \\
      --protocol '{name: logistic, subsets: [all], pooling: quarters}' --layers last4 --output output/scenes.json
  python dev/make_reference.py output/scenes --name ijepa_scenes --evaluation output/scenes.json \\
      --data 'python tools/make_shards.py synthetic:scenes scenes/train --num-scenes 8064 --image-size 64' \\
      --machine 'one core of an AMD EPYC, AVX-512 bf16, no AMX'

docs/evaluation.md, "Reference runs", has their uses. Exit status: 0, 2 for a mistake in the command or the files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jepa_kit.arguments import run_tool, tool_parser

LINES = 300
"""Most lines of metrics.jsonl."""
DIGITS = 6
"""Significant digits in these lines."""
MOST = 3_000_000
"""Bytes of the weights."""
NEEDED = ("untrained", "pixels", "patches")
"""Baselines that an evaluation must have."""


def parser() -> argparse.ArgumentParser:
    p = tool_parser("make_reference.py", __doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    p.add_argument("--name", required=True, help="METHOD_DATA, as ijepa_scenes; an earlier one is replaced")
    p.add_argument("--evaluation", required=True, nargs="+", metavar="FILE", help="results of tools/eval_net.py")
    p.add_argument(
        "--data", required=True, action="append", metavar="COMMAND", help="makes the shards; may be repeated"
    )
    p.add_argument("--machine", required=True, help="that trained: processor, cores, instruction set")
    p.add_argument("--encoder-only", action="store_true", help="leave out what is not the evaluated encoder")
    p.add_argument("--output", type=Path, default=ROOT / "reference", metavar="DIR", help="default: reference/")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool("make_reference.py", lambda: run(parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Write the folder; print its files."""
    from jepa_kit.evaluation.feature_sources import encoder_named
    from jepa_kit.evaluation.features import latest_checkpoint, load_run
    from jepa_kit.interop.native import PARTS
    from jepa_kit.interop.reference import read_checkpoint, write_weights
    from jepa_kit.run_folder import FACTS, WEIGHTS

    source, name = arguments.run, arguments.name
    if not re.fullmatch(r"[a-z0-9]+_[a-z0-9]+", name):
        raise ValueError(f"--name (={name!r}) must be METHOD_DATA in lower case, as ijepa_scenes")
    file = latest_checkpoint(source)
    loaded = load_run(file, trust_imports=True)
    facts = json.loads((source / FACTS).read_text(encoding="utf-8"))
    if loaded.step != facts["steps"]:
        raise ValueError(f"{source} is not finished: it has {loaded.step:,} of {facts['steps']:,} updates")
    content = evaluation(arguments.evaluation, file, name)

    checkpoint = read_checkpoint(file)
    config = without_folders(checkpoint.config, name)
    model, encoder = checkpoint.model, encoder_named(loaded.jepa)
    if arguments.encoder_only:
        model = {key: value for key, value in model.items() if key.startswith(f"{PARTS[encoder]}.")}
    folder = arguments.output / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = replace(checkpoint, model=model, config=config, origin={"licence": "Apache-2.0"}, position={})
    write_weights(kept, folder / WEIGHTS)
    if (size := (folder / WEIGHTS).stat().st_size) > MOST:
        (folder / WEIGHTS).unlink()
        hint = "" if arguments.encoder_only else "; --encoder-only keeps the evaluated encoder alone"
        raise ValueError(f"{WEIGHTS} would have {size / 1e6:.1f} MB, but at most {MOST / 1e6:.0f} MB are allowed{hint}")
    write_rest(folder, source, config, content)
    text = card(folder, arguments, encoder, facts, sum(value.numel() for value in loaded.jepa.encoder.parameters()))
    (folder / "README.md").write_text(text, encoding="utf-8")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>10,}  {path}")


def without_folders(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a config in which data have the last two parts of their folders, and other folders are the defaults.

    Raises:
        ValueError: another option is the path of a file or folder on this machine.
    """
    plain: dict[str, Any] = json.loads(json.dumps(config))
    for section in ("data", "evaluate"):
        if isinstance(shards := plain.get(section, {}).get("shards"), str):
            plain[section]["shards"] = short(shards)
    plain["data"]["cache"] = None
    plain["train"]["output_dir"] = f"output/{name}"
    plain["checkpoint"]["dir"] = None
    check_paths(plain, "the config")
    return plain


def short(path: str) -> str:
    """Return the last two parts of a path."""
    return "/".join(Path(path).parts[-2:]).lstrip("/")


def check_paths(value: Any, place: str) -> None:
    """Raise ValueError for a text that is an absolute path."""
    if isinstance(value, str) and value.startswith(("/", "~", "file:")):
        raise ValueError(f"{place} (={value!r}) is a path of this machine: a reference run may not depend on one")
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        check_paths(part, f"{place}.{key}")


def evaluation(files: Sequence[str], checkpoint: Path, name: str) -> dict[str, Any]:
    """Return the content of files of results as one, without folders of this machine.

    Raises:
        ValueError: the results are of another checkpoint or of different data, or lack a baseline.
    """
    from jepa_kit.config.shipped import PREFIX
    from jepa_kit.evaluation.tables.rows import read_results
    from jepa_kit.files import sha256_of

    digest = sha256_of(checkpoint)
    contents = [read_results(file) for file in files]
    for file, content in zip(files, contents, strict=True):
        if (content["checkpoint"] or {}).get("sha256") != digest:
            raise ValueError(f"{file} evaluates {(content['checkpoint'] or {}).get('file')}, not {checkpoint}")
        if content["data"] != contents[0]["data"]:
            raise ValueError(f"{file} has other data than {files[0]}")
    whole = contents[0] | {"rows": [row for content in contents for row in content["rows"]]}
    whole.pop("protocols", None)
    if missing := [one for one in NEEDED if one not in {row["network"] for row in whole["rows"]}]:
        raise ValueError(
            f"{', '.join(files)} must have the baselines {', '.join(NEEDED)}; missing: {', '.join(missing)}"
        )
    whole["config"] = without_folders(whole["config"], name)
    whole["checkpoint"]["file"] = PREFIX + name
    for part in ("train", "test"):
        whole["data"][part]["shards"] = short(whole["data"][part]["shards"])
    check_paths(whole, "the results")
    return whole


def thinned(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return at most ``LINES`` lines of a run: the first, the last, those with evaluations, and others in between.

    The speed of a line is that of the images since the line before it.
    """
    last = len(records) - 1
    kept = {0, last, *(k for k, line in enumerate(records) if "eval/seconds" in line)}
    if len(kept) < LINES:
        kept |= set(range(0, len(records), -(-len(records) // (LINES - len(kept)))))
    order, most = sorted(kept), min(len(kept), LINES)
    wanted = {order[k * (len(order) - 1) // max(1, most - 1)] for k in range(most)}
    found, images, seconds, before = [], 0.0, 0.0, 0.0
    for k, line in enumerate(records):
        images, added = images + line["samples"] - before, line["samples"] - before
        before = line["samples"]
        seconds += added / line["images_per_second"] if line.get("images_per_second") else 0.0
        if k in wanted:
            whole = line | ({"images_per_second": images / seconds} if seconds else {})
            found.append({key: rounded(value) for key, value in whole.items()})
            images = seconds = 0.0
    return found


def rounded(value: float) -> float:
    """Return a number with ``DIGITS`` significant digits; an int as it is."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def write_rest(folder: Path, source: Path, config: Mapping[str, Any], content: dict[str, Any]) -> None:
    """Write config, metrics, curves and results into the folder."""
    from PIL import Image

    from jepa_kit.config.load import dump_yaml
    from jepa_kit.engine.logging.curves import plot_curves
    from jepa_kit.engine.logging.telemetry import read_metrics
    from jepa_kit.evaluation.online import PANELS
    from jepa_kit.evaluation.tables.results import write_results
    from jepa_kit.files import write_json_lines
    from jepa_kit.run_folder import METRICS, RUN_CONFIG

    (folder / RUN_CONFIG).write_text(dump_yaml(dict(config)), encoding="utf-8")
    write_json_lines(folder / METRICS, thinned(read_metrics(source)))
    write_results(content, folder / "results.json")
    picture = plot_curves(folder, PANELS)
    assert picture is not None, "a finished run has lines"
    image = Image.open(BytesIO(picture.read_bytes())).convert("RGB")
    image.quantize(255, dither=Image.Dither.NONE).save(picture, optimize=True)


def card(folder: Path, arguments: argparse.Namespace, encoder: str, facts: Mapping[str, Any], parameters: int) -> str:
    """Return the README of a reference run, from its files."""
    from jepa_kit.config.shipped import PREFIX
    from jepa_kit.evaluation.tables.cost import cost_of
    from jepa_kit.evaluation.tables.rows import Row
    from jepa_kit.evaluation.tables.runs import load
    from jepa_kit.evaluation.tables.table import format_table
    from jepa_kit.run_folder import WEIGHTS

    name, (one,) = arguments.name, load(folder)
    cost = cost_of(one)
    assert cost is not None, "metrics.jsonl is in the folder"
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config, data = content["config"], content["data"]
    slots = ("masker", "encoder", "predictor", "head", "target", "target_update")
    parts = [f"{slot} {config[slot]['name']}" for slot in slots if isinstance(config.get(slot), dict)]
    method = name.partition("_")[0]
    whole = "the evaluated encoder alone" if arguments.encoder_only else "the whole recipe"
    threads = facts["threads"]
    facts_of = {
        "recipe": f"{config['recipe']['name']}: {', '.join(parts)}; seed {config['train']['seed']}",
        "updates": f"{cost.steps:,.0f} of {config['train']['batch_size']} images, {config['train']['epochs']} epochs",
        "encoder": f"{parameters / 1e6:.2f} M parameters; the {encoder} encoder is evaluated",
        "machine": f"{arguments.machine}; {threads} thread{'s' * (threads != 1)}",
        "hours": f"{cost.hours:.2f}, without checkpoints and evaluations"
        + ("" if cost.tflop is None else f"; {cost.tflop:,.0f} TFLOP"),
        "versions": ", ".join(f"{key} {value}" for key, value in facts["versions"].items() if key != "git_commit"),
        "commit": f"`{facts['versions'].get('git_commit', 'not recorded')}`",
        "weights": f"`{WEIGHTS}`, {whole} in float16; Apache-2.0",
    }
    shared = data["test_samples_in_train"]
    lines = [
        f"# {name}",
        "",
        f"A run of [{method}](../../projects/{method}/README.md) that ships with jepa_kit: what its curves and results "
        "should look like.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts_of.items()),
        "",
        "The same run, and a use of its encoder:",
        "",
        *(f"    {command}" for command in arguments.data),
        f"    python tools/train_net.py --config-file {PREFIX}{name} data.shards={config['data']['shards']}",
        f"    python tools/compare.py output/{name} {PREFIX}{name} --curves curves.png",
        "",
        f'    encoder = jepa_kit.load_encoder("{PREFIX}{name}")',
        "",
        "## Results",
        "",
        f"Frozen features, learned from {data['train']['samples']:,} labelled samples, on {data['test']['samples']:,} "
        f"others{f' ({shared:,} of them are training samples)' if shared else ''}; accuracy in %, ± its standard "
        "error. [results.json](results.json) has the settings.",
        "",
        format_table([Row(**row) for row in content["rows"]]),
        "",
        "## Curves",
        "",
        f"![Curves of {name}: loss and schedules, and what was measured during the run](curves.png)",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
