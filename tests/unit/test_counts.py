"""Whole numbers of weights, in exact decimals."""

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robsparse.base.counts import density, keep_count, layer_keep_count, round_to_sum

SHARES = st.integers(0, 9999).map(lambda n: n / 10_000)


@pytest.mark.parametrize(
    ("total", "sparsity", "expected"),
    [
        (1000, 0.9, 100),  # int((1 - 0.9) * 1000) is 99
        (10, 0.9, 1),
        (9, 0.9, 0),
        (100, 0.99, 1),
        (1000, 0.95, 50),
        (15_302_848, 0.9, 1_530_284),  # the target counts of FACTS 1.2
        (15_302_848, 0.99, 153_028),
        (15_302_848, 0.995, 76_514),
        (7, 0.0, 7),
        (0, 0.5, 0),
        (3, 0.5, 1),
    ],
)
def test_keep_count_by_hand(total, sparsity, expected):
    assert keep_count(total, sparsity) == expected


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [(1000, 0.9, 100), (10, 0.9, 1), (9, 0.9, 1), (5, 0.5, 3), (1, 0.99, 1), (7, 0.0, 7)],
)
def test_layer_keep_count_rounds_up_by_hand(size, sparsity, expected):
    assert layer_keep_count(size, sparsity) == expected


@pytest.mark.parametrize(("sparsity", "expected"), [(0.9, 0.1), (0.99, 0.01), (0.0, 1.0)])
def test_density_has_no_rounding_error(sparsity, expected):
    assert density(sparsity) == expected


@given(total=st.integers(0, 10**9), sparsity=SHARES)
def test_counts_are_the_exact_fraction_rounded_down_and_up(total, sparsity):
    exact = total * (1 - Fraction(str(sparsity)))
    assert keep_count(total, sparsity) == floor(exact)
    assert layer_keep_count(total, sparsity) == -floor(-exact)


@given(sparsity=SHARES)
def test_density_is_the_float_nearest_to_the_exact_difference(sparsity):
    assert density(sparsity) == float(1 - Fraction(str(sparsity)))


def test_round_to_sum_gives_the_missing_ones_to_the_largest_remainders():
    wanted = {"a": 1.2, "b": 2.7, "c": 3.1}
    assert round_to_sum(wanted, dict.fromkeys(wanted, 9), 7) == {"a": 1, "b": 3, "c": 3}
    assert round_to_sum(wanted, dict.fromkeys(wanted, 9), 8) == {"a": 2, "b": 3, "c": 3}


def test_round_to_sum_passes_over_what_is_full():
    wanted = {"a": 1.2, "b": 2.7}
    assert round_to_sum(wanted, {"a": 5, "b": 2}, 4) == {"a": 2, "b": 2}
    assert round_to_sum({"a": 9.0, "b": 1.0}, {"a": 3, "b": 8}, 10) == {"a": 3, "b": 7}


@st.composite
def shares_with_room(draw):
    caps = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    weights = [draw(st.floats(0.01, 1)) for _ in caps]
    total = draw(st.integers(0, sum(caps)))
    names = [str(i) for i in range(len(caps))]
    wanted = [total * weight / sum(weights) for weight in weights]
    return dict(zip(names, wanted, strict=True)), dict(zip(names, caps, strict=True)), total


@given(shares_with_room())
def test_round_to_sum_reaches_the_total_within_the_caps(case):
    wanted, caps, total = case
    counts = round_to_sum(wanted, caps, total)
    assert list(counts) == list(wanted)
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert 0 <= count <= caps[name]
        assert count >= min(int(wanted[name]), caps[name])


@given(shares_with_room())
def test_round_to_sum_moves_nothing_by_one_or_more_when_no_cap_binds(case):
    wanted, caps, total = case
    counts = round_to_sum(wanted, dict.fromkeys(caps, 10_000), total)
    assert all(abs(counts[name] - wanted[name]) < 1 + 1e-9 for name in wanted)
