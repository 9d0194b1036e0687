"""Transforms: what is done to an image between its file and the encoder.

windows.py                     which part of an image becomes the result, as numbers
decoders.py                    the pixels of a window of a file: Pillow's, or faster
crops.py, flips.py, colours.py the registered transforms
view.py                        a list of them as one function of (bytes, draws), and the draws
tensors.py                     batches of views, and their normalisation
"""

from jepa_kit.data.transforms.colours import ColorJitter, GaussianBlur, Grayscale, Solarize
from jepa_kit.data.transforms.crop_geometry import ATTEMPTS, Box, Window, crop_box, resample
from jepa_kit.data.transforms.crops import CenterCrop, RandomResizedCrop, Resize
from jepa_kit.data.transforms.flips import Flip
from jepa_kit.data.transforms.tensors import Stack, normalize, stack
from jepa_kit.data.transforms.view import Crop, Transform, View, build_view, eval_view, train_view

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
    "Stack",
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
