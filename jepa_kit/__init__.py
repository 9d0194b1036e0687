"""Joint-embedding predictive architectures: six slots, and small parts that fit them.

    encoder = jepa_kit.load_encoder("IN1K-vit.h.14-300e.pth.tar")    # see jepa_kit.interop

Nothing is imported before it is used, so that a loader worker or a `--help` pays only for what it uses. Start at
``jepa_kit.recipe`` (the equations), ``jepa_kit.config`` (from YAML to a checked config) and
``jepa_kit.registry`` (how a part gets its name).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepa_kit.interop import load_encoder as load_encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "load_encoder":
        from jepa_kit.interop import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
