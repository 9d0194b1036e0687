"""Lengths of runs: the steps of each arm, so that all cost as many steps, images or FLOP as the base arm."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jepa_kit.config import Config
from jepa_kit.studies.spec import Match

TOLERANCE = 0.01
"""Largest difference in cost between an arm and the base arm."""


@dataclass(frozen=True)
class Length:
    """The length of an arm's runs.

    Args:
        epochs: as in the config, so that a warm-up is the same fraction of every arm's run.
        steps_per_epoch: updates in an epoch.
        batch_size: images of an update.
        flop_per_image: of a training step.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int
    flop_per_image: float

    @property
    def steps(self) -> int:
        """Return the number of updates."""
        return self.epochs * self.steps_per_epoch

    @property
    def images(self) -> int:
        """Return the number of images, each counted as often as it is used."""
        return self.steps * self.batch_size

    @property
    def flop(self) -> float:
        """Return the FLOP of the run."""
        return self.images * self.flop_per_image

    def cost(self, match: Match) -> float:
        """Return what ``match`` compares."""
        return {"steps": self.steps, "images": self.images, "flops": self.flop}[match] if match != "none" else 0.0


def own_length(config: Config, samples: int, flop_per_image: float) -> Length:
    """Return the length that a config has by itself.

    Raises:
        ValueError: a batch is larger than the data set.
    """
    batch = config.train.batch_size
    per_epoch = config.train.steps_per_epoch or samples // batch
    if per_epoch < 1:
        raise ValueError(f"train.batch_size (={batch}) must be at most the data set's {samples} samples")
    return Length(config.train.epochs, per_epoch, batch, flop_per_image)


def matched_length(length: Length, base: Length, match: Match) -> Length:
    """Return the length of an arm with the cost of the base arm; its epochs are as before.

    Raises:
        ValueError: its cost cannot be within ``TOLERANCE``, because its epochs are too short.
    """
    if match == "none":
        return length
    wanted = base.cost(match)
    epoch = replace(length, steps_per_epoch=1).cost(match)
    matched = replace(length, steps_per_epoch=max(1, round(wanted / epoch)))
    error = matched.cost(match) / wanted - 1
    if abs(error) > TOLERANCE:
        raise ValueError(
            f"train.epochs (={length.epochs}) of {matched.steps_per_epoch} steps cost {100 * abs(error):.1f} % "
            f"{'more' if error > 0 else 'less'} {match} than the base arm, which match (={match}) allows up to "
            f"{100 * TOLERANCE:.0f} %: longer runs or fewer train.epochs can be matched"
        )
    return matched


def with_length(config: Config, length: Length) -> Config:
    """Return the config with its steps written out."""
    return replace(config, train=replace(config.train, epochs=length.epochs, steps_per_epoch=length.steps_per_epoch))
