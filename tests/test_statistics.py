"""Intervals and tests against textbook data, scipy, and Holm's procedure written out as a closed test."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdstudy.statistics import holm, mean_interval, paired_difference

# hours of extra sleep under two drugs, Student, "The probable error of a mean", Biometrika 1908
SLEEP_A = pd.Series([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP_B = pd.Series([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def test_interval_of_the_sleep_data():
    interval = mean_interval(SLEEP_B - SLEEP_A)
    assert interval.n == 10
    # as R's t.test prints them
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_interval_equals_scipy(level):
    values = [91.2, 92.0, 91.7, 90.9, 92.4]
    expected = stats.t.interval(level, df=4, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(values, level)[1:3] == pytest.approx(expected, rel=1e-12)


def test_interval_needs_two_values_for_limits_and_one_for_a_mean():
    assert mean_interval([93.5])[::3] == (93.5, 1)
    assert np.isnan(mean_interval([93.5])[1:3]).all()
    assert mean_interval([]).n == 0
    assert np.isnan(mean_interval([])[:3]).all()
    assert mean_interval([94.0, 94.0, 94.0]) == (94.0, 94.0, 94.0, 3)


def test_interval_leaves_out_runs_without_a_result():
    assert mean_interval([91.0, np.nan, 92.0]) == mean_interval([91.0, 92.0])
    assert mean_interval([np.nan]).n == 0


@pytest.mark.parametrize("level", [0, 1, 95])
def test_interval_refuses_a_level_that_is_no_probability(level):
    with pytest.raises(ValueError, match=f"level must lie between 0 and 1, not {level}"):
        mean_interval([1.0, 2.0], level)


def test_paired_difference_of_the_sleep_data():
    interval, p_value = paired_difference(SLEEP_A, SLEEP_B)
    assert interval == pytest.approx((-1.58, -2.4598858, -0.7001142, 10), abs=1e-7)
    assert p_value == pytest.approx(0.002833, abs=5e-7)
    assert p_value == pytest.approx(stats.ttest_rel(SLEEP_A, SLEEP_B).pvalue, rel=1e-12)


def test_paired_difference_matches_seeds_not_positions():
    a = pd.Series({0: 91.0, 1: 92.0, 2: 93.5, 7: 50.0})
    b = pd.Series({2: 93.0, 9: 10.0, 1: 91.0, 0: 90.9})
    interval, p_value = paired_difference(a, b)
    assert interval.n == 3
    assert interval.mean == pytest.approx((0.1 + 1.0 + 0.5) / 3)
    assert p_value == pytest.approx(stats.ttest_1samp([0.1, 1.0, 0.5], 0).pvalue)


def test_paired_difference_drops_a_pair_with_a_diverged_run():
    a = pd.Series({0: 91.0, 1: np.nan, 2: 93.0})
    b = pd.Series({0: 90.0, 1: 90.0, 2: 90.0})
    interval, _ = paired_difference(a, b)
    assert (interval.mean, interval.n) == (2.0, 2)


@pytest.mark.parametrize("seeds", [[], [3]])
def test_paired_difference_has_no_p_value_below_two_pairs(seeds):
    a = pd.Series(92.0, index=seeds, dtype=object)
    interval, p_value = paired_difference(a, a - 1)
    assert interval.n == len(seeds)
    assert np.isnan([interval.low, interval.high, p_value]).all()


def test_equal_runs_are_no_evidence():
    a = pd.Series([91.3, 92.1, 90.7])
    assert paired_difference(a, a) == ((0.0, 0.0, 0.0, 3), 1.0)


def test_a_constant_difference_has_no_t_test():
    b = pd.Series([91.31, 63.95, 31.95])
    a = (b + 0.1).round(2)
    assert len(set(a - b)) > 1  # in binary, the three tenths are not the same number
    interval, p_value = paired_difference(a, b)
    assert interval.mean == pytest.approx(0.1)
    assert np.isnan(p_value)


def test_paired_difference_refuses_a_seed_twice():
    twice = pd.Series([91.0, 92.0], index=[4, 4])
    with pytest.raises(ValueError, match="a seed must occur once, not 4 twice"):
        paired_difference(pd.Series([91.0], index=[4]), twice)


def test_holm_of_a_worked_example():
    # 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 raised to its predecessor
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])


def test_holm_passes_nan_through_without_counting_it():
    adjusted = holm(pd.Series([np.nan, 0.02, np.nan, 0.01]))
    assert np.isnan(adjusted[[0, 2]]).all()
    assert adjusted[[1, 3]] == pytest.approx([0.02, 0.02])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_bonferroni_test(p_values):
    everyone = range(len(p_values))
    subsets = [subset for size in range(1, len(p_values) + 1) for subset in combinations(everyone, size)]
    bonferroni = {subset: min(1.0, len(subset) * min(p_values[i] for i in subset)) for subset in subsets}
    expected = [max(p for subset, p in bonferroni.items() if i in subset) for i in everyone]
    assert holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize("p_value", [-0.1, 1.5])
def test_holm_refuses_what_is_no_probability(p_value):
    with pytest.raises(ValueError, match=f"a p value must lie in 0 to 1, not {p_value}"):
        holm([0.5, p_value])
