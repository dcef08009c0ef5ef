"""Result rows: intervals, and contradictions with the outcomes of single images."""

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from robsparse.records.rows import KEY, Row, contradiction, wilson_interval

# ---------------------------------------------------------------- Wilson's interval


@pytest.mark.parametrize("n", [1, 2, 3, 10, 37, 200, 1000, 10_000])
def test_interval_equals_wilsons_formula(n):
    z = 1.959963984540054  # leaves 2.5 % of a standard normal distribution above it
    for successes in sorted({0, 1, n // 3, n // 2, (9 * n) // 10, n - 1, n}):
        share = successes / n
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
        expected = (centre - half, centre + half)
        assert wilson_interval(successes, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", range(1, 60))
def test_interval_contains_the_share_and_is_in_0_1(n):
    for successes in range(n + 1):
        low, high = wilson_interval(successes, n)
        assert 0 <= low <= successes / n <= high <= 1
        assert low < high
    assert wilson_interval(0, n)[0] == 0.0
    assert wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize("n", [*range(1, 40), 200, 1000])
def test_interval_has_the_bits_of_scipy(n):
    for successes in range(n + 1):
        interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, n) == (interval.low, interval.high)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="must be"):
        wilson_interval(successes, n)


def test_key_is_the_first_nine_fields():
    assert KEY == [
        "dataset",
        "arch",
        "method",
        "objective",
        "sparsity",
        "seed",
        "selection",
        "attack",
        "component",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 1.5),
        ("accuracy", -0.1),
        ("accuracy", float("nan")),
        ("ci_high", 1.01),
        ("n_correct", -1),
        ("n_examples", 0),
        ("eps", 8),
        ("sparsity", 1.0),
        ("sparsity_reached", 1.01),
        ("nan_count", -1),
        ("prunable", -1),
        ("max_perturbation", -1e-9),
        ("seed", 0.5),
        ("accurracy", 0.5),
    ],
)
def test_impossible_value_is_refused(name, value, row_values):
    with pytest.raises(ValidationError, match=name):
        Row(**row_values | {name: value})


def test_row_cannot_be_changed(row_values):
    row = Row(**row_values)
    with pytest.raises(ValidationError, match="frozen"):
        row.accuracy = 1.0


# ---------------------------------------------------------------- rows and outcomes


WRONG = {
    "accuracy": {"accuracy": 0.99},
    "ci_low": {"ci_low": 0.1},
    "ci_high": {"ci_high": 1.0},
    "n_correct": {
        "n_correct": 2,
        "accuracy": 0.5,
        "ci_low": wilson_interval(2, 4)[0],
        "ci_high": wilson_interval(2, 4)[1],
    },
    "n_examples": {
        "n_examples": 3,
        "n_correct": 3,
        "accuracy": 1.0,
        "ci_low": wilson_interval(3, 3)[0],
        "ci_high": 1.0,
    },
}


@pytest.mark.parametrize("column", ["", *WRONG])
def test_message_about_contradicting_outcomes_starts_with_the_column(column, row_values):
    low, high = wilson_interval(3, 4)
    right = {"accuracy": 0.75, "n_correct": 3, "n_examples": 4, "ci_low": low, "ci_high": high}
    right |= {"attack": "pgd", "component": "all"}
    row = Row(**row_values | right | WRONG.get(column, {}))
    flags = {"pgd.all": np.array([True, False, True, True]), "clean.all": np.ones(4, dtype=bool)}
    assert contradiction(row, flags).partition(" = ")[0] == column
    assert contradiction(row, {"clean.all": flags["clean.all"]}) != ""
