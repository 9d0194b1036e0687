"""Weights in and out: the released checkpoints, Hugging Face, timm, safetensors, ONNX, and our own.

    encoder = load_encoder("IN1K-vit.h.14-300e.pth.tar")      # frozen.py, on top of formats.py
    convert("runs/first", "exported", to="hf")                # formats.py

formats.py recognises (files.py), reads and writes; one file a format: official.py, native.py (jepa_kit), hf.py,
timm.py, safetensors.py, onnx.py. weights.py is what an encoder is in between. start.py begins a run from such files.
"""

from jepa_kit.interop.formats import convert, read_encoder
from jepa_kit.interop.frozen import FrozenEncoder, load_encoder

__all__ = ["FrozenEncoder", "convert", "load_encoder", "read_encoder"]
