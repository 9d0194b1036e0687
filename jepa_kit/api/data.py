"""The images that ``train`` and ``evaluate`` take."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jepa_kit.api.configs import checked_config
from jepa_kit.config import Config
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.engine.build import open_shards

Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | ShardDataset
"""Images: a folder of shards, a shard, a pattern or a list of these (docs/data.md), or a data set of jepa_kit."""


def training_images(config: Config, images: Images | None) -> tuple[Config, ShardDataset | None]:
    """Return the config and the data set of a run; paths become ``data.shards``."""
    if images is None or isinstance(images, ShardDataset):
        return config, images
    return checked_config(config, {"data.shards": _paths(images)}), None


def open_images(images: Images, config: Config | None) -> ShardDataset:
    """Return images as a data set; remote shards are read as the config says."""
    if isinstance(images, ShardDataset):
        return images
    return ShardDataset(_paths(images)) if config is None else open_shards(config, _paths(images))


def _paths(images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str | list[str]:
    return os.fspath(images) if isinstance(images, str | os.PathLike) else [os.fspath(path) for path in images]
