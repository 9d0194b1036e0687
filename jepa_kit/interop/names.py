"""Names of weights: remove the prefixes of wrappers, and reject tokens that I-JEPA does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from jepa_kit.errors import CheckpointError

T = TypeVar("T")

WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "module",
    "backbone",
    "ijepa",
    "vit",
    "beit",
    "data2vec_vision",
)
"""Name parts added by torch.compile, FSDP1, activation checkpointing, DDP, probes and transformers' classifier, at the
front or inside."""

TOKENS = ("cls_token", "class_token", "reg_token", "register_tokens", "dist_token")


def bare(name: str) -> str:
    """Return a name without wrappers: ``module.blocks.0._fsdp_wrapped_module.norm1.bias`` -> ``blocks.0.norm1.bias``.

    A name that consists only of wrappers is unchanged.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def strip_names(
    state: Mapping[str, T],
    what: str,
    prefix: str | None = None,
    heads: tuple[str, ...] = (),
    *,
    tokens: bool = False,
) -> tuple[dict[str, T], list[str]]:
    """Return a state dict without wrappers in its names, and the omitted names.

    Args:
        state: values by name.
        what: name of the file in messages.
        prefix: keep names that begin with it, without it; omit the others.
        heads: omit names that begin with one of these, of layers after the encoder.
        tokens: whether the format has class tokens.

    Raises:
        CheckpointError: no name begins with ``prefix``, two names become one, or there is a class token or registers.
    """
    named = {bare(name): name for name in state}
    if len(named) < len(state):
        twice = next(name for name in state if named[bare(name)] != name)
        raise CheckpointError(f"{what} has both {twice!r} and {named[bare(twice)]!r}, the same name unwrapped")
    left_out: list[str] = []
    stem = ".".join(part for part in (prefix or "").split(".") if part and part not in WRAPPERS)
    if stem:
        stem += "."
        left_out = [name for name in named if not name.startswith(stem)]
        if len(left_out) == len(named):
            starts = ", ".join(list(dict.fromkeys(name.partition(".")[0] for name in named))[:8])
            raise CheckpointError(f"{what} has no name that begins with {prefix!r}; names begin with {starts}")
        named = {name.removeprefix(stem): old for name, old in named.items() if name.startswith(stem)}
    found = [name for name in named if name.rpartition(".")[2] in TOKENS]
    if found and not tokens:
        raise CheckpointError(
            f"{what} is a ViT with extra tokens ({', '.join(found)}), such as DINO's or MAE's; I-JEPA's encoder has "
            "only patch tokens, so these weights cannot be loaded"
        )
    left_out += [name for name in named if name.startswith(heads)]
    return {name: state[old] for name, old in named.items() if not name.startswith(heads)}, left_out


def hint(names: Mapping[str, object], wanted: str) -> str:
    """Return advice on ``prefix`` if a name ends with ``wanted``, else an empty string."""
    found = next((name.removesuffix(wanted) for name in names if name.endswith(f".{wanted}")), None)
    return f"; prefix={found!r} (--prefix) selects the names that begin with it" if found else ""
