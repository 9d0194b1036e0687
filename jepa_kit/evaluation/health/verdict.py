"""A verdict in words on the health of a JEPA, with the figures that it rests on.

Four questions are asked in turn, and the first "no" is the verdict. Every figure is a ratio, so none hangs on the scale
of features, on the width or on the loss. Where each line is drawn, and why, stands beside it; docs/evaluation.md shows
what runs look like on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jepa_kit.evaluation.health.measure import Health

State = Literal["healthy", "not learned", "dimensional collapse", "positional collapse", "constant"]

CONSTANT = 0.06
"""Least share of the tokens' mean square that varies. Below it the cosine between two tokens of the data is 0.94 on
average. Networks that were not trained start at 0.7 and more, and runs that learn may pass through 0.12. Momentum 0
on the quickstart's recipe is at 0.05 after 20 to 30 updates, and at 0.013 to 0.033, by the seed, for long after that.
"""
LAGGING = 2.0
"""Loss over that of the mean target, above which targets are not called sound. Runs that learn begin at 1.2 and less;
where targets shrink faster than predictions follow, it is 3 to 10."""
POSITIONAL = 0.05
"""Least share of that variation that is of images. Below it 95 % of what there is to predict is where a patch lies."""
DIMENSIONAL = 0.15
"""Least share of the width that tokens fill. Of noise it would be 1; networks fill 0.3 to 0.6, trained or not; a run
that found nothing to predict but the brightness of the whole image fell to 0.10; a network of rank 8 in 128 has
0.06."""
LEARNED = 0.05
"""Least cross-sample gap. For a squared loss the gap is 2 R^2 / (1 + R^2), where R^2 is the share of the images'
variation at a place that predictions explain: 0.05 is 2.5 % of it. A predictor that knows positions alone has a gap of
0 to within 0.01, on 256 images under 4 masks."""


@dataclass(frozen=True)
class Verdict:
    """What a network's state is called.

    Args:
        state: one of five.
        reason: a sentence with the figures that decided.
        figures: name in ``Health`` -> value, of all that was asked up to there.
    """

    state: State
    reason: str
    figures: dict[str, float]

    @property
    def collapsed(self) -> bool:
        """Whether it is one of the three collapses."""
        return self.state not in ("healthy", "not learned")

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def judge(health: Health) -> Verdict:
    """The verdict on what was measured.

    1. Do tokens differ at all? Else ``constant``.
    2. Do tokens of different images differ at the same place? Else ``positional collapse``.
    3. Do they differ in many directions? Else ``dimensional collapse``.
    4. Do predictions fit their own image better than another? Else ``not learned``: the state of every run in its
       first steps, and a failure where it lasts.
    """
    gap, rank, width = health.cross_sample_gap, health.token_rank, health.width
    figures = {"varying": health.varying}
    if health.varying < CONSTANT:
        reason = (
            f"tokens are nearly the same everywhere: {_percent(health.varying)} of their mean square varies (at least "
            f"{_percent(CONSTANT)} is wanted), and the cosine between two images' features is {health.cosine:.3f}"
        )
        return Verdict("constant", reason, figures | {"cosine": health.cosine})
    figures["of_images"] = health.of_images
    if health.of_images < POSITIONAL:
        reason = (
            "tokens tell where a patch lies and little of its image: position does not explain "
            f"{_percent(health.of_images)} of their variation (at least {_percent(POSITIONAL)} is wanted)"
        )
        return Verdict("positional collapse", reason, figures)
    figures["token_rank"] = rank
    if rank < DIMENSIONAL * width:
        reason = (
            f"tokens fill {rank:.1f} of {width} directions (at least {DIMENSIONAL * width:.1f} are wanted), though "
            f"images differ; {_percent(health.within_images)} of the variation lies between patches of one image"
        )
        return Verdict("dimensional collapse", reason, figures)
    figures["cross_sample_gap"] = gap
    against = health.relative_to_position
    position = ""
    if against is not None:
        figures["relative_to_position"] = against
        position = f" and the loss is {against:.2f} of what positions alone give"
    if gap < LEARNED:
        against_mean = health.relative_to_mean
        lags = against_mean is not None and against_mean > LAGGING
        state = f"the loss is {against_mean:.1f} times that of the mean target: targets may be shrinking, and"
        reason = (
            f"{state if lags else 'targets are sound, but'} predictions fit another image's targets as well as their "
            f"own (gap {gap:.2f}; at least {LEARNED} is wanted){position}: normal in the first steps, a failure where "
            "it lasts"
        )
        return Verdict("not learned", reason, figures)
    reason = (
        f"predictions are about their own image (gap {gap:.2f}){position}; tokens differ ({_percent(health.varying)} "
        f"of their mean square, {_percent(health.of_images)} of that between images) in {rank:.0f} of {width} "
        "directions"
    )
    return Verdict("healthy", reason, figures)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
