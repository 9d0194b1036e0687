"""``evaluate`` what an encoder has learned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from jepa_kit.api.data import Images, open_images
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.workers import choose_workers
from jepa_kit.distributed.collectives import World, choose_device
from jepa_kit.encoders.vit import ViT
from jepa_kit.evaluation.feature_cache import FeatureStore
from jepa_kit.evaluation.feature_sources import Network, check_names, patch_network, pixel_network, run_networks
from jepa_kit.evaluation.features import LoadedRun, block_source, latest_checkpoint, load_run
from jepa_kit.evaluation.shard_choice import evaluation_shards, training_shards
from jepa_kit.evaluation.tables.rows import BASELINES, Row
from jepa_kit.evaluation.tables.table import format_table
from jepa_kit.files import sha256_of
from jepa_kit.interop.frozen import FrozenEncoder
from jepa_kit.precision import precision_of, resolve_precision
from jepa_kit.recipe import Recipe

if TYPE_CHECKING:
    from pandas import DataFrame

    from jepa_kit.evaluation.protocols import Spec

Rows: TypeAlias = "DataFrame | list[Row]"
"""A row for each network, protocol and label: a pandas.DataFrame if pandas is installed, else a list."""
FIRST = ("network", "protocol", "variant", "label", "metric", "accuracy", "standard_error", "chance")
"""First columns of a data frame."""
Evaluated = str | os.PathLike[str] | Recipe | FrozenEncoder
"""A run folder or checkpoint, a recipe from ``build``, or an encoder from ``load_encoder``."""


def evaluate(
    encoder: Evaluated,
    protocols: str | Spec | Sequence[Spec] | None = None,
    *,
    train: Images | None = None,
    test: Images | None = None,
    labels: Sequence[str] | None = None,
    which: Literal["target", "context"] | None = None,
    baselines: Sequence[str] = ("untrained", "pixels"),
    layers: str = "last",
    seed: int = 0,
    batch_size: int = 256,
    features: str | os.PathLike[str] | None = None,
    device: str = "auto",
    trust_imports: bool = False,
    progress: bool = False,
) -> Rows:
    """Evaluate what an encoder has learned, as tools/eval_net.py does, but write no file.

    Args:
        encoder: a run folder or checkpoint, a recipe from ``build``, or an encoder from ``load_encoder``.
        protocols: names (``list_parts("protocol")``), several also as ``"linear,knn"``; or mappings with ``name`` and
            options. By default logistic regression and nearest neighbours.
        train: labelled images to train a protocol on; None for ``data.shards`` of the run.
        test: labelled images to test it on; None for the folder ``test``, else ``val``, beside ``train``.
        labels: of the images; None for all.
        which: encoder of a run or recipe; None for the target encoder if there is one that learns.
        baselines: of ``untrained``, ``pixels`` and ``patches`` (k-means on patches of the training images).
        layers: for protocols that do not choose them: ``last``, ``last4``, or numbers of blocks as ``2+4``.
        seed: of the protocols.
        batch_size: images at a time.
        features: a folder to cache features in.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_imports: run ``imports`` of a checkpoint's config that do not ship with jepa_kit.
        progress: print progress to stderr.

    Returns:
        rows by protocol, network and label, with the fields of ``jepa_kit.evaluation.tables.rows.Row``: as a
        ``pandas.DataFrame`` if pandas is installed, else as a list of ``Row`` that prints as a table.

    Raises:
        ValueError: no images, an unknown protocol, label or baseline, or images that a protocol rejects.
        FileNotFoundError, CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from jepa_kit.evaluation.evaluate import evaluate as evaluate_networks  # here: it imports scikit-learn

    place = choose_device(device, World())
    if isinstance(encoder, FrozenEncoder):
        of_run, config = None, None
        networks = _frozen_networks(encoder, baselines, seed, place)
        options = ImageOptions(
            image_size=encoder.image_size,
            batch_size=batch_size,
            mean=encoder.provenance.mean,
            std=encoder.provenance.std,
        )
    else:
        loaded, digest = _loaded(encoder, trust_imports)
        config = resolve_precision(loaded.config, place)
        of_run = config.data.shards
        networks = run_networks(
            loaded._replace(config=config),
            encoders=None if which is None else [which],
            baselines=baselines,
            device=place,
            checkpoint_sha256=digest,
        )
        options = ImageOptions.from_config(
            config.data,
            batch_size=batch_size,
            num_workers=choose_workers(config.data.num_workers, place),
            precision=precision_of(config),
        )
    ours = open_images(training_shards(None, of_run, "train") if train is None else train, config)
    theirs = open_images(evaluation_shards(None, ours.path, "test") if test is None else test, config)
    rows = evaluate_networks(
        networks,
        ours,
        theirs,
        options,
        protocols=_specs(protocols),
        labels=labels,
        layers=layers,
        seed=seed,
        store=FeatureStore(None if features is None else Path(features), World()),
        device=place,
        progress=progress,
    )
    return _table(rows)


def _loaded(encoder: str | os.PathLike[str] | Recipe, trust_imports: bool) -> tuple[LoadedRun, str | None]:
    """Return a run, and the digest of its checkpoint if it is from a file."""
    if isinstance(encoder, Recipe):
        if encoder.config is None:
            raise ValueError("encoder (=a recipe without config) must be from jepa_kit.build")
        return LoadedRun(encoder.config, encoder, 0), None
    file = latest_checkpoint(os.fspath(encoder))
    return load_run(file, trust_imports=trust_imports), sha256_of(file)


def _frozen_networks(
    encoder: FrozenEncoder, baselines: Sequence[str], seed: int, device: torch.device
) -> list[Network]:
    """Return an encoder and its baselines; the untrained one has its architecture."""
    check_names("baselines", baselines, BASELINES)
    about = encoder.provenance

    def network(name: str, vit: ViT) -> Network:
        source = block_source(vit, device=device, mean=about.mean, std=about.std)
        return Network(name, source, vit.depth, encoder=vit)

    networks = [network(about.encoder or "encoder", encoder.vit)]
    if "untrained" in baselines:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks.append(network("untrained", encoder.architecture.build().eval()))
    if "pixels" in baselines:
        networks.append(pixel_network(encoder.patch_size))
    if "patches" in baselines:
        networks.append(patch_network(encoder.patch_size))
    return networks


def _specs(protocols: str | Spec | Sequence[Spec] | None) -> list[Spec]:
    from jepa_kit.evaluation.evaluate import DEFAULT
    from jepa_kit.evaluation.protocols import parse_specs

    if protocols is None:
        return list(DEFAULT)
    if isinstance(protocols, str):
        return parse_specs([protocols])
    return [protocols] if isinstance(protocols, Mapping) else list(protocols)


class _RowList(list[Row]):
    """Rows that print as the table of ``tools/eval_net.py``."""

    def __repr__(self) -> str:
        return format_table(self)


def _table(rows: list[Row]) -> Rows:
    try:
        from pandas import DataFrame
    except ImportError:
        return _RowList(rows)
    table = DataFrame([asdict(row) for row in rows])
    return table[[*FIRST, *(name for name in table.columns if name not in FIRST)]]
