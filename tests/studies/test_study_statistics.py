import math

import numpy as np
import pytest
from scipy import stats

from jepa_kit.studies.statistics import compare_paired, mean_and_deviation, power, seeds_needed


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_that_of_scipys_paired_t_test(n):
    random = np.random.default_rng(n)
    base = random.normal(0.5, 0.05, n)
    values = base + random.normal(0.01, 0.02, n)
    found = compare_paired(list(values), list(base))
    theirs = stats.ttest_rel(values, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert found.mean == pytest.approx(np.mean(values - base))
    assert found.deviation == pytest.approx(np.std(values - base, ddof=1))
    assert found.seeds == n
    assert found.distinguishable == (stats.ttest_rel(values, base).pvalue < 0.05)


def test_pairs_remove_what_both_runs_of_a_seed_share():
    found = compare_paired([0.30, 0.50, 0.70], [0.29, 0.49, 0.69])
    assert found.distinguishable is True
    assert stats.ttest_ind([0.30, 0.50, 0.70], [0.29, 0.49, 0.69]).pvalue > 0.9


def test_an_interval_around_0_is_not_distinguishable():
    assert compare_paired([0.5, 0.6, 0.4], [0.5, 0.5, 0.5]).distinguishable is False


def test_one_seed_has_no_interval():
    found = compare_paired([0.6], [0.5])
    assert (found.mean, found.seeds) == (pytest.approx(0.1), 1)
    assert (found.deviation, found.low, found.high, found.seeds_needed, found.distinguishable) == (None,) * 5


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_published_tables(effect, n):
    """Sample sizes of the paired t test, two-sided 5 %, power 80 %, as G*Power gives them."""
    assert seeds_needed(1.0, effect) == n


def test_power_is_the_frequency_of_findings():
    n, draws = 6, 40_000
    differences = np.random.default_rng(0).normal(1.0, 1.0, (draws, n))
    found = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert power(n, 1.0, 1.0) == pytest.approx(found.mean(), abs=4 * math.sqrt(0.25 / draws))


def test_the_least_number_has_the_power():
    n = seeds_needed(0.037, 0.01)
    assert power(n, 0.037, 0.01) >= 0.8 > power(n - 1, 0.037, 0.01)
    assert seeds_needed(0.0, 0.01) == 2
    assert seeds_needed(1.0, 0.01) is None


def test_the_deviation_has_n_minus_1():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_deviation([1.0]) == (1.0, None)
