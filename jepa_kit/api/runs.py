"""``train`` a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_kit.api.configs import AnyConfig, checked_config
from jepa_kit.api.data import Images, training_images
from jepa_kit.engine.run import HookFactory


def train(
    config: AnyConfig,
    /,
    *,
    images: Images | None = None,
    resume: bool = False,
    resume_from: str | os.PathLike[str] | None = None,
    hooks: Sequence[HookFactory] = (),
    **overrides: Any,
) -> Path:
    """Train a config as tools/train_net.py does, and return the run folder, ``train.output_dir``.

    Args:
        config: name (``list_configs``), path, mapping or checked config; a run folder to resume its run.
        images: to train on, see ``Images``; None for ``data.shards`` of the config.
        resume: resume the run in ``train.output_dir``; exact, if the images are the same.
        resume_from: a checkpoint of the run, or a released one to start from.
        hooks: more evaluations inside the run (jepa_kit/engine/run.py).
        overrides: of the config, as for ``build``: ``train={"epochs": 10, "output_dir": "output/first"}``.

    Raises:
        ConfigError: with every mistake of the config and the overrides.
        ValueError, RuntimeError, ...: as ``jepa_kit.training.train``.
    """
    from jepa_kit.training import train as train_config  # here: it imports scikit-learn

    source = None if resume_from is None else os.fspath(resume_from)
    if resume and isinstance(config, str | os.PathLike) and os.path.isdir(config):
        overrides = {"train.output_dir": config, **overrides}  # that of its config starts where the run was started
    checked, dataset = training_images(checked_config(config, overrides), images)
    return train_config(checked, resume=resume, resume_from=source, hooks=hooks, dataset=dataset)
