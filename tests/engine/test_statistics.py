"""Differences and their intervals, against SciPy and by the formula."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from engine.statistics import contrast

samples = st.lists(st.floats(80, 90), min_size=2, max_size=10).filter(lambda values: np.std(values) > 0.01)


@given(samples, samples)
def test_the_interval_is_scipys(first, second):
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    difference, low, high = contrast(first, second)[:3]
    assert difference == pytest.approx(np.mean(first) - np.mean(second), abs=1e-9)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert low < difference < high


def test_welch_by_the_formula():
    """With the degrees of freedom that Welch 1947 gives."""
    first, second = [86.0, 87.0, 88.5], [85.0, 86.5, 86.0]
    a, b = np.var(first, ddof=1) / 3, np.var(second, ddof=1) / 3
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    difference, low, high = contrast(first, second)[:3]
    assert difference == pytest.approx(4 / 3)
    assert (low, high) == pytest.approx((difference - half, difference + half))


def test_one_value_has_a_difference_and_no_interval_nor_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = contrast([86.0], [85.0, 84.0])
    assert found.points == 1.5
    assert np.isnan(found[1:]).all()


def test_a_contrast_of_two_is_welchs_test():
    first, second = [86.1, 86.9, 87.4, 86.2], [85.0, 85.9, 85.1, 84.2, 85.5]
    found, test = contrast(first, second), stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval()
    assert found == pytest.approx((np.mean(first) - np.mean(second), low, high, test.pvalue))


def test_a_contrast_of_four_compares_two_differences():
    """Its standard error adds the four; with equal sizes and spreads there are 4 (n - 1) degrees of freedom."""
    base = np.array([-1.0, 0.0, 0.5, 0.5])
    found = contrast(base + 5, base + 1, base + 3, base + 2, weights=(1, -1, -1, 1))
    error = (4 * base.var(ddof=1) / 4) ** 0.5
    reach = stats.t.ppf(0.975, 12) * error
    assert found == pytest.approx((3, 3 - reach, 3 + reach, 2 * stats.t.sf(3 / error, 12)))


@pytest.mark.parametrize("samples", [([1.0, 2.0], [3.0]), ([1.0, 1.0], [3.0, 3.0])])
def test_a_contrast_without_spread_has_no_interval(samples):
    found = contrast(*samples)
    assert found.points == pytest.approx(np.mean(samples[0]) - 3)
    assert np.isnan(found[1:]).all()
