"""Joint-embedding predictive architectures: recipes whose parts are exchangeable, training, evaluation.

    recipe = jepa_kit.build("ijepa/in1k_vits16", masker={"num_targets": 6})
    folder = jepa_kit.train("ijepa/quickstart", images="photos/train", train={"epochs": 10})
    rows = jepa_kit.evaluate(folder, "knn", train="photos/train", test="photos/val")
    encoder = jepa_kit.load_encoder(folder)

docs/python.md has all names with examples. Nothing is imported before it is used, so that a loader worker or a `--help`
pays only for what it uses. To read the code, start at ``jepa_kit.recipe`` (the equations), ``jepa_kit.config`` (from
YAML to a checked config) and ``jepa_kit.registry`` (how a part gets its name).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepa_kit.api.evaluation import evaluate as evaluate
    from jepa_kit.api.models import build as build
    from jepa_kit.api.models import list_configs as list_configs
    from jepa_kit.api.models import list_parts as list_parts
    from jepa_kit.api.pictures import plot_curves as plot_curves
    from jepa_kit.api.pictures import plot_masks as plot_masks
    from jepa_kit.api.pictures import plot_patches as plot_patches
    from jepa_kit.api.runs import train as train
    from jepa_kit.interop import load_encoder as load_encoder

__version__ = "0.1.0"

_NAMES = {
    "build": "jepa_kit.api.models",
    "evaluate": "jepa_kit.api.evaluation",
    "list_configs": "jepa_kit.api.models",
    "list_parts": "jepa_kit.api.models",
    "load_encoder": "jepa_kit.interop",
    "plot_curves": "jepa_kit.api.pictures",
    "plot_masks": "jepa_kit.api.pictures",
    "plot_patches": "jepa_kit.api.pictures",
    "train": "jepa_kit.api.runs",
}
"""Name -> the module that has it."""


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
