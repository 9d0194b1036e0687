"""Heads: maps of an encoder's features, or of another head's, that only training uses."""

from jepa_kit.heads.mlp import MLPHead
from jepa_kit.heads.prototypes import Prototypes

__all__ = ["MLPHead", "Prototypes"]
