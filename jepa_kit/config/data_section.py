"""The section ``data`` of a config: the images, how they are read, and the views of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jepa_kit.config.renamed import RELEASED_CROP
from jepa_kit.config.section import Section, above_0, at_least, option
from jepa_kit.registry import TRANSFORMS

LARGEST_SIDE = 65_536
"""Largest side of an image, in pixels."""
MOST_WORKERS = 1024
"""Largest number of loader processes of a rank; no machine has more cores."""
_SCALE = ", as pixel values are in [0, 1]: divide values of the scale from 0 to 255 by 255"

_SIDES = f"from 1 to {LARGEST_SIDE:,} pixels each way"


def _is_size(size: tuple[int, int]) -> bool:
    return min(size) >= 1 and max(size) <= LARGEST_SIDE


def _names(transforms: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [part.get("name") for part in transforms]


def _without_crop(transforms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a message if no transform sets the size of the result."""
    crops = [name for name in TRANSFORMS.names() if hasattr(TRANSFORMS.get(name), "window")]
    names = _names(transforms)
    if set(names) & set(crops):
        return []
    return [f"transforms (={names}) must have one that sets the size: {', '.join(crops)}"]


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Section):
    """One or several views of each image that are made alike, with different random numbers.

    Args:
        count: number of these views.
        transforms: as ``data.transforms``, which is the default.
        image_size: (height, width) in pixels; by default ``data.image_size``. In YAML one number means a square.
        masked: whether these views have masks, which the slot ``masker`` draws on the grid of their own size.
        same_draws: names of transforms whose random numbers are those of the first view.
        action: whether these views have an action, which says how each was made (docs/data.md).

    Raises:
        ConfigError: a value is outside its range.
    """

    count: int = at_least(1, 1)
    transforms: Sequence[Mapping[str, Any]] | None = option("a list of at least one", bool, None, parts=TRANSFORMS)
    image_size: tuple[int, int] | None = option(_SIDES, _is_size, None)
    masked: bool = False
    same_draws: tuple[str, ...] = ()
    action: bool = False

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """Return a problem if no transform sets the size."""
        return _without_crop(values["transforms"]) if values["transforms"] else []


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The images, and how they are read and transformed.

    Args:
        image_size: (height, width) in pixels; in YAML one number means a square.
        shards: folder of shards or of images, pattern of shards or list of these, local or remote (docs/data.md);
            needed to train, not to build a recipe.
        cache: folder of cached remote shards; None for a temporary folder of each process.
        cache_gb: limit of that folder in 10**9 bytes; None for no limit, or 20 if it is temporary.
        retries: retries after a stream broke, stalled or was refused; progress resets the count.
        backoff: seconds before the first retry; each next wait is twice as long, up to a minute.
        timeout: seconds without a byte after which a stream counts as stalled.
        max_skipped: fraction of an epoch's samples that may be skipped as unreadable (8 always may) before the run
            stops; 0 stops it at the first.
        views: the views of each image, for recipes that compare several; by default one, which is masked if the recipe
            has a masker.
        transforms: applied to a training image, in order: the name and the options of each (docs/data.md); in YAML
            null means the release's random resized crop, the default.
        decoder: "pillow"; or "fast": simplejpeg and torch's resizing, within one level of 255 of "pillow".
        max_pixels: largest number of pixels (rows times columns) of an image that is decoded.
        mean, std: of the channels, for pixel values in [0, 1]; by default those of ImageNet.
        shuffle_window: number of samples that are shuffled together.
        num_workers: loader processes of each rank; 0 loads in the training process. "auto" is its usable cores on CUDA,
            a quarter of them on a CPU, and 0 if loading takes a negligible time (jepa_kit/data/workers.py).
        prefetch: batches that are copied to a CUDA device ahead of their step; 0 copies each when it is needed.

    Raises:
        ConfigError: a value is outside its range.
    """

    image_size: tuple[int, int] = option(_SIDES, _is_size)
    shards: str | tuple[str, ...] | None = option("a path, or at least one", bool, None)
    cache: str | None = option("a path", bool, None)
    cache_gb: float | None = above_0(None)
    retries: int = at_least(0, 5)
    backoff: float = at_least(0, 1.0)
    timeout: float = above_0(60.0)
    max_skipped: float = option("in [0, 1]", lambda x: 0 <= x <= 1, 0.01)
    transforms: Sequence[Mapping[str, Any]] = option("a list of at least one", bool, (RELEASED_CROP,), parts=TRANSFORMS)
    views: Sequence[ViewConfig] | None = option("a list of at least one", bool, None, items=ViewConfig)
    decoder: Literal["pillow", "fast"] = "pillow"
    max_pixels: int = at_least(1, 89_478_485)
    mean: tuple[float, float, float] = option(
        f"in [0, 1] each{_SCALE}", lambda x: all(0 <= v <= 1 for v in x), (0.485, 0.456, 0.406)
    )
    std: tuple[float, float, float] = option(
        f"in (0, 1] each{_SCALE}", lambda x: all(0 < v <= 1 for v in x), (0.229, 0.224, 0.225)
    )
    shuffle_window: int = at_least(1, 16384)
    num_workers: int | Literal["auto"] = option(
        f'from 0 to {MOST_WORKERS}, or "auto"', lambda x: x == "auto" or 0 <= x <= MOST_WORKERS, "auto"
    )
    prefetch: int = at_least(0, 2)

    def entries(self) -> list[tuple[str, ViewConfig]]:
        """Return each entry of ``views`` with its path, and with what it takes from this section; one without any."""
        if self.views is None:
            return [("data", ViewConfig(transforms=self.transforms, image_size=self.image_size, masked=True))]
        return [
            (
                f"data.views[{i}]",
                replace(
                    view, transforms=view.transforms or self.transforms, image_size=view.image_size or self.image_size
                ),
            )
            for i, view in enumerate(self.views)
        ]

    @property
    def num_views(self) -> int:
        """Number of views of each image."""
        return sum(view.count for _, view in self.entries())

    @property
    def action_size(self) -> int:
        """Most numbers that the action of a view has; 0 if none has one."""
        described = [view.transforms or () for _, view in self.entries() if view.action]
        return max(
            (sum(getattr(TRANSFORMS.get(part["name"]), "action_size", 0) for part in parts) for parts in described),
            default=0,
        )

    @property
    def view_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each view."""
        return [size for _, view in self.entries() if (size := view.image_size) for _ in range(view.count)]

    @classmethod
    def relations(cls, values: Mapping[str, Any]) -> list[str]:
        """Return problems of the transforms and views together."""
        problems = _without_crop(values["transforms"])
        views: Sequence[ViewConfig] = values["views"] or ()
        names = [_names(view.transforms or values["transforms"]) for view in views]
        for i, view in enumerate(views):
            at = f"views[{i}].same_draws (={list(view.same_draws)})"
            if view.same_draws and i == 0 and view.count == 1:
                problems.append(f"{at} has no effect: this is the first view")
            if view.action and (silent := [name for name in names[i] if not hasattr(TRANSFORMS.get(name), "action")]):
                problems.append(
                    f"views[{i}].action (=True) needs transforms with action and action_size, which {silent[0]} lacks"
                )
            for name in view.same_draws:
                without = [f"that of views[{k}]" for k in sorted({0, i}) if name not in names[k]]
                if without:
                    problems.append(f"{at} must name transforms of both lists, but {name!r} is not in {without[0]}")
        return problems
