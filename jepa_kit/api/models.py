"""``build`` a recipe from a config, and list what it can be built from."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, overload

from jepa_kit.api.configs import AnyConfig, checked_config
from jepa_kit.config.shipped import shipped_configs
from jepa_kit.engine.build import training_views
from jepa_kit.from_config import build_recipe
from jepa_kit.recipe import Recipe
from jepa_kit.registry import RECIPES, SLOTS, TRANSFORMS, did_you_mean


def build(config: AnyConfig, /, **overrides: Any) -> Recipe:
    """Return the recipe of a config in training mode, with weights drawn from torch's current random state.

    It is a ``torch.nn.Module`` with ``config`` and ``masker``: ``forward_images`` returns the loss of a batch of
    images, and ``update_target`` moves the target encoder. docs/python.md has a whole loop.

    Args:
        config: name (``list_configs``), path, mapping or checked config.
        overrides: of the config: ``masker={"num_targets": 6}``, or with dots, ``**{"masker.num_targets": 6}``.

    Raises:
        ConfigError: with every mistake of the config, the overrides and the parts.
    """
    checked = checked_config(config, overrides)
    recipe = build_recipe(checked)
    recipe.config = checked
    recipe.maskers = tuple(view.masker for view in training_views(checked))
    return recipe.train()


def list_configs(pattern: str = "*") -> list[str]:
    """Return the names of the configs that ship with jepa_kit, sorted: ``ijepa/in1k_vits16``, ...

    Args:
        pattern: of the names as in a shell: ``ijepa/*``, ``*vits16``.
    """
    return [name for name in shipped_configs() if fnmatch(name, pattern)]


@overload
def list_parts(kind: str) -> list[str]: ...
@overload
def list_parts(kind: None = None) -> dict[str, list[str]]: ...
def list_parts(kind: str | None = None) -> dict[str, list[str]] | list[str]:
    """Return the names of all registered parts of a kind, sorted; or of every kind.

    Args:
        kind: a slot of configs (``masker``, ``encoder``, ``loss``, ...), ``recipe``, ``transform`` of images, or
            ``protocol`` of ``evaluate``. None for a mapping of all.

    Raises:
        ValueError: another kind.
    """
    from jepa_kit.evaluation.protocols import PROTOCOLS  # here: it imports scikit-learn

    registries = {registry.slot: registry for registry in (RECIPES, *SLOTS.values(), TRANSFORMS, PROTOCOLS)}
    if kind is None:
        return {slot: registry.names() for slot, registry in registries.items()}
    if kind not in registries:
        raise ValueError(f"kind (={kind!r}) must be one of {', '.join(registries)}{did_you_mean(kind, registries)}")
    return registries[kind].names()
