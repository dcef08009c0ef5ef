"""Intervals and p-values: by hand, compared with scipy, by simulation; they never contradict."""

import math
import statistics as by_hand

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import binomtest, norm, t, ttest_1samp, ttest_rel

from robsparse.figures.data import statistics
from robsparse.figures.data.statistics import Difference

TABLE = np.array([[1, 1, 0], [1, 0, 0]])
OUTCOMES = arrays.arrays(bool, st.tuples(st.just(2), st.integers(1, 6), st.integers(1, 30)))


@pytest.fixture(scope="module")
def simulation(load_benchmark):
    """benchmarks/statistics_simulation.py"""
    return load_benchmark("statistics_simulation")


# ------------------------------------------------------------------ by hand


def test_spread_is_the_sample_standard_deviation():
    mean, spread = statistics.mean_and_spread([0.2, 0.4, 0.9])
    assert mean == pytest.approx(0.5)
    assert spread == pytest.approx(by_hand.stdev([0.2, 0.4, 0.9]))
    assert np.isnan(statistics.mean_and_spread([0.2])[1])
    assert np.isnan(statistics.mean_and_spread([])[0])


def test_variances_of_two_seeds_and_three_images_by_hand():
    # Means of seeds 2/3 and 1/3: variance 1/18. Mean squares: images 2 (1/4 + 0 + 1/4) / 2 = 1/2,
    # rest (six squares that add up to 1/3) / 2 = 1/6.
    of_seeds, of_images = statistics.variances(TABLE)
    assert of_seeds == pytest.approx(1 / 18 / 2)
    assert of_images == pytest.approx((1 / 2 - 1 / 6) / 6)


def test_variances_of_one_seed_are_only_of_images():
    of_seeds, of_images = statistics.variances(np.array([[1, 0, 0, 1]]))
    assert math.isnan(of_seeds)
    assert of_images == pytest.approx(1 / 3 / 4)
    with pytest.raises(ValueError, match="shape"):
        statistics.variances(np.zeros((0, 4)))


def test_variances_equal_those_of_the_analysis_of_variance():
    """Compare with plain loops over a random table."""
    values = np.random.default_rng(0).integers(-1, 2, size=(4, 7)).astype(float)
    mean = sum(values.ravel()) / 28
    rows = [sum(row) / 7 for row in values]
    columns = [sum(column) / 4 for column in values.T]
    of_rows = sum(7 * (row - mean) ** 2 for row in rows) / 3
    of_columns = sum(4 * (column - mean) ** 2 for column in columns) / 6
    rest = sum(
        (values[s, i] - rows[s] - columns[i] + mean) ** 2 for s in range(4) for i in range(7)
    )
    wanted = of_rows / 28, max(of_columns - rest / 18, 0) / 28
    assert statistics.variances(values) == pytest.approx(wanted)


def test_an_interval_combines_both_variances_by_howes_rule():
    apart = Difference(0.1, seeds=3, images=11, of_seeds=0.0004, of_images=0.0009)
    half = math.sqrt(t.ppf(0.975, 2) ** 2 * 0.0004 + t.ppf(0.975, 10) ** 2 * 0.0009)
    assert apart.interval() == pytest.approx((0.1 - half, 0.1 + half))
    narrow = math.sqrt(t.ppf(0.95, 2) ** 2 * 0.0004 + t.ppf(0.95, 10) ** 2 * 0.0009)
    assert apart.interval(0.9) == pytest.approx((0.1 - narrow, 0.1 + narrow))
    found = math.sqrt(
        (t.ppf(0.975, 2) + t.ppf(0.8, 2)) ** 2 * 0.0004
        + (t.ppf(0.975, 10) + t.ppf(0.8, 10)) ** 2 * 0.0009
    )
    assert apart.detectable == pytest.approx(found)


def test_without_variance_of_images_p_is_that_of_the_t_test_of_seeds():
    ours, theirs = np.array([0.61, 0.57, 0.7, 0.66]), np.array([0.55, 0.56, 0.6, 0.67])
    apart = ours - theirs
    own = Difference(apart.mean(), 4, 100, apart.var(ddof=1) / 4, 0.0)
    assert own.p == pytest.approx(ttest_rel(ours, theirs).pvalue, rel=1e-6)
    wanted = ttest_1samp(apart, 0).confidence_interval(0.95)
    assert own.interval() == pytest.approx(tuple(wanted))


def test_without_variance_of_seeds_p_is_that_of_the_t_test_of_images():
    apart = np.random.default_rng(1).integers(-1, 2, size=50)
    seeds = np.repeat(apart[None], 3, axis=0)
    found = statistics.difference(seeds > 0, seeds < 0)
    assert found.of_seeds == 0
    assert found.p == pytest.approx(ttest_1samp(apart, 0).pvalue, rel=1e-6)


def test_difference_pairs_images():
    ours = np.array([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]], dtype=bool)
    theirs = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]], dtype=bool)
    found = statistics.difference(ours, theirs)
    assert found.mean == pytest.approx(1 / 6)
    assert found.of_seeds == 0  # one image better with each seed, the same one
    assert statistics.difference(theirs, ours).mean == pytest.approx(-1 / 6)
    assert statistics.difference(theirs, ours).p == pytest.approx(found.p)
    with pytest.raises(ValueError, match="equal shapes"):
        statistics.difference(ours, theirs[:1])


def test_the_variance_of_few_images_is_never_zero():
    same = np.ones((2, 40), dtype=bool)
    equal = statistics.difference(same, same)
    assert (equal.mean, equal.p) == (0, 1)
    half = t.ppf(0.975, 39) / 40
    assert equal.interval() == pytest.approx((-half, half))
    # Each seed loses another image: the estimated variance of images is negative.
    ours = same.copy()
    ours[0, 0] = ours[1, 1] = False
    assert statistics.variances(ours.astype(int) - same)[1] < 1e-4
    assert statistics.difference(ours, same).of_images == pytest.approx(1 / 40**2)
    # All outcomes differ: the uncertainty is that of one image.
    assert statistics.difference(same, ~same).interval() == pytest.approx((1 - half, 1))


def test_variance_of_images_is_at_least_that_of_independent_outcomes():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((2, 3, 500)) < 0.5
    apart = ours.astype(int) - theirs
    floor = apart.var() / apart.size
    assert statistics.variances(apart)[1] < floor
    assert statistics.difference(ours, theirs).of_images == pytest.approx(floor)


def test_one_seed_has_an_interval_over_images_and_no_p_value():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((2, 1, 300)) < np.array([0.9, 0.2])[:, None, None]
    found = statistics.difference(ours, theirs)
    apart = ours[0].astype(int) - theirs[0]
    wanted = ttest_1samp(apart, 0).confidence_interval(0.95)
    assert found.interval() == pytest.approx(tuple(wanted))
    assert math.isnan(found.p)
    assert math.isnan(found.detectable)


def test_a_p_value_is_never_zero():
    assert Difference(1.0, 500, 500, 1e-9, 1e-9).p == 1e-15


# ------------------------------------------------------------------ accuracies


def wilson_interval(successes, n, z):
    """Wilson's interval with a given quantile z."""
    return tuple(binomtest(successes, n).proportion_ci(1 - 2 * norm.sf(z), method="wilson"))


@pytest.mark.parametrize("count", [0, 1, 60, 200])
def test_interval_of_agreeing_seeds_is_wilsons_interval_over_images(count):
    outcomes = np.repeat((np.arange(200) < count)[None], 3, axis=0)
    wanted = wilson_interval(count, 200, z=t.ppf(0.975, 199))
    for seeds in (1, 3):
        # The variance of images has the denominator N - 1; the effective number is at most N.
        assert statistics.accuracy_interval(outcomes[:seeds]) == pytest.approx(wanted, abs=1e-12)


def test_interval_of_independent_seeds_uses_all_outcomes():
    rng = np.random.default_rng(3)
    outcomes = rng.random((2, 4000)) < 0.4
    assert statistics.variances(outcomes)[1] < 0.24 / 8000
    low, high = wilson_interval(int(outcomes.sum()), 8000, z=t.ppf(0.975, 3999))
    of_seeds = t.ppf(0.975, 1) ** 2 * statistics.variances(outcomes)[0]
    mean = outcomes.mean()
    wanted = (
        mean - math.sqrt((mean - low) ** 2 + of_seeds),
        mean + math.sqrt((high - mean) ** 2 + of_seeds),
    )
    assert statistics.accuracy_interval(outcomes) == pytest.approx(wanted)


def test_interval_of_very_different_seeds_is_almost_0_to_1():
    outcomes = np.stack([np.ones(500), np.zeros(500)])
    assert statistics.accuracy_interval(outcomes) == (0.0, 1.0)


def test_a_higher_level_gives_a_wider_interval():
    outcomes = np.random.default_rng(1).random((4, 60)) < 0.5
    low, high = statistics.accuracy_interval(outcomes, level=0.99)
    inner = statistics.accuracy_interval(outcomes)
    assert low < inner[0] < inner[1] < high


# ------------------------------------------------------------------ properties


@given(OUTCOMES)
def test_p_value_is_below_the_level_only_if_the_interval_excludes_zero(pair):
    found = statistics.difference(*pair)
    low, high = found.interval()
    assert -1 <= low <= found.mean <= high <= 1
    assert low < high
    if found.seeds > 1:
        assert (low <= 0 <= high) == (found.p >= 0.05)
        assert 0 < found.p <= 1


@given(OUTCOMES, st.sampled_from([0.5, 0.8, 0.99]))
def test_p_value_and_interval_agree_at_every_level(pair, level):
    found = statistics.difference(*pair)
    low, high = found.interval(level)
    if found.seeds > 1 and abs(found.p - (1 - level)) > 1e-9:
        assert (low <= 0 <= high) == (found.p > 1 - level)


@given(OUTCOMES)
def test_interval_of_an_accuracy_contains_it_and_has_a_positive_width(pair):
    low, high = statistics.accuracy_interval(pair[0])
    assert 0 <= low <= pair[0].mean() + 1e-12
    assert pair[0].mean() - 1e-12 <= high <= 1
    assert low < high


@given(OUTCOMES)
def test_the_order_of_seeds_and_images_does_not_matter(pair):
    one = statistics.difference(*pair)
    other = statistics.difference(*pair[:, ::-1, ::-1])
    assert other.interval() == pytest.approx(one.interval())


# ------------------------------------------------------------------ simulated


@pytest.mark.parametrize("kind", ["none", "large"])
def test_rates_of_tests_and_intervals_are_the_nominal_ones(simulation, kind):
    """Within three standard errors. The older test, which treats seeds as fixed, does not pass."""
    found = simulation.simulate(300, kinds=(kind,), seeds=(2, 5), images=(200,), usual=(0.6, 0.9))
    error = 3 * math.sqrt(0.05 * 0.95 / 300)
    assert (found["size"] <= 0.05 + error).all()
    assert (found.accuracy >= 0.95 - error).all()
    assert (found.difference >= 0.95 - error).all()
    if kind == "large":
        assert (found.size_mcnemar > 0.2).all()
        assert found.accuracy_bootstrap.mean() < 0.93


def test_more_seeds_detect_more_differences(simulation):
    found = simulation.simulate(60, kinds=("small",), seeds=(2, 10), images=(200,), usual=(0.6,))
    assert found.power.tolist()[0] + 0.3 < found.power.tolist()[1]
    assert found.width.tolist()[0] > 2 * found.width.tolist()[1]
    assert "| small" in simulation.in_words(found)


# ------------------------------------------------------------------ multiple tests


def test_holm_equals_values_computed_by_hand():
    nan = float("nan")
    assert statistics.holm([0.01, nan, 0.04, 0.03]) == pytest.approx(
        [0.03, nan, 0.06, 0.06], nan_ok=True
    )
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
