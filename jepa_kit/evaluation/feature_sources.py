"""Sources of features: the encoders of a run, the same network untrained, and raw pixels.

B  images of a batch    n  patches of an image    D  width of a feature
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from jepa_kit.config import Config
from jepa_kit.evaluation.features import (
    BlockSource,
    LoadedRun,
    Pooling,
    block_source,
    has_class_token,
    layer_numbers,
    pixel_features,
    pixel_patches,
    untrained_encoder,
)
from jepa_kit.evaluation.tables.rows import ENCODER_NAMES, UNTRAINED
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interfaces import Encoder
from jepa_kit.precision import precision_of, resolve_precision
from jepa_kit.recipe import Recipe
from jepa_kit.registry import did_you_mean
from jepa_kit.target_updates import Frozen

BASELINES = (UNTRAINED, "pixels")
NO_BLOCK = 0
"""Block number of features that come from no layer."""


def encoder_named(jepa: Recipe, which: str | None = None) -> Literal["target", "context"]:
    """Return the name of the encoder to evaluate; by default the target encoder if the recipe has one that learns.

    Raises:
        ValueError: another name, or the target encoder of a recipe that has none.
    """
    has_target = jepa.target_network is not None and not isinstance(jepa.target_network, FrozenNetwork)
    if which is None:
        return "target" if has_target and not isinstance(jepa.target_update, Frozen) else "context"
    check_names("encoder", [which], ENCODER_NAMES)
    if which == "target" and not has_target:
        raise ValueError(
            "encoder (='target') must be 'context': this recipe has no target encoder (its target_update makes none, "
            "or it is that of another file)"
        )
    return "target" if which == "target" else "context"


class Feature(NamedTuple):
    """One array of features: the output of a block (from 1; 0 for raw pixels), and how tokens become features."""

    block: int
    pooling: Pooling


@dataclass(frozen=True, eq=False)
class Network:
    """A source of features.

    Args:
        name: ``target``, ``context``, ``untrained``, ``pixels``, or any other; unique in a table.
        source: function from images to the features of several views.
        depth: number of blocks; 0 if it has no layers, so that every layer set is the same.
        identity: what its features depend on except images, as plain values; None for features that are not cached.
        seed: of the weights of an untrained network.
        encoder: the module, for protocols that train a copy of it.
    """

    name: str
    source: BlockSource
    depth: int = 0
    identity: Mapping[str, Any] | None = None
    seed: int | None = None
    encoder: nn.Module | None = None

    def views(self, layers: str, pooling: Pooling) -> tuple[Feature, ...]:
        """Return the arrays that are concatenated to a layer set.

        Raises:
            ValueError: a layer set that the network does not have, or the class token of an encoder without one. Raw
                pixels have neither: all sets are the same, and features of images do not depend on the pooling.
        """
        if pooling == "class" and self.depth and not has_class_token(self.encoder):
            raise ValueError("pooling (='class') needs an encoder with a class token, and this one has none")
        blocks = layer_numbers(layers, self.depth) if self.depth else (NO_BLOCK,)
        return tuple(Feature(block, pooling) for block in blocks)


def run_networks(
    run: LoadedRun,
    *,
    encoders: Sequence[Literal["target", "context"]] | None = None,
    baselines: Sequence[str] = BASELINES,
    untrained_seed: int | None = None,
    device: torch.device | str = "cpu",
    checkpoint_sha256: str | None = None,
) -> list[Network]:
    """Return the networks of a run, and its baselines.

    Args:
        run: its config gives the normalisation of images and the precision of matrix products.
        encoders: of ``target`` (as in the paper) and ``context``; None for the target encoder if there is one.
        baselines: of ``untrained`` (the same network with fresh weights) and ``pixels`` (averaged down to 16 x 16; for
            protocols of patches, all pixels of a patch).
        untrained_seed: of the fresh weights; None for the run's seed, which gives the initial weights of a run without
            ``train.init_from``.
        device: of the encoders.
        checkpoint_sha256: of the run's checkpoint; with None, features of its encoders are not cached.

    Raises:
        ValueError: an unknown or repeated name, or an encoder that the recipe does not have.
    """
    encoders = [encoder_named(run.jepa)] if encoders is None else encoders
    check_names("encoders", encoders, ENCODER_NAMES)
    config = resolve_precision(run.config, torch.device(device))
    networks = []
    for which in encoders:
        identity = None if checkpoint_sha256 is None else {"checkpoint": checkpoint_sha256, "encoder": which}
        encoder = run.jepa.encoder_for(encoder_named(run.jepa, which))
        networks.append(_encoder_network(which, encoder, config, device, identity))
    return networks + config_networks(config, baselines=baselines, untrained_seed=untrained_seed, device=device)


def config_networks(
    config: Config,
    *,
    baselines: Sequence[str] = BASELINES,
    untrained_seed: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Network]:
    """Return the baselines of a config: its encoder with fresh weights, and raw pixels; see ``run_networks``."""
    check_names("baselines", baselines, BASELINES)
    config = resolve_precision(config, torch.device(device))
    networks = []
    seed = config.train.seed if untrained_seed is None else untrained_seed
    encoder = untrained_encoder(config, seed)
    if "untrained" in baselines:
        # the same seed gives other weights in another release of torch
        identity = {"untrained": config.to_dict()["encoder"], "seed": seed, "torch": torch.__version__}
        networks.append(replace(_encoder_network("untrained", encoder, config, device, identity), seed=seed))
    if "pixels" in baselines:
        networks.append(pixel_network(cast(Encoder, encoder).patch_size))
    return networks


def pixel_network(patch_size: int | None = None) -> Network:
    """Return the baseline of raw pixels.

    Args:
        patch_size: side of a patch, for protocols of patches; None excludes these.
    """

    def source(images: Tensor, wanted: Sequence[tuple[int, Pooling]]) -> list[Tensor]:
        if patch_size is None and any(pooling == "none" for _, pooling in wanted):
            raise ValueError("patch_size (=None) must be given to pixel_network for protocols of patches")
        return [
            pixel_patches(images, cast(int, patch_size)) if pooling == "none" else pixel_features(images)
            for _, pooling in wanted
        ]

    return Network("pixels", source, identity={"pixels": patch_size})


def _encoder_network(
    name: str, encoder: nn.Module, config: Config, device: torch.device | str, identity: dict[str, Any] | None
) -> Network:
    data, precision = config.data, precision_of(config)
    network = cast(Encoder, encoder)
    source = block_source(network, device=device, precision=precision, mean=data.mean, std=data.std)
    if identity is not None:
        kind = torch.device(device).type
        identity |= {"mean": list(data.mean), "std": list(data.std), "precision": precision, "device": kind}
    return Network(name, source, network.depth, identity, encoder=encoder)


def check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for a name that is unknown or given twice."""
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} (={name!r}) must be of {', '.join(known)}{did_you_mean(name, known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{kind} (={', '.join(names)}) must be different ones")
