"""Read and write weights: released checkpoints, Hugging Face, timm, safetensors, ONNX, and jepa_kit's own formats.

    encoder = load_encoder("IN1K-vit.h.14-300e.pth.tar")      # frozen.py, on top of formats.py
    convert("runs/first", "exported", to="hf")                # formats.py

formats.py reads and writes any format, which files.py detects; each format has a module: official.py, native.py
(jepa_kit), hf.py, timm.py, safetensors.py, onnx.py. reference.py reads weights of a whole recipe from
safetensors, as those of reference runs. weights.py has the common representation of an encoder. start.py
starts a run from such files. teacher.py makes a file's encoder the target encoder of a run, hf_vision.py that of any
vision model of transformers.
"""

from jepa_kit.interop.formats import convert, read_encoder
from jepa_kit.interop.frozen import FrozenEncoder, load_encoder
from jepa_kit.interop.teacher import read_teacher

__all__ = ["FrozenEncoder", "convert", "load_encoder", "read_encoder", "read_teacher"]
