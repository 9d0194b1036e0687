"""Notes, at the start of a run, on settings that do not fit its batch size, its data, its grid or its length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from jepa_kit.config import Config
from jepa_kit.config.learning_rate import note_on_rate
from jepa_kit.engine.run import Run
from jepa_kit.engine.schedules import Schedule
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_masker
from jepa_kit.interfaces import Masker
from jepa_kit.structures import MaskBatch
from jepa_kit.target_updates import EMA

FEW_STEPS = 300
"""Fewer updates teach little: the quickstart has 4,032."""
FEW_IN_EPOCH = 10
LONG_WARMUP = 0.25
"""Fraction of the schedule; the release has 40 epochs of 300, the paper 15."""
FIRST_WEIGHTS = 0.1
"""Fraction of its random first weights that a target encoder may have at the end."""
FORGOTTEN = 4.0
"""Sum of 1 - momentum that leaves exp(-4), 2 %, of the first weights."""
POINTS = 1000
"""Updates at which a schedule is evaluated."""
SMALL_CONTEXT, SMALL_TARGET = 8, 4
"""Patches, on average. The paper's grids of 14 x 14 and 16 x 16 give contexts of 50 to 90, and targets of 30."""
FEW_SETS, LARGE_GRID = 8, (16, 16)
DRAWN = 128
"""Images whose masks are drawn."""


def notes_on_fit(run: Run) -> list[str]:
    """Return what does not fit; each has the numbers and what would be right."""
    config = run.config
    rate = note_on_rate(config.lr_chosen, config.optim, config.train) if config.lr_chosen else None
    update = getattr(run.jepa, "target_update", None)
    return [
        *([rate] if rate else []),
        *notes_on_length(config, len(run.dataset), run.loader.steps_per_epoch, run.schedule),
        *(notes_on_momentum(run.schedule, update) if isinstance(update, EMA) and not config.train.init_from else []),
        *(note for view in run.loader.views if view.masker for note in notes_on_masks(config, view.masker)),
    ]


def notes_on_length(config: Config, samples: int, steps_per_epoch: int, schedule: Schedule) -> Iterator[str]:
    """Yield notes on the number of updates and the warm-up.

    Args:
        config: of the run.
        samples: images of the data set.
        steps_per_epoch: updates in a pass over the data.
        schedule: of the run.
    """
    batch, epochs = config.train.batch_size, config.train.epochs
    if steps_per_epoch < FEW_IN_EPOCH:
        smaller = 2 ** max(0, int(math.log2(max(1, samples / FEW_IN_EPOCH))))
        left_out = f", and leaves out {samples % batch:,} of them in each epoch" if samples % batch else ""
        yield (
            f"train.batch_size (={batch}) makes {steps_per_epoch} updates of {samples:,} images{left_out}; "
            f"train.batch_size={smaller} makes {samples // smaller}"
        )
    if schedule.steps < FEW_STEPS:
        wanted = math.ceil(FEW_STEPS * epochs / schedule.steps)
        yield (
            f"the run has {schedule.steps:,} updates in train.epochs (={epochs}), and networks learn little in fewer "
            f"than {FEW_STEPS}: train.epochs={wanted} or more, or a smaller batch"
        )
    if schedule.warmup_steps > LONG_WARMUP * schedule.planned:
        right = 0.1 * epochs * config.optim.stretch
        yield (
            f"optim.warmup_epochs (={config.optim.warmup_epochs:g}) is {schedule.warmup_steps / schedule.planned:.0%} "
            f"of the schedule, in which the learning rate is below its peak; a tenth is optim.warmup_epochs={right:g}"
        )


def notes_on_momentum(schedule: Schedule, update: EMA) -> Iterator[str]:
    """Yield a note if the target encoder keeps much of its first weights to the end of the run."""
    steps = schedule.steps
    some = np.linspace(0, steps - 1, min(steps, POINTS)).round().astype(int)
    momenta = [update.momentum(schedule.where(int(step))) for step in some]
    left = float(np.prod(momenta)) ** (steps / len(some))
    if left > FIRST_WEIGHTS:
        first = 1.0 - max(2 * FORGOTTEN / steps - (1.0 - update.last), 0.0)
        lower = f"target_update.momentum='[{math.floor(1000 * max(first, 0.9)) / 1000:g}, {update.last:g}]'"
        yield (
            f"target_update.momentum (=[{update.first:g}, {update.last:g}]) leaves {left:.0%} of the target encoder's "
            f"random first weights after {steps:,} updates: {lower}" + (", or a longer run" if first < 0.9 else "")
        )


def notes_on_masks(config: Config, masker: Masker) -> Iterator[str]:
    """Yield notes on a masker that leaves few patches, or draws few different sets, on its grid."""
    masks = _draw(masker, config.train.seed)
    shown = f"{masker.grid[0]} x {masker.grid[1]}"
    remedy = "encoder.patch_size or a larger data.image_size"
    for what, sets, least in (("contexts", masks.context, SMALL_CONTEXT), ("targets", masks.targets, SMALL_TARGET)):
        mean = sets.num_patches / max(len(sets), 1)
        if mean < least:
            yield f"{what} have {mean:.1f} patches on average, on a grid of {shown}: a smaller {remedy} gives more"
    found = _distinct(masks)
    if found < FEW_SETS:
        with suppress(ConfigError):  # options that fit this grid alone
            large = _distinct(_draw(build_masker(config, LARGE_GRID), config.train.seed))
            if large > 4 * found:
                yield (
                    f"masker {config.slots['masker'].name!r} draws {found} different target sets for {DRAWN} images on "
                    f"a grid of {shown}, and {large} on {LARGE_GRID[0]} x {LARGE_GRID[1]}: a smaller {remedy} helps"
                )


def _draw(masker: Masker, seed: int) -> MaskBatch:
    return masker(np.arange(DRAWN), seed=seed, epoch=0, step=0)


def _distinct(masks: MaskBatch) -> int:
    return len({tuple(cells.tolist()) for cells in masks.targets.split()})
