"""A verdict on the health of a JEPA: its state and the figures that decided it.

Every figure is a ratio, so no threshold depends on the scale of features, the width or the loss. docs/evaluation.md
shows runs on either side of each threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jepa_kit.evaluation.health.measure import Health

State = Literal["healthy", "not learned", "dimensional collapse", "positional collapse", "constant"]

CONSTANT = 0.06
"""Minimum of ``varying``, the fraction of the tokens' mean square that varies.

Below it, the cosine between two tokens of the data is 0.94 or more on average. Untrained networks have 0.7 or more, and
runs that learn may pass through 0.12. Momentum 0 on the quickstart's recipe reaches 0.05 after 20 to 30 updates, and
then stays at 0.013 to 0.033, depending on the seed.
"""
LAGGING = 2.0
"""Maximum of ``relative_to_mean`` for sound targets. Runs that learn begin at 1.2 or less; if targets shrink faster
than predictions follow, it is 3 to 10."""
POSITIONAL = 0.05
"""Minimum of ``of_images``. Below it, 95 % of the variation of targets is explained by the position of the patch."""
DIMENSIONAL = 0.15
"""Minimum of ``token_rank`` / width. Noise has 1; networks have 0.3 to 0.6, trained or not; a run that predicted only
the brightness of the whole image fell to 0.10; a network of rank 8 in 128 dimensions has 0.06."""
LEARNED = 0.05
"""Minimum of ``cross_sample_gap``. For a squared loss the gap is 2 R^2 / (1 + R^2), with R^2 the fraction of the
variation between images at a position that predictions explain: 0.05 is an R^2 of 2.5 %. A predictor that knows only
positions has a gap of 0 to within 0.01, on 256 images under 4 masks."""


@dataclass(frozen=True)
class Verdict:
    """State of a network.

    Args:
        state: one of five.
        reason: a sentence with the figures that decided.
        figures: name in ``Health`` -> value, of the checks up to the one that decided.
    """

    state: State
    reason: str
    figures: dict[str, float]

    @property
    def collapsed(self) -> bool:
        """Return whether the state is one of the three collapses."""
        return self.state not in ("healthy", "not learned")

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def judge(health: Health) -> Verdict:
    """Return the verdict on measured health: the first of these checks that fails, else ``healthy``.

    1. Do tokens differ at all? If not, ``constant``.
    2. Do tokens of different images differ at the same position? If not, ``positional collapse``.
    3. Do they differ in many directions? If not, ``dimensional collapse``.
    4. Do predictions fit their own image better than another? If not, ``not learned``: the state of every run in its
       first steps, and a failure if it persists.
    """
    gap, rank, width = health.cross_sample_gap, health.token_rank, health.width
    figures = {"varying": health.varying}
    if health.varying < CONSTANT:
        reason = (
            f"tokens are nearly constant: {_percent(health.varying)} of their mean square varies (minimum "
            f"{_percent(CONSTANT)}), and the cosine between two images' features is {health.cosine:.3f}"
        )
        return Verdict("constant", reason, figures | {"cosine": health.cosine})
    figures["of_images"] = health.of_images
    if health.of_images < POSITIONAL:
        reason = (
            "tokens depend on the position of a patch and little on its image: position does not explain "
            f"{_percent(health.of_images)} of their variation (minimum {_percent(POSITIONAL)})"
        )
        return Verdict("positional collapse", reason, figures)
    figures["token_rank"] = rank
    if rank < DIMENSIONAL * width:
        reason = (
            f"tokens fill {rank:.1f} of {width} directions (minimum {DIMENSIONAL * width:.1f}), though images differ; "
            f"{_percent(health.within_images)} of the variation is between patches of one image"
        )
        return Verdict("dimensional collapse", reason, figures)
    figures["cross_sample_gap"] = gap
    against = health.relative_to_position
    position = ""
    if against is not None:
        figures["relative_to_position"] = against
        position = f" and the loss is {against:.2f} of that of each position's mean target"
    if gap < LEARNED:
        against_mean = health.relative_to_mean
        lags = against_mean is not None and against_mean > LAGGING
        state = f"the loss is {against_mean:.1f} times that of the mean target: targets may be shrinking, and"
        reason = (
            f"{state if lags else 'targets are sound, but'} predictions fit another image's targets as well as their "
            f"own (gap {gap:.2f}, minimum {LEARNED}){position}: normal in the first steps, a failure if it persists"
        )
        return Verdict("not learned", reason, figures)
    reason = (
        f"predictions depend on their image (gap {gap:.2f}){position}; tokens differ ({_percent(health.varying)} "
        f"of their mean square, {_percent(health.of_images)} of that between images) in {rank:.0f} of {width} "
        "directions"
    )
    return Verdict("healthy", reason, figures)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"
