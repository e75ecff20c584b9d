"""Statistics against what is known: scipy's exact tests, published values, and simulated truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from chiplog.compare import holm, paired, proportion


@pytest.mark.parametrize(("count", "n"), [(0, 100), (1, 7), (71, 100), (100, 100)])
def test_the_interval_of_one_arm_is_the_exact_binomial_one(count: int, n: int):
    exact = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    found = proportion(count, n)
    assert found.value == count / n
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_no_items_say_nothing():
    found = proportion(0, 0)
    assert (found.low, found.high) == (0.0, 1.0)


def test_two_single_trainings_are_compared_by_mcnemars_exact_test():
    first = [True] * 9 + [False] * 2 + [True] * 30
    second = [False] * 9 + [True] * 2 + [True] * 30
    found = paired([first], [second])
    assert found.p == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert found.interval.value == pytest.approx(7 / 41)
    # Bonett and Price (2012): with p = (f + 1) / (n + 2), p12 - p21 +- z sqrt((p12 + p21 - (p12 - p21)^2) / (n + 2))
    p12, p21, m = 10 / 43, 3 / 43, 43
    half = 1.959964 * ((p12 + p21 - (p12 - p21) ** 2) / m) ** 0.5
    assert (found.interval.low, found.interval.high) == pytest.approx((7 / m - half, 7 / m + half), abs=1e-6)


def test_equal_arms_have_p_one_and_an_interval_around_zero():
    found = paired([[True, False, True]], [[True, False, True]])
    assert found.p == 1.0 and found.interval.low < 0 < found.interval.high


def test_a_difference_that_only_one_seed_shows_is_not_shown():
    good, bad = [True] * 90 + [False] * 10, [False] * 90 + [True] * 10
    one_seed = paired([good], [bad])
    assert one_seed.p < 1e-6
    seeds_disagree = paired([good, bad], [bad, good])
    assert seeds_disagree.p == 1.0 and seeds_disagree.interval.low < -0.5 < 0.5 < seeds_disagree.interval.high


def test_seeds_that_agree_show_a_difference_against_a_single_control():
    rng = np.random.default_rng(0)
    arm = [list(rng.random(100) < share) for share in (0.70, 0.75, 0.72)]
    found = paired(arm, [[False] * 100], against_control=True)
    assert found.seeds == 3 and found.p < 0.01 and found.interval.low > 0.5


def test_seeds_of_two_arms_are_compared_by_welchs_t_if_that_is_the_larger_doubt():
    items = 400
    one, other = ([[i < count for i in range(items)] for count in counts] for counts in ((300, 330, 345), (250, 280)))
    found = paired(one, other)
    welch: Any = stats.ttest_ind([300 / 400, 330 / 400, 345 / 400], [250 / 400, 280 / 400], equal_var=False)
    ends = welch.confidence_interval()
    assert (found.seeds, found.p) == (3, pytest.approx(welch.pvalue))
    assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high))


@pytest.mark.parametrize("swapped", [False, True])
def test_an_arm_with_one_training_left_is_taken_to_vary_as_the_other(swapped: bool):
    one, other = [[i < count for i in range(400)] for count in (300, 330, 345)], [[i < 250 for i in range(400)]]
    found = paired(other, one) if swapped else paired(one, other)
    pooled: Any = stats.ttest_ind([300 / 400, 330 / 400, 345 / 400], [250 / 400], equal_var=True)
    assert found.p == pytest.approx(pooled.pvalue) and found.p > 0.05
    ends = pooled.confidence_interval()
    assert found.interval.high - found.interval.low == pytest.approx(ends.high - ends.low)
    assert paired(one, other, against_control=True).p < 0.05


def test_holm_adjusts_as_published():
    # Holm (1979) by hand: 0.01 * 4, 0.02 * 3, then never smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_equal_arms_are_rarely_called_different_and_the_interval_covers_zero():
    rng = np.random.default_rng(1)
    found = [paired([list(rng.random(60) < 0.6)], [list(rng.random(60) < 0.6)]) for _ in range(400)]
    assert np.mean([one.p < 0.05 for one in found]) <= 0.06
    assert np.mean([one.interval.low <= 0 <= one.interval.high for one in found]) >= 0.93
