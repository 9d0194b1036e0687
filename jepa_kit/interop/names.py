"""Names of weights as other programs wrap them: prefixes that come off, and tokens that I-JEPA does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from jepa_kit.errors import CheckpointError

T = TypeVar("T")

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "backbone")
"""What torch.compile, FSDP1, activation checkpointing, DDP and probes put into names, at the front or inside."""

TOKENS = ("cls_token", "class_token", "reg_token", "register_tokens", "dist_token")


def bare(name: str) -> str:
    """A name without wrappers: ``module.blocks.0._fsdp_wrapped_module.norm1.bias`` -> ``blocks.0.norm1.bias``.

    A name made of wrappers alone stays as it is.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def strip_names(state: Mapping[str, T], what: str, prefix: str | None = None) -> tuple[dict[str, T], list[str]]:
    """A state dict without wrappers in its names, and the names that were left out.

    Args:
        state: by name.
        what: names the file in messages.
        prefix: names that begin with it are taken, without it; the others are left out.

    Raises:
        CheckpointError: no name begins with ``prefix``; two names become one; a class token or registers.
    """
    named = {bare(name): name for name in state}
    if len(named) < len(state):
        twice = next(name for name in state if named[bare(name)] != name)
        raise CheckpointError(f"{what} has both {twice!r} and {named[bare(twice)]!r}, which are one name unwrapped")
    left_out: list[str] = []
    stem = ".".join(part for part in (prefix or "").split(".") if part and part not in WRAPPERS)
    if stem:
        stem += "."
        left_out = [name for name in named if not name.startswith(stem)]
        if len(left_out) == len(named):
            raise CheckpointError(f"{what} has no name that begins with {prefix!r}; it has {_starts(named)}")
        named = {name.removeprefix(stem): old for name, old in named.items() if name.startswith(stem)}
    tokens = [name for name in named if name.rpartition(".")[2] in TOKENS]
    if tokens:
        raise CheckpointError(
            f"{what} is a ViT with extra tokens ({', '.join(tokens)}), such as DINO's or MAE's; I-JEPA's encoder has "
            "patch tokens alone, so these weights cannot be loaded"
        )
    return {name: state[old] for name, old in named.items()}, left_out


def _starts(names: Mapping[str, str]) -> str:
    return ", ".join(list(dict.fromkeys(name.partition(".")[0] for name in names))[:8])


def hint(names: Mapping[str, object], wanted: str) -> str:
    """Advice on ``prefix`` if ``wanted`` is the end of a name: what stands before it."""
    found = next((name.removesuffix(wanted) for name in names if name.endswith(f".{wanted}")), None)
    return f"; prefix={found!r} (--prefix) takes the names that begin so" if found else ""
