"""Context and target encoders: images and patches to tokens."""

from __future__ import annotations

from jepa_kit.encoders.attention import attend
from jepa_kit.encoders.conv import ConvEncoder
from jepa_kit.encoders.sizes import SIZES
from jepa_kit.encoders.vit import ViT
from jepa_kit.set_lengths import token_pairs

__all__ = ["SIZES", "ConvEncoder", "ViT", "attend", "token_pairs"]
