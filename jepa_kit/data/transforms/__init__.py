"""Transforms: what happens to an image between its file and the encoder.

crops.py    crops, resizing and flips, and their computation and application
colours.py  colour, blur and solarisation
view.py     a list of transforms as one function of image files and random numbers; batches and their normalisation
"""

from jepa_kit.data.transforms.colours import ColorJitter, GaussianBlur, Grayscale, Solarize
from jepa_kit.data.transforms.crops import (
    ATTEMPTS,
    Box,
    CenterCrop,
    Crop,
    Flip,
    RandomResizedCrop,
    Resize,
    Transform,
    Window,
    crop_box,
    resample,
)
from jepa_kit.data.transforms.view import View, build_view, eval_view, normalize, stack, train_view

__all__ = [
    "ATTEMPTS",
    "Box",
    "CenterCrop",
    "ColorJitter",
    "Crop",
    "Flip",
    "GaussianBlur",
    "Grayscale",
    "RandomResizedCrop",
    "Resize",
    "Solarize",
    "Transform",
    "View",
    "Window",
    "build_view",
    "crop_box",
    "eval_view",
    "normalize",
    "resample",
    "stack",
    "train_view",
]
