"""A verdict on the health of a recipe: its state and the figures that decided it.

Every figure is a ratio, so no threshold depends on the scale of features, the width or the loss. docs/evaluation.md
shows runs on either side of each threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

from jepa_kit.evaluation.health.measure import NO_PATCHES, Health
from jepa_kit.evaluation.health.states import State

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
FEATURES_CONSTANT = 0.018
"""Minimum of ``feature_varying``. ViTs of width 64 on scenes, by mean or class token, untrained and in 200 steps of
InfoNCE or VICReg: 0.27 or more. The same without anything against collapse: 0.013 or less from step 50 on, 0.07 on the
way there; 96 wide without a head, 6e-6 after 40 steps. Class tokens may have a large common mean and still differ in
what matters: MSN on scenes, three seeds with probes among the best of all recipes, had 0.024 to 0.038 after 651 steps.
"""
FEATURE_DIRECTIONS = 4.0
"""Minimum of ``feature_rank``. The same runs: 16 untrained (15 to 29 for ViT-T and ViT-S), 10 or more after 200 steps
of InfoNCE, and 3 to 5 in the first steps of all runs with a class token, when it knows little but brightness."""
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

    For a recipe that predicts no patches, checks 1 and 3 are of features instead, because such a recipe trains these
    (patch tokens may differ although all class tokens are equal), and 2 and 4 are left out. Other checks are left out
    if their figures were not measured. The reason of a verdict that depends on them says so.
    """
    if not health.predicts_patches:
        return _judge_features(health)
    rank, width, varying, of_images = health.token_rank, health.width, health.varying, health.of_images
    figures = {"varying": varying}
    if varying < CONSTANT:
        return _constant("tokens", varying, CONSTANT, health, figures)
    if of_images is not None:
        figures["of_images"] = of_images
        if of_images < POSITIONAL:
            reason = (
                "tokens depend on the position of a patch and little on its image: position does not explain "
                f"{_percent(of_images)} of their variation (minimum {_percent(POSITIONAL)})"
            )
            return Verdict("positional collapse", reason, figures)
    figures["token_rank"] = rank
    if rank < DIMENSIONAL * width:
        within = health.within_images
        between = "" if within is None else f"; {_percent(within)} of the variation is between patches of one image"
        reason = (
            f"tokens fill {rank:.1f} of {width} directions (minimum {DIMENSIONAL * width:.1f}), though images differ"
            f"{between}"
        )
        return Verdict("dimensional collapse", reason, figures)
    images = "" if of_images is None else f", {_percent(of_images)} of that between images"
    tokens = f"tokens differ ({_percent(varying)} of their mean square{images}) in {rank:.0f} of {width} directions"
    if health.cross_sample_gap is None:
        return Verdict("healthy", f"{tokens}; not judged: {'; '.join(health.not_measured)}", figures)
    return _judge_predictions(health, health.cross_sample_gap, tokens, figures)


def _judge_features(health: Health) -> Verdict:
    varying, rank, width = health.feature_varying, health.feature_rank, health.width
    figures = {"feature_varying": varying}
    if varying < FEATURES_CONSTANT:
        return _constant("features", varying, FEATURES_CONSTANT, health, figures)
    figures["feature_rank"] = rank
    if rank < FEATURE_DIRECTIONS:
        reason = (
            f"features of images fill {rank:.1f} of {width} directions (minimum {FEATURE_DIRECTIONS:.1f}): normal in "
            "the first steps, a failure if it persists"
        )
        return Verdict("dimensional collapse", reason, figures)
    reason = f"features differ ({_percent(varying)} of their mean square) in {rank:.0f} of {width} directions"
    return Verdict("healthy", f"{reason}; positions and predictions are not judged: {NO_PATCHES}", figures)


def _constant(what: str, varying: float, least: float, health: Health, figures: dict[str, float]) -> Verdict:
    reason = (
        f"{what} are nearly constant: {_percent(varying)} of their mean square varies (minimum {_percent(least)}), "
        f"and the cosine between two images' features is {health.cosine:.3f}"
    )
    return Verdict("constant", reason, figures | {"cosine": health.cosine})


def _judge_predictions(health: Health, gap: float, tokens: str, figures: dict[str, float]) -> Verdict:
    figures = figures | {"cross_sample_gap": gap}
    against, against_mean = health.relative_to_position, health.relative_to_mean
    position = ""
    if against is not None:
        figures["relative_to_position"] = against
        position = f" and the loss is {against:.2f} of that of each position's mean target"
    elif health.loss_position is None and against_mean is not None:
        figures["relative_to_mean"] = against_mean
        position = f" and the loss is {against_mean:.2f} of the entropy of the codes"
    if gap < LEARNED:
        lags = against_mean is not None and against_mean > LAGGING
        state = f"the loss is {against_mean:.1f} times that of the mean target: targets may be shrinking, and"
        reason = (
            f"{state if lags else 'targets are sound, but'} predictions fit another image's targets as well as their "
            f"own (gap {gap:.2f}, minimum {LEARNED}){position}: normal in the first steps, a failure if it persists"
        )
        return Verdict("not learned", reason, figures)
    return Verdict("healthy", f"predictions depend on their image (gap {gap:.2f}){position}; {tokens}", figures)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"
