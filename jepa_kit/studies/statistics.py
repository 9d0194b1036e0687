"""Paired comparisons over seeds: differences, intervals, and the number of seeds that would be needed.

n  seeds that both arms have    d_1, ..., d_n  differences, arm minus base, of runs with one seed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 10_000
"""A larger number of seeds is not computed."""


@dataclass(frozen=True)
class Comparison:
    """An arm against the base arm, in the unit of the given values.

    Args:
        seeds: n.
        mean: of the differences.
        deviation: standard deviation of the differences (with n - 1); None for one seed.
        low, high: interval of the mean, which is the paired t test's; None for one seed.
        seeds_needed: seeds with which a difference of one point would be found; None if it is not known, or above
            ``MOST_SEEDS``.
    """

    seeds: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    seeds_needed: int | None

    @property
    def distinguishable(self) -> bool | None:
        """Return whether the interval leaves 0 out; None if there is no interval."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


def compare_paired(values: Sequence[float], base: Sequence[float], *, point: float = 0.01) -> Comparison:
    """Return the comparison of an arm's values with those of the base arm at the same seeds.

    The interval is that of ``scipy.stats.ttest_rel(values, base).confidence_interval(0.95)``:
    mean ± t * deviation / sqrt(n), with t the 97.5 % quantile of Student's t with n - 1 degrees of freedom.

    Args:
        values, base: in the order of the seeds, at least one.
        point: the difference for ``seeds_needed``.
    """
    differences = np.asarray(values, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Comparison(n, mean, None, None, None, None)
    deviation = float(differences.std(ddof=1))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * deviation / math.sqrt(n)
    return Comparison(n, mean, deviation, mean - half, mean + half, seeds_needed(deviation, point))


def seeds_needed(deviation: float, difference: float) -> int | None:
    """Return the least number of seeds with which a paired t test finds a difference with probability ``POWER``.

    The test is two-sided at level 1 - ``CONFIDENCE``. Its statistic over n seeds has the noncentral t distribution with
    n - 1 degrees of freedom and noncentrality sqrt(n) * difference / deviation (Cohen 1988, Statistical Power Analysis
    for the Behavioral Sciences, chapter 2). The deviation is an estimate: from three seeds, the true one is between
    half of it and six times it, with 95 % confidence (chi-squared, 2 degrees of freedom).

    Args:
        deviation: of the differences between two arms with one seed.
        difference: to be found, above 0.

    Returns:
        at least 2; None if more than ``MOST_SEEDS`` are needed.
    """
    if power(2, deviation, difference) >= POWER:
        return 2
    low, high = 2, 4
    while power(high, deviation, difference) < POWER:
        if high > MOST_SEEDS:
            return None
        low, high = high, 2 * high
    while high - low > 1:  # the power of ``low`` is too small, that of ``high`` is enough
        middle = (low + high) // 2
        low, high = (middle, high) if power(middle, deviation, difference) < POWER else (low, middle)
    return high if high <= MOST_SEEDS else None


def power(n: int, deviation: float, difference: float) -> float:
    """Return the probability that a paired t test over n seeds finds a difference; see ``seeds_needed``."""
    if deviation == 0:
        return 1.0
    critical = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    shift = math.sqrt(n) * difference / deviation
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation (with n - 1), which is None for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
