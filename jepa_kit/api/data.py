"""The images that ``train`` and ``evaluate`` take: paths, and data sets of other libraries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

from torch.utils.data import Dataset

from jepa_kit.api.configs import checked_config
from jepa_kit.config import Config
from jepa_kit.data.items import item_samples
from jepa_kit.data.listed import ListedSamples, image_files
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.writing import is_image
from jepa_kit.data.sources.base import Refused
from jepa_kit.data.sources.hub import HubDataset
from jepa_kit.engine.build import open_shards
from jepa_kit.errors import SampleError


class Items(Protocol):
    """A data set with a length and items by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: Any, /) -> Any: ...


Path = str | os.PathLike[str]
Images = Path | Sequence[Any] | Items | Dataset[Any] | ListedSamples | ShardDataset
"""Images of ``train`` and ``evaluate``, one of:

- a folder of images, a folder of shards, a shard or a pattern of shards; or a list of these (docs/data.md);
- a list of paths of image files;
- a data set with ``len`` and ``[i]`` whose items are images or begin with one: a torch ``Dataset``, a Hugging Face
  data set, a tensor, a list (``jepa_kit.data.items``);
- ``ListedSamples`` or a ``ShardDataset`` of jepa_kit.
"""


def training_images(config: Config, images: Images | None) -> tuple[Config, ShardDataset | None]:
    """Return the config and the data set of a run; ``data.shards`` of the config is the paths that are given, if any.

    Raises:
        ValueError: the images are none of ``Images``.
    """
    if images is None:
        return config, None
    if (paths := _shards(images)) is not None:
        return checked_config(config, {"data.shards": paths}), None
    dataset = open_images(images, config, labels=config.evaluate.label is not None)
    return replace(config, data=replace(config.data, shards=None)), dataset


def open_images(images: Images, config: Config | None, *, labels: bool = True) -> ShardDataset:
    """Return images as a data set; remote shards are read as the config says.

    Args:
        images: see ``Images``.
        config: None for its defaults.
        labels: whether to read all items of a data set for their labels, if these are needed.

    Raises:
        ValueError: the images are none of ``Images``.
    """
    if isinstance(images, ShardDataset):
        return images
    if (paths := _shards(images)) is not None:
        return ShardDataset(paths) if config is None else open_shards(config, paths)
    if isinstance(images, ListedSamples):
        return ShardDataset(images)
    if _are_paths(images):
        return ShardDataset(image_files(images))
    return ShardDataset(_hugging_face(images) if _is_hugging_face(images) else item_samples(images, labels=labels))


def _shards(images: Images) -> str | list[str] | None:
    """Return paths that ``data.shards`` can be, or None."""
    if isinstance(images, str | os.PathLike):
        return os.fspath(images)
    if _are_paths(images) and not all(is_image(os.fspath(path)) for path in images):
        return [os.fspath(path) for path in images]
    return None


def _are_paths(images: Images) -> TypeGuard[Sequence[Path]]:
    return isinstance(images, list | tuple) and bool(images) and all(isinstance(x, str | os.PathLike) for x in images)


def _is_hugging_face(images: Any) -> bool:
    """Return whether this is a ``datasets.Dataset`` with a column of images."""
    features = getattr(images, "features", None)
    kinds = [type(feature).__name__ for feature in features.values()] if isinstance(features, dict) else []
    if type(images).__module__.partition(".")[0] != "datasets" or not hasattr(images, "__len__"):
        return False
    if kinds.count("Image") > 1:
        raise ValueError(f"images (={images!r:.200}) must have one column of images: select_columns chooses one")
    return "Image" in kinds


def _hugging_face(dataset: Any) -> ListedSamples:
    """Return the rows of a Hugging Face data set, with the bytes of its files; labels are its ClassLabel columns."""
    source = HubDataset("images", parts={"rows": dataset.with_format(None)})
    return item_samples(_Rows(source), labels=source.labels, name="Dataset of Hugging Face")


@dataclass(frozen=True, eq=False)
class _Rows:
    """The bytes of the images of a Hugging Face data set, by number."""

    source: HubDataset

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> bytes:
        try:
            return self.source.image_bytes(i)
        except Refused as error:
            raise SampleError(str(error)) from error
