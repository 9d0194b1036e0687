"""Heads: maps of an encoder's features, or of another head's, that only training uses."""

from jepa_kit.heads.mlp import MLPHead

__all__ = ["MLPHead"]
