#!/usr/bin/env python
"""Evaluates features of a checkpoint by any number of protocols, with baselines beside them.

examples:
  # a run of tools/train_net.py: its target encoder, the same network untrained, and raw pixels; every label of the
  # shards; training shards as in its config, test shards from the folder `val` (or `test`) beside them
  python tools/eval_net.py --checkpoint output/quickstart/run --protocol logistic,knn

  # what protocols there are, with their options
  python tools/eval_net.py --list

  # other shards, both encoders, results as JSON; features are kept for the next call
  python tools/eval_net.py --checkpoint runs/first/checkpoint_00001250.pt --protocol linear,attentive --encoder both \\
      --train-shards shards/cifar10-train --test-shards shards/cifar10-test --features features --output results.json

  # a protocol with options of its own; without baselines, on the CPU, in float32
  python tools/eval_net.py --checkpoint runs/first --protocol '{name: logistic, subsets: [1%, 10/class]}' \\
      --baselines none train.device=cpu train.precision=float32

  # a network that was never trained, and raw pixels
  python tools/eval_net.py --config-file projects/ijepa/configs/quickstart.yaml --protocol knn \\
      --train-shards output/quickstart/shards/train

  # features extracted by 8 processes, one for each GPU
  torchrun --nproc-per-node 8 tools/eval_net.py --checkpoint runs/first --protocol linear --features /shared/features

Settings of a protocol are chosen inside the training shards, never on the test shards. The paper evaluates the target
encoder, mean over patch tokens, the better of the last layer and the last four (what `linear` chooses from).
Results go into the folder `evaluation` beside the checkpoint, or to --output; tools/compare.py reads them.
Exit status: 0, or 2 for a mistake in the command, the checkpoint or the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    import torch

    from jepa_kit.config import Config
    from jepa_kit.data.shards import ShardDataset
    from jepa_kit.engine.distributed import World
    from jepa_kit.evaluation.features import LoadedRun

BESIDE = ("test", "val")
"""Folders that hold test shards, looked for beside the training shards."""


def parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\nexamples:")
    p = argparse.ArgumentParser(
        prog="eval_net.py",
        description=description,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", metavar="FILE", help="a checkpoint, or a run folder (its latest)")
    what.add_argument("--config-file", metavar="FILE", help="a config, whose baselines alone are evaluated")
    what.add_argument("--list", action="store_true", help="prints the protocols with their options")
    p.add_argument(
        "--protocol",
        action="append",
        metavar="NAME",
        help="see --list; several with commas, or the option again; with options as '{name: knn, neighbours: [5]}'",
    )
    p.add_argument("--encoder", choices=("target", "context", "both"), help="default: target, the paper's")
    p.add_argument(
        "--layers",
        metavar="LAYERS",
        help="of protocols that do not choose them: last (default), last4 (the last 4 concatenated), or blocks as 2+4",
    )
    p.add_argument("--train-shards", metavar="DIR", help="what protocols learn from (default: data.shards of the run)")
    p.add_argument(
        "--test-shards", metavar="DIR", help="what they are asked about (default: test or val beside --train-shards)"
    )
    p.add_argument("--label", action="append", metavar="NAME", help="as --protocol; default: every label of the shards")
    p.add_argument(
        "--baselines", default="untrained,pixels", metavar="NAMES", help="untrained, pixels, both (default), or none"
    )
    p.add_argument("--features", metavar="DIR", help="keeps features there, and takes what is there already")
    p.add_argument("--seed", type=int, default=0, help="of the protocols (default: 0)")
    p.add_argument("--untrained-seed", type=int, metavar="SEED", help="of the untrained network (default: the run's)")
    p.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    p.add_argument(
        "--output", metavar="FILE", help="the results as JSON (default: a file in `evaluation` beside the checkpoint)"
    )
    p.add_argument(
        "overrides", nargs="*", metavar="key=value", help="what to change in the run's config, as train.device=cpu"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status: 0, or 2 for a mistake of the user's."""
    p = parser()
    arguments = p.parse_intermixed_args(argv)
    if not arguments.list and (not arguments.protocol or not (arguments.checkpoint or arguments.config_file)):
        p.error("the following arguments are required: --checkpoint (or --config-file), --protocol; or --list")
    try:
        text = list_protocols() if arguments.list else run(arguments)
    except (ValueError, OSError) as error:
        print(f"eval_net.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval_net.py: interrupted", file=sys.stderr)
        return 130
    if text:
        print(text)
    return 0


def run(arguments: argparse.Namespace) -> str:
    """The table of an evaluation; writes its file. With several processes, all but the first give no text."""
    # here, so that --help does not wait for torch and scikit-learn
    from jepa_kit.config import load_config
    from jepa_kit.data.shards import ShardDataset
    from jepa_kit.engine.distributed import choose_device, process_group, read_environment
    from jepa_kit.evaluation.features import load_run
    from jepa_kit.evaluation.protocols import parse_specs

    specs = parse_specs(arguments.protocol)
    check_choices(arguments, specs)
    loaded = load_run(arguments.checkpoint, arguments.overrides) if arguments.checkpoint else None
    config = loaded.config if loaded else load_config(arguments.config_file, arguments.overrides)
    train = ShardDataset(find_train_shards(arguments.train_shards, config.data.shards))
    test = ShardDataset(find_test_shards(arguments.test_shards, train.path))
    world = read_environment()
    device = choose_device(config.train.device, world)
    with process_group(world, device):
        return evaluated(arguments, specs, loaded, config, train, test, world, device)


def evaluated(
    arguments: argparse.Namespace,
    specs: list[Any],
    loaded: LoadedRun | None,
    config: Config,
    train: ShardDataset,
    test: ShardDataset,
    world: World,
    device: torch.device,
) -> str:
    """The table; the main process writes the file."""
    from jepa_kit.evaluation.features import latest_checkpoint
    from jepa_kit.evaluation.networks import ENCODERS, config_networks, run_networks, sha256
    from jepa_kit.evaluation.report import evaluate, format_table
    from jepa_kit.evaluation.results import config_results, write_results
    from jepa_kit.evaluation.store import FeatureStore

    about: dict[str, Any] = {
        "baselines": [] if arguments.baselines == "none" else split([arguments.baselines]),
        "untrained_seed": arguments.untrained_seed,
        "device": device,
    }
    checkpoint = None
    if loaded is None:
        networks = config_networks(config, **about)
    else:
        file = latest_checkpoint(arguments.checkpoint)
        checkpoint = {"file": str(file), "sha256": sha256(file), "step": loaded.step}
        chosen = arguments.encoder or "target"
        encoders = [which for which in ENCODERS if chosen in (which, "both")]
        networks = run_networks(loaded, encoders=encoders, checkpoint_sha256=sha256(file), **about)
    rows = evaluate(
        networks,
        train,
        test,
        image_size=config.data.image_size,
        protocols=specs,
        labels=split(arguments.label) if arguments.label else None,
        layers=arguments.layers or "last",
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        num_workers=config.data.num_workers,
        mean=config.data.mean,
        std=config.data.std,
        store=FeatureStore(arguments.features, world),
        device=device,
        world=world,
        progress=True,
    )
    if not world.is_main:
        return ""
    content = config_results(
        rows, config=config, checkpoint=checkpoint, train=train, test=test, seed=arguments.seed
    ) | {"protocols": [spec if isinstance(spec, str) else dict(spec) for spec in specs]}
    output = arguments.output or (default_output(content) if checkpoint else None)
    if output:
        write_results(content, output)
        print(f"results: {output}", file=sys.stderr)
    return format_table(rows)


def check_choices(arguments: argparse.Namespace, specs: Sequence[Any]) -> None:
    """Raises ValueError for an option that would do nothing."""
    from jepa_kit.evaluation.protocols import build_protocols

    built = build_protocols(specs)
    if arguments.layers and not any(probe.takes_layers for _, _, probe in built):
        names = ", ".join(name for name, _, _ in built)
        raise ValueError(f"--layers (={arguments.layers!r}) would do nothing: {names} choose their layers themselves")
    if arguments.config_file and arguments.encoder:
        raise ValueError(f"--encoder (={arguments.encoder!r}) would do nothing: --config-file has no trained encoder")
    if arguments.config_file and arguments.baselines == "none":
        raise ValueError("--baselines (='none') leaves nothing to evaluate: --config-file has baselines alone")


def default_output(content: dict[str, Any]) -> Path:
    """A file beside the checkpoint, of one name for one question: step, and a digest of what was asked."""
    asked = {k: content[k] for k in ("data", "seeds", "precision", "protocols")}
    asked["networks"] = sorted({(r["network"], r["layers"], r["seed"], r["label"]) for r in content["rows"]}, key=str)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    checkpoint = content["checkpoint"]
    return Path(checkpoint["file"]).parent / "evaluation" / f"step_{checkpoint['step']:08d}_{digest}.json"


def list_protocols() -> str:
    """Every protocol with the first line of its card, and its options with their defaults."""
    from jepa_kit.evaluation.protocols import PROTOCOLS
    from jepa_kit.registry import REQUIRED

    lines = []
    for name in PROTOCOLS.names():
        card = (PROTOCOLS.get(name).__doc__ or "").strip().splitlines()[0]
        options = [
            option.name if option.default is REQUIRED else f"{option.name}={option.default!r}"
            for option in PROTOCOLS.options(name).values()
        ]
        lines += [f"{name}: {card}", *(f"    {option}" for option in options)]
    return "\n".join(lines)


def split(names: Sequence[str]) -> list[str]:
    """["a,b", "c"] -> ["a", "b", "c"]."""
    return [name.strip() for entry in names for name in entry.split(",")]


def find_train_shards(given: str | None, of_run: str | Sequence[str] | None) -> str:
    """The folder that protocols learn from.

    Raises:
        ValueError: there is none.
    """
    if given is None and of_run is None:
        raise ValueError("--train-shards must name a folder of shards: the run's config has none (data.shards is null)")
    if given is None and not isinstance(of_run, str):
        assert of_run is not None
        if len(of_run) > 1:
            raise ValueError(f"--train-shards must name one folder of shards: the run's config has {len(of_run)}")
        return of_run[0]
    return given or str(of_run)


def find_test_shards(given: str | None, train: str) -> str:
    """The folder that protocols are asked about.

    Raises:
        ValueError: none is given, and none lies beside the training shards.
    """
    if given is not None:
        return given
    parent = Path(train).resolve().parent
    for name in BESIDE:
        if (parent / name).is_dir() and (parent / name) != Path(train).resolve():
            return str(parent / name)
    raise ValueError(f"--test-shards must name a folder of shards: there is no {' or '.join(BESIDE)} in {parent}")


if __name__ == "__main__":
    sys.exit(main())
