"""Where the page's files and programs are, and a recipe in which every weight matters."""

import shutil
from pathlib import Path

import torch

from jepa_kit.from_config import build_recipe

HERE = Path(__file__).parent
STATIC = HERE.parents[1] / "jepa_kit" / "demo" / "static"
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_recipe(config):
    """Return a recipe in which every weight matters: all are random, those of the two encoders differ."""
    torch.manual_seed(0)
    recipe = build_recipe(config).eval()
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.ndim == 1) * 0.3)
    return recipe
