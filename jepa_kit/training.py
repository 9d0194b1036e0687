"""Training with everything that jepa_kit has: evaluation inside the run, and weights of other formats to start from.

It is above ``engine/train.py``, which does the training and imports neither evaluation/ nor interop/: they are passed
to it here.

    from jepa_kit.config import load_config
    from jepa_kit.training import train

    folder = train(load_config("config.yaml", ["train.epochs=10"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jepa_kit.config import Config
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.engine import train as engine
from jepa_kit.engine.run import HookFactory
from jepa_kit.evaluation.online import PANELS, online_evaluation
from jepa_kit.interop import start


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str | None = None,
    hooks: Sequence[HookFactory] = (),
    dataset: ShardDataset | None = None,
) -> Path:
    """Train a config, as ``jepa_kit.engine.train.train``, with the evaluation that its section ``evaluate`` selects.

    Args:
        config: from ``load_config``, which checks it.
        resume: resume the run in ``train.output_dir``.
        resume_from: a checkpoint of the run, or a released one to start from.
        hooks: more hooks, each made by a function of the run (jepa_kit/engine/run.py).
        dataset: the images, in place of ``data.shards``; the same on all processes.

    Returns:
        the run folder.

    Raises:
        as ``jepa_kit.engine.train.train``.
    """
    return engine.train(
        config,
        resume=resume,
        resume_from=resume_from,
        hooks=[online_evaluation, *hooks],
        panels=PANELS,
        foreign=start,
        dataset=dataset,
    )
