"""Transforms: what happens to an image between its file and the encoder.

crops.py     crops, resizing and flips, and their computation and application
colours.py   colour, blur and solarisation
pipeline.py  a list of transforms as one function of image files and random numbers; batches and their normalisation
"""

from jepa_kit.data.transforms.colours import ColorJitter, GaussianBlur, Grayscale, Solarize
from jepa_kit.data.transforms.crops import (
    ATTEMPTS,
    Box,
    CenterCrop,
    Crop,
    Described,
    HorizontalFlip,
    RandomResizedCrop,
    Resize,
    Transform,
    VerticalFlip,
    Window,
    crop_box,
    resample,
)
from jepa_kit.data.transforms.pipeline import Pipeline, build_pipeline, eval_pipeline, normalize, stack, train_pipeline

__all__ = [
    "ATTEMPTS",
    "Box",
    "CenterCrop",
    "ColorJitter",
    "Crop",
    "Described",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "Pipeline",
    "RandomResizedCrop",
    "Resize",
    "Solarize",
    "Transform",
    "VerticalFlip",
    "Window",
    "build_pipeline",
    "crop_box",
    "eval_pipeline",
    "normalize",
    "resample",
    "stack",
    "train_pipeline",
]
