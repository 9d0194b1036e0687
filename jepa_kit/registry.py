"""Registries of parts: a name in YAML chooses a class, whose signature is the schema of its options.

A part is a class whose constructor takes keyword-only, annotated values:

    @MASKERS.register("checkerboard")
    class Checkerboard:
        def __init__(self, *, grid: tuple[int, int], phase: int = 0) -> None: ...

Arguments that the recipe supplies (here ``grid``) are declared with the registry and may not be given in a config.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast

from fvcore.common.registry import Registry

from jepa_kit.errors import ConfigError

T = TypeVar("T", bound=Callable[..., Any])

Backend = Literal["auto", "xformers", "sdpa", "reference"]
"""Backends of ``jepa_kit.encoders.attend``; here, so that configs need not import it."""

REQUIRED: Any = inspect.Parameter.empty
"""The default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """An option of a part: its type, and its default or ``REQUIRED``."""

    name: str
    annotation: Any
    default: Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: '; did you mean 'x'?' if a known name is close, else '.'."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def takes(options: Iterable[str]) -> str:
    """Return a sentence with the names of options."""
    return f"It takes: {', '.join(options) or 'nothing'}"


def not_an_option(path: str, owner: str, options: Iterable[str], hint: str | None = None) -> str:
    """Return the message for an unknown key.

    Args:
        path: of the key, whose last component is its name.
        owner: of the options: " of 'vit'".
        options: names that are known.
        hint: in place of the closest one of them.
    """
    close = did_you_mean(path.rpartition(".")[2], options) if hint is None else hint
    return f"{path} is not an option{owner}{close} {takes(options)}"


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError if ``value`` is not among the values of a Literal."""
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} (={value!r}) must be one of {', '.join(map(repr, allowed))}")


@cache
def signature_options(factory: Callable[..., Any]) -> Mapping[str, Option]:
    """Return the arguments of a callable by name.

    Raises:
        TypeError: an argument has no annotation, or one with an unknown name, or is not keyword-only, or there are
            ``*args`` or ``**kwargs``.
    """
    init = factory.__init__ if inspect.isclass(factory) else factory
    try:
        hints = typing.get_type_hints(init)
    except (AttributeError, NameError) as error:
        raise TypeError(
            f"{factory.__qualname__}: an annotation of its constructor is unknown when the module runs: {error}; an "
            "import under TYPE_CHECKING is not enough, because annotations are the types of options"
        ) from error
    options: dict[str, Option] = {}
    for name, p in inspect.signature(factory).parameters.items():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            stars = "**" if p.kind is p.VAR_KEYWORD else "*"
            wrong = (
                f"{stars}{name} must be replaced by the options themselves, each keyword-only with an annotation: the "
                "signature is the schema of its config, and a part is given only what it names"
            )
        elif p.kind is not p.KEYWORD_ONLY:
            wrong = (
                f"argument {name!r} must be keyword-only (put a * before it): the signature is the schema of its config"
            )
        elif name not in hints:
            wrong = f"argument {name!r} needs an annotation: it is the option's type"
        else:
            options[name] = Option(name, hints[name], p.default)
            continue
        raise TypeError(f"{factory.__qualname__}: {wrong}")
    if dataclasses.is_dataclass(factory):
        for field in dataclasses.fields(factory):
            if field.init and field.default_factory is not dataclasses.MISSING:
                options[field.name] = Option(field.name, options[field.name].annotation, field.default_factory())
    return options


class PartRegistry(Registry):
    """fvcore's Registry with names that need not be those of the classes, and with the contract of a slot.

    Args:
        slot: name of the slot in YAML, in the folders and in the paper.
        supplied: argument that the recipe supplies -> where its value comes from.
        package: module of jepa_kit whose import registers its parts; it is imported at the first look-up.
    """

    def __init__(self, slot: str, supplied: Mapping[str, str] | None = None, *, package: str | None = None) -> None:
        super().__init__(slot)
        self.slot = slot
        self.supplied: dict[str, str] = dict(supplied or {})
        self._package = package

    def import_members(self) -> None:
        """Import the parts of jepa_kit, which register themselves; does nothing the second time."""
        if self._package is not None:
            package, self._package = self._package, None
            importlib.import_module(package)

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class, or a function that returns a part, as ``name``.

        Raises:
            TypeError: the signature breaks the contract (see the module's text), or ``name`` is the class itself.
            ValueError: the name is taken.
        """
        if not isinstance(name, str):
            raise TypeError(f'register(name={name!r}) needs a name: write @register("my_{self.slot}")')

        def add(cls: T) -> T:
            signature_options(cls)
            if taken := self._obj_map.get(name):
                by = f"{taken.__module__}.{taken.__qualname__}"
                raise ValueError(f"{self.slot} {name!r} is already registered by {by}")
            self._do_register(name, cls)
            return cls

        return add

    def __contains__(self, name: object) -> bool:
        self.import_members()
        return name in self._obj_map

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        self.import_members()
        return sorted(self._obj_map)

    def get(self, name: str) -> Any:
        """Return the class registered as ``name``.

        Raises:
            KeyError: the name is not registered; the message lists those that are.
        """
        if name not in self:
            raise KeyError(self.unknown(name))
        return super().get(name)

    def unknown(self, name: object) -> str:
        """Return the message for a name that is not registered."""
        hint = did_you_mean(str(name), self.names())
        return f"{name!r} is not a registered {self.slot}{hint} Registered: {', '.join(self.names()) or 'none'}"

    def options(self, name: str) -> dict[str, Option]:
        """Return the options of a part in a config: its arguments without the supplied ones."""
        return {k: o for k, o in signature_options(self.get(name)).items() if k not in self.supplied}

    def build(self, name: str, options: Mapping[str, Any], **supplied: Any) -> Any:
        """Construct a part from checked options and those supplied values that its constructor takes."""
        cls = self.get(name)
        wanted = signature_options(cls)
        return cls(**options, **{k: v for k, v in supplied.items() if k in wanted})


class RecipeRegistry(PartRegistry):
    """The registry of recipes: arguments of the constructor that are slots decide which slots a config has."""

    def slots(self, name: str) -> list[str]:
        """Return the slots of a recipe, in the order in which data passes them."""
        cls = self.get(name)
        arguments = ["loss" if argument == "losses" else argument for argument in signature_options(cls)]
        found = [*(["masker"] if cls.masked else []), *(x for x in arguments if registry_of(x))]
        order = list(SLOTS.values())
        return sorted(found, key=lambda slot: order.index(cast(PartRegistry, registry_of(slot))))

    def optional_slots(self, name: str) -> set[str]:
        """Return the slots that a config may lack, because the recipe has a default for them."""
        return {k for k, option in signature_options(self.get(name)).items() if option.default is not REQUIRED}

    def options(self, name: str) -> dict[str, Option]:
        """Return the options of a recipe in a config: its arguments that are not slots."""
        options = super().options(name)
        return {k: o for k, o in options.items() if k != "losses" and registry_of(k) is None}


def registry_of(slot: str) -> PartRegistry | None:
    """Return the registry of a slot: of its own name, or of the slot that it ends with, as in ``patch_head``."""
    ends = [name for name in SLOTS if slot == name or slot.endswith(f"_{name}")]
    return SLOTS[max(ends, key=len)] if ends else None


@contextmanager
def located(path: str) -> Iterator[None]:
    """Prefix a constructor's error with the path of its entry in the config: ``masker: num_targets (=0) must be ...``.

    Raises:
        ConfigError: instead of a ValueError, its cause; a ConfigError passes unchanged.
        TypeError, FileNotFoundError: instead of one, its cause.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from error


def build_part(path: str, raw: Mapping[str, Any], registry: PartRegistry, **supplied: Any) -> Any:
    """Construct a part from a mapping with its ``name`` and its options.

    Args:
        path: of the mapping in the config; every message begins with it.
        raw: as in YAML; values are not converted.
        registry: where the name is registered.
        supplied: by the recipe; the part gets those that its constructor takes.

    Raises:
        ValueError: an unregistered name, an unknown option, or a value that the part rejects.
    """
    options = {key: value for key, value in raw.items() if key != "name"}
    name = raw.get("name")
    if name not in registry.names():
        raise ValueError(f"{path}.name: {registry.unknown(name)}")
    known = registry.options(name)
    if unknown := [key for key in options if key not in known]:
        raise ValueError(not_an_option(f"{path}.{unknown[0]}", f" of {name!r}", known))
    try:
        return registry.build(name, options, **supplied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_GRID = "data.image_size over encoder.patch_size"
RECIPES = RecipeRegistry("recipe", package="jepa_kit.joint_embedding")
"""For ``recipe``, which decides the slots of a config; the module imports jepa_kit.recipe."""
MASKERS = PartRegistry("masker", {"grid": _GRID, "patch_size": "the encoder's"}, package="jepa_kit.maskers")
ENCODERS = PartRegistry(
    "encoder", {"image_size": "data.image_size", "attention": "train.attention"}, package="jepa_kit.encoders"
)
PREDICTORS = PartRegistry(
    "predictor",
    {
        "embed_dim": "the encoder's",
        "out_dim": "the target's",
        "grid": _GRID,
        "attention": "train.attention",
        "action_size": "the views with action: true",
    },
    package="jepa_kit.predictors",
)
TARGETS = PartRegistry(
    "target",
    {
        "embed_dim": "the target encoder's",
        "depth": "the target encoder's",
        "patch_size": "the encoder's",
        "mean": "data.mean",
        "std": "data.std",
    },
    package="jepa_kit.targets",
)
HEADS = PartRegistry("head", {"in_dim": "the encoder's width, or another head's"}, package="jepa_kit.heads")
LOSSES = PartRegistry(
    "loss",
    {"embed_dim": "the encoder's", "out_dim": "the target's, or the head's"},
    package="jepa_kit.losses",
)
TARGET_UPDATES = PartRegistry(
    "target_update",
    {"mean": "data.mean", "std": "data.std", "patch_size": "the encoder's", "grid": _GRID},
    package="jepa_kit.target_updates",
)
TRANSFORMS = PartRegistry("transform", {"image_size": "data.image_size"}, package="jepa_kit.data.transforms")
"""For ``data.transforms``, which is not a slot of a recipe."""

READERS = PartRegistry("reader of weights", package="jepa_kit.interop")
"""Functions that read a network from a file for a part, which must not import interop/, above it."""

SLOTS: dict[str, PartRegistry] = {
    r.slot: r for r in (MASKERS, ENCODERS, PREDICTORS, TARGETS, HEADS, LOSSES, TARGET_UPDATES)
}
"""The slots that recipes can have, in the order in which data passes them."""
