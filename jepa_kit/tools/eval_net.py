"""Evaluate features of a checkpoint and of baselines by any number of protocols.

examples:
  # a run of tools/train_net.py: its target encoder, the same network untrained, raw pixels, and k-means on patches;
  # every label of the shards; training shards as in its config, test shards from the folder `val` (or `test`) beside
  # them
  python tools/eval_net.py --checkpoint output/quickstart/run --protocol logistic,knn

  # list the protocols: their options with defaults, and an example of each
  python tools/eval_net.py --list

  # other shards, both encoders, results as JSON; features are cached for the next call
  python tools/eval_net.py --checkpoint runs/first/checkpoint_00001250.pt --protocol linear,attentive --encoder both \\
      --train-shards shards/cifar10-train --test-shards shards/cifar10-test --features features --output results.json

  # a protocol with options (pooling: class takes the class token, quarters the means over the four quarters); without
  # baselines, on the CPU, in float32
  python tools/eval_net.py --checkpoint runs/first --protocol '{name: logistic, subsets: [1%, 10/class]}' \\
      --baselines none train.device=cpu train.precision=float32

  # fine-tuning of the encoder with a tenth of the labels; segmentation of shards with masks
  python tools/eval_net.py --checkpoint runs/first --protocol '{name: finetune, epochs: 20, subset: 10%}' --label class
  python tools/eval_net.py --checkpoint runs/first --protocol dense --train-shards shards/masked/train

  # remote shards, cached in a folder (docs/data.md); a faster decoder
  python tools/eval_net.py --checkpoint runs/first --protocol linear --train-shards https://host/in1k-train \\
      --test-shards https://host/in1k-val data.cache=/scratch/shards data.decoder=fast

  # an untrained network, raw pixels, and k-means on patches
  python tools/eval_net.py --config-file projects/ijepa/configs/quickstart.yaml --protocol knn \\
      --train-shards output/quickstart/shards/train

  # features extracted by 8 processes, one for each GPU
  torchrun --nproc-per-node 8 tools/eval_net.py --checkpoint runs/first --protocol linear --features /shared/features

Settings of a protocol are chosen inside the training shards, never on the test shards. The paper evaluates the target
encoder, mean over patch tokens, the better of the last layer and the last four (`linear` chooses between these).
Images are read as the run's config says (data.image_size, decoder, max_pixels, cache, ...), as centre crops.
Results go into the folder `evaluation` beside the checkpoint, or to --output; tools/compare.py reads them.
Exit status: 0, 2 for a mistake in the command, the checkpoint or the shards, 1 if processes could not connect or one
failed, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import textwrap
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_kit.arguments import Show, add_json, add_trust, run_tool, run_with_json, tool_parser

if TYPE_CHECKING:
    import torch

    from jepa_kit.config import Config
    from jepa_kit.data.shards.dataset import ShardDataset
    from jepa_kit.distributed.collectives import World
    from jepa_kit.evaluation.features import LoadedRun
    from jepa_kit.evaluation.protocols import Built
    from jepa_kit.evaluation.tables.rows import Row

NAMES = "knn, logistic, linear, paper_linear, paper_transfer, count, distance, attentive, dense, finetune"
"""The protocols of jepa_kit for --help, which does not import them."""
PATIENCE = timedelta(days=7)
"""Timeout of collectives: one process may need hours for its last job after the others have finished."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = tool_parser("eval_net.py", __doc__)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", metavar="FILE", help="a checkpoint, or a run folder (its latest)")
    what.add_argument("--config-file", metavar="FILE", help="a config, to evaluate its baselines only")
    what.add_argument("--list", action="store_true", help="print the protocols with their options and examples")
    p.add_argument(
        "--protocol",
        action="append",
        metavar="NAME",
        help=f"one of {NAMES} (see --list); several with commas, or the option again; with options as "
        "'{name: knn, neighbours: [5]}'",
    )
    p.add_argument(
        "--encoder",
        choices=("target", "context", "both"),
        help="default: target, the paper's; context if there is none that learns",
    )
    p.add_argument(
        "--layers",
        metavar="LAYERS",
        help="for protocols that do not choose them: last (default), last4 (the last 4 concatenated), or blocks as 2+4",
    )
    p.add_argument(
        "--train-shards", metavar="DIR", help="training shards of protocols (default: data.shards of the run)"
    )
    p.add_argument(
        "--test-shards", metavar="DIR", help="test shards (default: test, else val, beside the training shards)"
    )
    p.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="of the shards; several with commas, or the option again (default: all)",
    )
    p.add_argument(
        "--baselines",
        default="untrained,pixels,patches",
        metavar="NAMES",
        help="untrained, pixels, patches (k-means on patches of the training shards); default: all; or none",
    )
    p.add_argument("--features", metavar="DIR", help="cache features in this folder")
    p.add_argument("--seed", type=int, default=0, help="of the protocols (default: 0)")
    p.add_argument("--untrained-seed", type=int, metavar="SEED", help="of the untrained network (default: the run's)")
    p.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    p.add_argument(
        "--output", metavar="FILE", help="the results as JSON (default: a file in `evaluation` beside the checkpoint)"
    )
    add_json(p)
    add_trust(p)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the run's config, as train.device=cpu")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line; exits with status 2 if it lacks what an evaluation needs."""
    p = parser()
    arguments = p.parse_intermixed_args(argv)
    if not arguments.list and (not arguments.protocol or not (arguments.checkpoint or arguments.config_file)):
        p.error("the following arguments are required: --checkpoint (or --config-file), --protocol; or --list")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status, as at the end of ``--help``."""
    return run_tool("eval_net.py", lambda: run_with_json(run, parse(argv)))


def run(arguments: argparse.Namespace, show: Show) -> None:
    """Evaluate, or list the protocols; rank 0 prints the table and writes the file."""
    if arguments.list:
        show(list_protocols(), describe_protocols())
        return
    # imported here, so that --help does not import torch and scikit-learn
    from jepa_kit.config import load_config
    from jepa_kit.config.resolved import import_named
    from jepa_kit.distributed.collectives import choose_device, process_group, read_environment
    from jepa_kit.engine.build import open_together
    from jepa_kit.evaluation.features import latest_checkpoint, load_run
    from jepa_kit.evaluation.protocols import build_protocols, parse_specs
    from jepa_kit.evaluation.shard_choice import evaluation_shards, training_shards
    from jepa_kit.precision import resolve_precision

    specs = parse_specs(arguments.protocol)
    built = build_protocols(specs)
    check_choices(arguments, built)
    import_named(arguments.overrides)
    # found once: a run in progress may save a later one at any time
    file = latest_checkpoint(arguments.checkpoint) if arguments.checkpoint else None
    changes, trust = arguments.overrides, arguments.trust_imports
    loaded = load_run(file, changes, trust_imports=trust) if file else None
    config = loaded.config if loaded else load_config(arguments.config_file, changes, trust_imports=trust)
    training = training_shards(arguments.train_shards, config.data.shards)
    held_out = evaluation_shards(arguments.test_shards, training)
    world = read_environment()
    device = choose_device(config.train.device, world)
    with process_group(world, device, patience=PATIENCE):
        config = resolve_precision(config, device)
        loaded = loaded._replace(config=config) if loaded else None
        train, test = open_together(config, training), open_together(config, held_out)
        if world.is_main:
            note_shared(train, test)
        rows, checkpoint = evaluate_run(arguments, specs, file, loaded, config, train, test, world, device)
        if world.is_main:
            report(arguments, rows, config, checkpoint, train, test, built, show)


def note_shared(train: ShardDataset, test: ShardDataset) -> None:
    """Print a note to stderr if test samples are training samples: right for a sanity check, wrong for a score."""
    from jepa_kit.evaluation.data_identity import shared_samples

    shared = shared_samples(train, test)
    if shared:
        print(
            f"note: {shared:,} of {len(test):,} test samples ({test.path}) lie in the training shards ({train.path}) "
            "too: scores measure memorisation",
            file=sys.stderr,
        )


def evaluate_run(
    arguments: argparse.Namespace,
    specs: list[Any],
    file: Path | None,
    loaded: LoadedRun | None,
    config: Config,
    train: ShardDataset,
    test: ShardDataset,
    world: World,
    device: torch.device,
) -> tuple[list[Row], dict[str, Any] | None]:
    """Return the rows, and the checkpoint's entry of the file of results."""
    from jepa_kit.data.image_options import ImageOptions
    from jepa_kit.data.workers import choose_workers
    from jepa_kit.distributed.collectives import broadcast_from_rank0
    from jepa_kit.evaluation.evaluate import evaluate
    from jepa_kit.evaluation.feature_cache import FeatureStore
    from jepa_kit.evaluation.feature_sources import config_networks, encoder_named, run_networks
    from jepa_kit.evaluation.tables.results import about_checkpoint
    from jepa_kit.evaluation.tables.rows import ENCODER_NAMES
    from jepa_kit.files import sha256_of
    from jepa_kit.precision import precision_of

    about: dict[str, Any] = {
        "baselines": [] if arguments.baselines == "none" else split([arguments.baselines]),
        "untrained_seed": arguments.untrained_seed,
        "device": device,
    }
    checkpoint = None
    if loaded is None or file is None:
        networks = config_networks(config, **about)
    else:
        digest = broadcast_from_rank0(lambda: sha256_of(file))
        checkpoint = about_checkpoint(file, loaded, name=checkpoint_name(arguments.checkpoint, file), digest=digest)
        chosen = arguments.encoder or encoder_named(loaded.jepa)
        encoders = [which for which in ENCODER_NAMES if chosen in (which, "both")]
        networks = run_networks(loaded, encoders=encoders, checkpoint_sha256=digest, **about)
    rows = evaluate(
        networks,
        train,
        test,
        ImageOptions.from_config(
            config.data,
            batch_size=arguments.batch_size,
            num_workers=choose_workers(config.data.num_workers, device),
            precision=precision_of(config),
        ),
        protocols=specs,
        labels=split(arguments.label) if arguments.label else None,
        layers=arguments.layers or "last",
        seed=arguments.seed,
        store=FeatureStore(arguments.features, world),
        device=device,
        progress=True,
    )
    return rows, checkpoint


def report(
    arguments: argparse.Namespace,
    rows: list[Row],
    config: Config,
    checkpoint: dict[str, Any] | None,
    train: ShardDataset,
    test: ShardDataset,
    built: Sequence[Built],
    show: Show,
) -> None:
    """Write the file of results, with all options of the protocols, and then print the table."""
    from jepa_kit.evaluation.protocols import plain_options
    from jepa_kit.evaluation.tables.results import results, write_results
    from jepa_kit.evaluation.tables.table import format_table

    content = results(rows, config=config, checkpoint=checkpoint, train=train, test=test, seed=arguments.seed)
    content["protocols"] = plain_options(built)
    output = arguments.output or (default_output(arguments.checkpoint, content) if checkpoint else None)
    if output:
        write_results(content, output)
    show(format_table(rows), content)
    if output:
        print(f"results: {output}", file=sys.stderr)


def check_choices(arguments: argparse.Namespace, built: Sequence[Built]) -> None:
    """Raise ValueError for an option without effect or that needs another, or a file that cannot be written."""
    from jepa_kit.config.shipped import is_reference
    from jepa_kit.engine.checkpoint.storage import is_url
    from jepa_kit.evaluation.tables.results import check_output

    if arguments.output:
        check_output("--output", arguments.output)
    if arguments.layers and not any(probe.takes_layers for _, _, probe in built):
        names = ", ".join(name for name, _, _ in built)
        raise ValueError(f"--layers (={arguments.layers!r}) would do nothing: {names} have an option for their layers")
    if arguments.label and all(probe.takes == "masks" or probe.label is not None for _, _, probe in built):
        names = ", ".join(name for name, _, _ in built)
        raise ValueError(f"--label (={','.join(arguments.label)!r}) would do nothing: none of {names} uses it")
    if arguments.untrained_seed is not None and "untrained" not in split([arguments.baselines]):
        raise ValueError(
            f"--untrained-seed (={arguments.untrained_seed}) would do nothing: --baselines (={arguments.baselines!r}) "
            "has no untrained network"
        )
    named = arguments.checkpoint
    if named and (is_url(named) or is_reference(named)) and not arguments.output:
        raise ValueError(f"--output must name a file: --checkpoint (={named!r}) is not in a folder of yours")
    if arguments.config_file and arguments.encoder:
        raise ValueError(f"--encoder (={arguments.encoder!r}) would do nothing: --config-file has no trained encoder")
    if arguments.config_file and arguments.baselines == "none":
        raise ValueError("--baselines (='none') leaves nothing to evaluate: --config-file has baselines alone")


def checkpoint_name(given: str, file: Path) -> str:
    """Return the name of the checkpoint in results: its path, or its URL if it was downloaded."""
    source = Path(given).expanduser()
    if file == source or source in file.parents:
        return str(file)
    return given if Path(given).name == file.name else f"{given.rstrip('/')} ({file.name})"


def default_output(given: str, content: dict[str, Any]) -> Path:
    """Return a file in the run folder, named by the step and a digest of data, seeds, protocols and networks.

    Args:
        given: the local checkpoint or run folder that the user names.
    """
    identity = {k: content[k] for k in ("data", "seeds", "precision", "protocols")}
    identity["networks"] = sorted(
        {(r["network"], r["layers"], r["seed"], r["label"]) for r in content["rows"]}, key=str
    )
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    source = Path(given).expanduser()
    is_run = source.is_dir() and content["checkpoint"]["file"] != str(source)  # not a sharded checkpoint
    folder = source if is_run else source.parent
    return folder / "evaluation" / f"step_{content['checkpoint']['step']:08d}_{digest}.json"


def list_protocols() -> str:
    """Return the title, an example and the options with defaults of every protocol."""
    from jepa_kit.evaluation.protocols.base import PROTOCOLS
    from jepa_kit.evaluation.protocols.cards import card_of
    from jepa_kit.registry import REQUIRED

    blocks = []
    for name in PROTOCOLS.names():
        card = card_of(PROTOCOLS.get(name))
        lines = [f"{name}: {card.title}", f"    --protocol '{card.example or name}'"]
        for option in PROTOCOLS.options(name).values():
            default = "(needed)" if option.default is REQUIRED else f"= {plain(option.default)}"
            text = f"{option.name} {default}: {card.options.get(option.name, '')}"
            lines += textwrap.wrap(text, 118, initial_indent="    ", subsequent_indent="        ")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def describe_protocols() -> list[dict[str, Any]]:
    """Return what ``list_protocols`` shows, as plain values; an option without a default has no ``default``."""
    from jepa_kit.evaluation.protocols.base import PROTOCOLS
    from jepa_kit.evaluation.protocols.cards import card_of
    from jepa_kit.registry import REQUIRED

    found = []
    for name in PROTOCOLS.names():
        card = card_of(PROTOCOLS.get(name))
        options = [
            {"name": option.name, "description": card.options.get(option.name, "")}
            | ({} if option.default is REQUIRED else {"default": option.default})
            for option in PROTOCOLS.options(name).values()
        ]
        found.append({"name": name, "title": card.title, "example": card.example or name, "options": options})
    return found


def plain(value: Any) -> str:
    """Return a default as in YAML: ``[10, 20]``, ``null``."""
    return json.dumps(value).replace('"', "")


def split(names: Sequence[str]) -> list[str]:
    """Split at commas: ["a,b", "c"] -> ["a", "b", "c"]."""
    return [name.strip() for entry in names for name in entry.split(",")]


if __name__ == "__main__":
    sys.exit(main())
