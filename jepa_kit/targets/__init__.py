"""Targets: what is predicted at the target patches."""

from __future__ import annotations

from jepa_kit.targets.pixel import PixelTarget
from jepa_kit.targets.representation import RepresentationTarget

__all__ = ["PixelTarget", "RepresentationTarget"]
