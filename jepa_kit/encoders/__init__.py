"""Context and target encoders: images and patches to tokens."""

from __future__ import annotations

from jepa_kit.encoders.attention import attend
from jepa_kit.encoders.attention_general import token_pairs
from jepa_kit.encoders.vit import SIZES, ViT

__all__ = ["SIZES", "ViT", "attend", "token_pairs"]
