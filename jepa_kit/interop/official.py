"""The parameter names of the released I-JEPA code, and ours.

Encoders have the same names in both, but for the position table, which the release stores and we compute.
The release's predictor puts ``predictor_`` before most of its names, and its mask token has one more axis.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

PREFIX = "predictor_"
POSITIONS = ("pos_embed", "predictor_pos_embed")


def encoder_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released encoder weights under our names; position tables are left out."""
    return {name: value for name, value in state.items() if name not in POSITIONS}


def predictor_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released predictor weights under our names; position tables are left out."""
    return {
        name.removeprefix(PREFIX): value.reshape(1, -1) if name == "mask_token" else value
        for name, value in state.items()
        if name not in POSITIONS
    }


def predictor_name_to_official(name: str) -> str:
    """Our name of a predictor's parameter as the release has it."""
    return name if name == "mask_token" else PREFIX + name
