"""Grades of the reasons why a network is potentially unreliable."""

import pandas as pd
import pytest
import torch

from robsparse.collection.plausibility import mark_weak_attacks
from robsparse.eval import autoattack
from robsparse.evaluation import sanity_checks
from robsparse.figures.data.reliability import FINE, LOOK, UNRELIABLE, grade, worst

PASSED = {
    **{"examined": 100.0, "randomness": 0.0, "probabilities": 0.0, "nan_logits": 0.0},
    **{"correct": 0.9, "chance": 0.1, "zero_gradient": 0.0, "huge_eps": 0.0},
    **{"pgd_10": 0.5, "pgd_50": 0.5, "pgd_200": 0.5, "black_box_only": 0.0},
}
FAILED = [
    ({"nan_logits": 1.0}, UNRELIABLE),
    ({"randomness": 0.5}, UNRELIABLE),
    ({"probabilities": 1.0}, UNRELIABLE),
    ({"zero_gradient": 0.08}, UNRELIABLE),
    ({"huge_eps": 0.2}, UNRELIABLE),
    ({"pgd_200": 0.46}, LOOK),
    ({"pgd_200": 0.40}, UNRELIABLE),
    ({"black_box_only": 0.04}, LOOK),
    ({"black_box_only": 0.06}, UNRELIABLE),
    ({"black_box_only": 0.04, "nan_logits": 1.0}, UNRELIABLE),
]


@pytest.mark.parametrize(("changes", "wanted"), FAILED)
def test_each_failed_sanity_check_has_a_grade(changes, wanted):
    reasons = sanity_checks._reasons(PASSED | changes)
    assert len(reasons) == len(changes)
    assert grade("; ".join(reasons), 100) == wanted


def test_a_network_that_passes_every_check_is_fine():
    assert sanity_checks._reasons(PASSED) == []
    assert grade("", 100) == FINE


@pytest.mark.parametrize(("broken", "wanted"), [(2, LOOK), (10, LOOK), (11, UNRELIABLE)])
def test_images_that_only_square_breaks_are_counted(broken, wanted):
    warnings = autoattack._Warnings()
    before = torch.arange(200) < 150
    after = torch.arange(200) < 150 - broken
    warnings.check_square(before, after)
    [text] = warnings.texts()
    assert grade(text, 200) == wanted


@pytest.mark.parametrize(("excess", "wanted"), [(1, LOOK), (5, LOOK), (6, UNRELIABLE)])
def test_images_that_another_attack_breaks_are_counted(excess, wanted):
    key = {"dataset": "d", "arch": "a", "method": "m", "objective": "o", "sparsity": 0.9}
    key |= {"seed": 0, "selection": "last", "component": "all", "norm": "Linf", "eps": 0.1}
    counts = {"autoattack": 50, "pgd": 50 - excess}
    rows = [key | {"attack": name, "n_correct": n} for name, n in counts.items()]
    table = pd.DataFrame(rows).assign(version="standard", potentially_unreliable="")
    [text, _] = mark_weak_attacks(table).potentially_unreliable
    assert grade(text, 100) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # Messages of the package pyautoattack.
        ("there are 3 points with zero gradient! This might lead to", LOOK),
        ("there are 30 points with zero gradient! This might lead to", UNRELIABLE),
        ("Square Attack has decreased the robust accuracy of 1.00%. This might", LOOK),
        ("Square Attack has decreased the robust accuracy of 12.50%. This might", UNRELIABLE),
        ('it seems to be a randomized defense! Please use version="rand".', UNRELIABLE),
        ("a text that nobody knows", UNRELIABLE),
    ],
)
def test_messages_of_autoattack_have_a_grade(text, wanted):
    assert grade(text, 100) == wanted
    assert grade(f"{text}; no gradient on 9% of the images", 100) == UNRELIABLE


def test_the_worst_grade_counts():
    assert worst([]) == FINE
    assert worst([FINE, LOOK, FINE]) == LOOK
    assert worst([LOOK, UNRELIABLE, FINE]) == UNRELIABLE
