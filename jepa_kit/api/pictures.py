"""Figures of masks, of patch features and of training curves.

B  images    h, w  sides in pixels
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from jepa_kit.api.configs import AnyConfig, checked_config
from jepa_kit.config import Config
from jepa_kit.data.image_options import ImageOptions
from jepa_kit.data.remote.fetch import expand
from jepa_kit.data.transforms import CenterCrop, stack
from jepa_kit.engine.build import open_shards
from jepa_kit.engine.logging.curves import curves_figure
from jepa_kit.evaluation.feature_sources import encoder_named
from jepa_kit.evaluation.features import extract_features, load_run, untrained_encoder
from jepa_kit.evaluation.images import random_samples, read_images
from jepa_kit.evaluation.online import PANELS
from jepa_kit.evaluation.pictures.draw import mask_figure, patch_figure
from jepa_kit.evaluation.shard_choice import shown_shards
from jepa_kit.from_config import build_masker
from jepa_kit.interfaces import Encoder
from jepa_kit.interop.frozen import FrozenEncoder, Pictures, opened
from jepa_kit.plotting import Figure
from jepa_kit.recipe import Recipe

Shown = Tensor | Sequence[Pictures]
"""Images to draw: a tensor [B, 3, h, w] uint8; or paths, Pillow images or arrays, which are resized and cropped."""
Drawn = str | os.PathLike[str] | Recipe | FrozenEncoder
"""A run folder or checkpoint, a recipe from ``build``, or an encoder from ``load_encoder``."""


class _Network(NamedTuple):
    """An encoder, its normalisation of images, and the size of its training images."""

    encoder: Encoder
    mean: Sequence[float]
    std: Sequence[float]
    image_size: tuple[int, int]


def plot_masks(
    config: AnyConfig | Recipe, images: Shown | None = None, *, count: int = 8, columns: int = 8, **overrides: Any
) -> Figure:
    """Return a figure of what the context encoder sees of images, with each target block outlined.

    Args:
        config: as for ``build``, or a recipe from it.
        images: to show; None for the first of ``data.shards`` if they are on this machine, else synthetic scenes.
        count: how many images, at least 1; not used if ``images`` are given.
        columns: images side by side.
        overrides: of the config, as for ``build``: ``masker={"num_targets": 6}``.

    Raises:
        ConfigError: a mistake in the config, or a recipe without masker.
        ValueError: images of another size than the config's, or ``count`` is below 1.
    """
    from jepa_kit.evaluation.masks.page import samples_of  # here: it imports the planner

    checked = checked_config(_config_of(config) if isinstance(config, Recipe) else config, overrides)
    if count < 1:
        raise ValueError(f"count (={count}) must be at least 1")
    masker, size = build_masker(checked), checked.data.image_size
    pixels = samples_of(_with_data_here(checked), count) if images is None else _pixels(images, size)
    if pixels.shape[2:] != size:
        raise ValueError(f"images (={tuple(pixels.shape)}) must be of data.image_size (={size})")
    masks = masker(np.arange(len(pixels)), seed=checked.train.seed, epoch=0, step=0)
    return mask_figure(pixels, masks, columns=columns)


def plot_patches(
    encoder: Drawn | Mapping[str, Drawn],
    images: Shown | None = None,
    *,
    count: int = 64,
    shown: int = 8,
    untrained: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
    trust_imports: bool = False,
) -> Figure:
    """Return a figure of the principal components of patch features, as red, green and blue.

    Patches of one colour have similar features. If the network knows objects, colours follow them across images; if it
    knows positions, all images look the same.

    Args:
        encoder: a run folder or checkpoint, a recipe from ``build``, or an encoder from ``load_encoder``; or several by
            the name to print. Of runs and recipes the target encoder is drawn, or the context encoder if none learns.
        images: whose features the components are of; None for ``count`` random images of the (first) run, those held
            out if there are any.
        count: number of random images.
        shown: number of images that are drawn.
        untrained: whether the first encoder is drawn with fresh weights too, if it is of a run or recipe.
        device: of the encoders.
        seed: of the choice of images, and of the fresh weights.
        trust_imports: run ``imports`` of a checkpoint's config that do not ship with jepa_kit.

    Raises:
        ValueError: there is no encoder, no image, or an encoder's patches do not divide the images.
    """
    given = encoder if isinstance(encoder, Mapping) else {"encoder": encoder}
    if not given:
        raise ValueError("encoder (={}) must have at least one")
    loaded = {name: _loaded(one, trust_imports) for name, one in given.items()}
    networks = {name: network for name, (network, _) in loaded.items()}
    first, config = next(iter(loaded.values()))
    if images is not None:
        pixels = _pixels(images, first.image_size)
    elif config is None:
        raise ValueError("images (=None) must be given for an encoder that is not of a run")
    else:
        data = open_shards(config, shown_shards(None, config.data.shards))
        pixels = read_images(data, ImageOptions.from_config(config.data), random_samples(data, count, seed=seed))
    if untrained and config is not None:
        networks["untrained"] = first._replace(encoder=cast(Encoder, untrained_encoder(config, seed)))
    sources = {
        name: partial(extract_features, one.encoder, mean=one.mean, std=one.std, device=device)
        for name, one in networks.items()
    }
    return patch_figure(pixels, sources, {name: one.encoder.patch_size for name, one in networks.items()}, shown=shown)


def _loaded(encoder: Drawn, trust_imports: bool) -> tuple[_Network, Config | None]:
    """Return an encoder, and the config of its run or recipe."""
    if isinstance(encoder, FrozenEncoder):
        about = encoder.provenance
        return _Network(cast(Encoder, encoder.vit), about.mean, about.std, encoder.image_size), None
    if isinstance(encoder, Recipe):
        recipe, config = encoder, _config_of(encoder)
    else:
        config, recipe, *_ = load_run(os.fspath(encoder), trust_imports=trust_imports)
    network = cast(Encoder, recipe.encoder_for(encoder_named(recipe)))
    return _Network(network, config.data.mean, config.data.std, config.data.image_size), config


def _config_of(recipe: Recipe) -> Config:
    if recipe.config is None:
        raise ValueError("the recipe has no config: make it with jepa_kit.build")
    return recipe.config


def _with_data_here(config: Config) -> Config:
    """Return a config without ``data.shards`` if nothing is there, as in configs for a data set of the user's."""
    shards = config.data.shards
    if shards is None or any("://" in path or os.path.exists(path) for path in expand(shards)):
        return config
    return replace(config, data=replace(config.data, shards=None))


def _pixels(images: Shown, size: tuple[int, int]) -> Tensor:
    """Return [B, 3, h, w] uint8; images that are not a tensor are resized and cropped to ``size``."""
    if isinstance(images, Tensor):
        return images
    crop = CenterCrop(image_size=size)
    if not len(images):
        raise ValueError("images (=[]) must be at least one")
    return stack([crop(opened(image)) for image in images])


def plot_curves(run: str | os.PathLike[str]) -> Figure:
    """Return a figure of a run's loss, schedules and speed, and of its evaluation if it has any.

    Args:
        run: the run folder.

    Raises:
        ValueError: it has no logged step.
    """
    figure = curves_figure(Path(run).expanduser(), PANELS)
    if figure is None:
        raise ValueError(f"run (={os.fspath(run)!r}) must be a run folder with logged steps: it has no metrics.jsonl")
    return figure
