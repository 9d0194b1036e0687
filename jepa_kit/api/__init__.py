"""The Python API: the functions that ``import jepa_kit`` offers (docs/python.md).

models.py      build, list_configs, list_parts
runs.py        train
evaluation.py  evaluate
pictures.py    plot_masks, plot_patches, plot_curves
configs.py     the configs and overrides that they take; data.py: the images
"""
