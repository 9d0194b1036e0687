"""Sources of features: the encoders of a run, the same network untrained, raw pixels, and patches.

B  images of a batch    n  patches of an image    D  width of a feature
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jepa_kit.config import Config
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.evaluation.data_identity import identity
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
from jepa_kit.evaluation.patch_codes import PatchCodes, PatchOptions, learn_patches
from jepa_kit.evaluation.tables.rows import BASELINES, ENCODER_NAMES, UNTRAINED
from jepa_kit.frozen import FrozenNetwork
from jepa_kit.interfaces import Encoder
from jepa_kit.precision import precision_of, resolve_precision
from jepa_kit.recipe import Recipe
from jepa_kit.registry import did_you_mean
from jepa_kit.target_updates import Frozen

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


DEFAULT_BASELINES = (UNTRAINED, "pixels")
"""Those that learn nothing from images."""
Learn = Callable[[Mapping[str, Any], Callable[[], dict[str, NDArray[Any]]]], dict[str, NDArray[Any]]]
"""Return arrays that depend on the first argument from a cache, or else from the second."""


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
        poolings: that it distinguishes if it has no layers; the others are as ``mean``.
        bind: (training shards, how images are read, cache) -> the same network with a source that learns from these
            shards; None if it does not learn from them.
        standardised: whether features of images are standardised over the training samples.
    """

    name: str
    source: BlockSource
    depth: int = 0
    identity: Mapping[str, Any] | None = None
    seed: int | None = None
    encoder: nn.Module | None = None
    poolings: tuple[Pooling, ...] = ("none",)
    bind: Callable[[ShardDataset, ImageOptions, Learn], Network] | None = None
    standardised: bool = False

    def views(self, layers: str, pooling: Pooling) -> tuple[Feature, ...]:
        """Return the arrays that are concatenated to a layer set.

        Raises:
            ValueError: a layer set that the network does not have, or the class token of an encoder without one. A
                network without layers has the same for all sets.
        """
        if not self.depth:
            return (Feature(NO_BLOCK, pooling if pooling in self.poolings else "mean"),)
        if pooling == "class" and not has_class_token(self.encoder):
            raise ValueError("pooling (='class') needs an encoder with a class token, and this one has none")
        return tuple(Feature(block, pooling) for block in layer_numbers(layers, self.depth))

    def pooling_of(self, pooling: Pooling) -> Pooling | None:
        """Return the pooling for a table; None if the features of a network without layers do not depend on it."""
        return pooling if self.depth or pooling in self.poolings else None


def run_networks(
    run: LoadedRun,
    *,
    encoders: Sequence[Literal["target", "context"]] | None = None,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    untrained_seed: int | None = None,
    device: torch.device | str = "cpu",
    checkpoint_sha256: str | None = None,
) -> list[Network]:
    """Return the networks of a run, and its baselines.

    Args:
        run: its config gives the normalisation of images and the precision of matrix products.
        encoders: of ``target`` (as in the paper) and ``context``; None for the target encoder if there is one.
        baselines: of ``untrained`` (the same network with fresh weights), ``pixels`` (averaged down to 16 x 16; for
            protocols of patches, all pixels of a patch) and ``patches`` (k-means, see ``patch_codes``).
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
    baselines: Sequence[str] = DEFAULT_BASELINES,
    untrained_seed: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Network]:
    """Return the baselines of a config: its encoder with fresh weights, pixels, patches; see ``run_networks``."""
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
    if "patches" in baselines:
        networks.append(patch_network(cast(Encoder, encoder).patch_size))
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


def patch_network(patch_size: int | None = None) -> Network:
    """Return the baseline of k-means on patches (``patch_codes``), which learns from the training shards of protocols.

    Args:
        patch_size: side of an encoder's patches, over which protocols of patches have its codes averaged; None excludes
            these.
    """

    def unbound(images: Tensor, wanted: Sequence[tuple[int, Pooling]]) -> list[Tensor]:
        raise AssertionError("patches have no features until they are bound to training shards")

    def bind(train: ShardDataset, images: ImageOptions, learn: Learn) -> Network:
        options = PatchOptions.for_images(images.image_size)
        data = {key: value for key, value in identity(train).items() if key != "shards"}
        origin = {"patches": options.to_dict(), "learned_from": data, "decoder": images.decoder}

        @functools.cache
        def codes() -> PatchCodes:  # at the first image: features may be cached
            return PatchCodes(options, learn(origin, lambda: learn_patches(options, train, images)))

        def source(batch: Tensor, wanted: Sequence[tuple[int, Pooling]]) -> list[Tensor]:
            poolings = [pooling for _, pooling in wanted]
            if "none" in poolings and patch_size is None:
                raise ValueError("patch_size (=None) must be given to patch_network for protocols of patches")
            side = patch_size or 1
            return codes().features(batch, poolings, (batch.shape[2] // side, batch.shape[3] // side))

        return replace(network, source=source, identity=origin | {"patch_size": patch_size})

    network = Network(
        "patches", unbound, identity={}, poolings=("mean", "quarters", "none"), bind=bind, standardised=True
    )
    return network


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
