"""The settings of each attack, on networks with outputs that are known by hand."""

import math
import time

import pytest
import torch
from torch import nn

from robsparse.compute import perturb
from robsparse.compute.perturb import length
from robsparse.eval import clean, fgsm, pgd, square
from robsparse.evaluation import random_search, tally
from robsparse.evaluation.attacks import AttackContext, outcome_from_distances
from robsparse.evaluation.tally import Tally

CPU = torch.device("cpu")
X = torch.tensor([[0.5, 0.5], [0.5, 0.4], [0.5, 0.1]]).view(3, 1, 1, 2)
Y = torch.tensor([1, 1, 1])


class Slope(nn.Module):
    """Logits (0, a - b + 0.05) of images (a, b): all images of X have class 1.

    The L-inf distances to class 0 are 0.025, 0.075 and 0.225.
    """

    def forward(self, x):
        a, b = x.mean(dim=(1, 2)).unbind(1)
        return torch.stack([torch.zeros_like(a), a - b + 0.05], dim=1)


def attack_context(norm="Linf", eps=0.1, batch_size=2, seed=3, **changes):
    changes = {"report": lambda text: None} | changes
    return AttackContext(norm, eps, seed, batch_size, CPU, **changes)


@pytest.fixture
def ascents(monkeypatch):
    """The arguments of every call of the ascent: (x, start, options)."""
    found, plain = [], perturb.ascend

    def ascend(model, x, start, loss, **options):
        found.append((x.clone(), start.clone(), options))
        return plain(model, x, start, loss, **options)

    monkeypatch.setattr(perturb, "ascend", ascend)
    return found


# ---------------------------------------------------------------- fgsm and pgd


@pytest.mark.parametrize(
    ("eps", "robust"), [(0.02, [1, 1, 1]), (0.05, [0, 1, 1]), (0.1, [0, 0, 1]), (0.3, [0, 0, 0])]
)
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_gradient_attacks_break_the_images_within_eps(attack, eps, robust):
    outcome = attack.run(Slope(), X, Y, attack.Params(), attack_context(eps=eps))
    assert outcome.components["all"].tolist() == [bool(r) for r in robust]
    assert outcome.max_perturbation == pytest.approx(eps, rel=1e-5)


def test_fgsm_is_one_step_of_eps_from_the_image(ascents):
    outcome = fgsm.run(Slope(), X, Y, fgsm.Params(), attack_context("L2", 0.2))
    assert [len(x) for x, _, _ in ascents] == [2, 1]
    for x, start, options in ascents:
        assert torch.equal(x, start)
        assert options == {"eps": 0.2, "step_size": 0.2, "steps": 1, "norm": "L2"}
    assert outcome.settings == {"steps": 1, "restarts": 1}
    assert fgsm.passes(fgsm.Params()) == (1, 1)


@pytest.mark.parametrize(
    ("rule", "shares"),
    [("constant", [1, 1, 1, 1]), ("cosine", [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])],
)
def test_pgd_steps_by_hand(rule, shares, ascents):
    params = pgd.Params(steps=4, restarts=1, relative_step=3.0, rule=rule)
    outcome = pgd.run(Slope(), X, Y, params, attack_context("L2", 0.2))
    options = ascents[0][2]
    assert options["step_size"] == pytest.approx([3.0 * 0.2 / 4 * share for share in shares])
    assert (options["eps"], options["steps"], options["norm"]) == (0.2, 4, "L2")
    assert outcome.settings == {"steps": 4, "restarts": 1}
    assert pgd.passes(pgd.Params(steps=4, restarts=3)) == (12, 3)


def test_pgd_defaults_are_those_of_the_authors(ascents):
    pgd.run(Slope(), X, Y, pgd.Params(), attack_context(eps=0.01))
    assert len(ascents) == 10 * 2  # restarts, batches
    assert ascents[0][2]["step_size"] == pytest.approx([2.5 * 0.01 / 50] * 50)


def test_pgd_restart_attacks_only_survivors_from_a_new_start(ascents):
    pgd.run(Slope(), X, Y, pgd.Params(steps=5, restarts=2), attack_context(eps=0.1, batch_size=3))
    assert torch.equal(ascents[0][0], X)
    assert torch.equal(ascents[1][0], X[2:])
    generator = torch.Generator().manual_seed(3)
    first = perturb.uniform_start(X, 0.1, generator)
    second = perturb.uniform_start(X, 0.1, generator)
    assert torch.equal(ascents[0][1], first)
    assert torch.equal(ascents[1][1], second[2:])


def test_pgd_starts_in_the_norm_of_the_threat(ascents):
    pgd.run(Slope(), X, Y, pgd.Params(steps=1, restarts=1), attack_context("L2", 0.1, batch_size=3))
    expected = perturb.uniform_start(X, 0.1, torch.Generator().manual_seed(3), "L2")
    assert torch.equal(ascents[0][1], expected)


def test_pgd_that_starts_at_the_image(ascents):
    params = pgd.Params(steps=1, restarts=2, start="image")
    pgd.run(Slope(), X, Y, params, attack_context(eps=0.01, batch_size=3))
    assert all(torch.equal(x, start) for x, start, _ in ascents)


def test_gradient_attacks_compute_no_gradients_of_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    for attack in (fgsm, pgd):
        attack.run(model, X, Y, attack.Params(), attack_context())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- square and clean


def test_square_searches_with_the_settings_of_autoattack(monkeypatch):
    made = []

    class Search:
        def __init__(self, model, **options):
            made.append(options)

        def perturb(self, x, y):
            assert not torch.is_grad_enabled()
            torch.rand(1)
            return x

    monkeypatch.setattr(random_search, "SquareAttack", Search)
    before = torch.get_rng_state()
    params = square.Params(queries=70, restarts=2)
    outcome = square.run(Slope(), X, Y, params, attack_context("L2", 0.3, seed=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(made) == 2  # batches
    assert made[0] == {
        "p_init": 0.8,
        "n_queries": 70,
        "eps": 0.3,
        "norm": "L2",
        "n_restarts": 2,
        "seed": 8,
        "verbose": False,
        "device": CPU,
        "resc_schedule": False,
    }
    assert outcome.components["all"].tolist() == [True, True, True]
    assert outcome.settings == {"steps": 70, "restarts": 2}
    assert square.passes(params) == (0, 140)


def test_clean_perturbs_nothing():
    outcome = clean.run(Slope(), X, torch.tensor([1, 0, 1]), clean.Params(), attack_context())
    assert outcome.components["all"].tolist() == [True, False, True]
    assert (outcome.max_perturbation, outcome.pictures) == (0.0, {})
    assert clean.passes(clean.Params()) == (0, 1)


@pytest.mark.parametrize("attack", [fgsm, pgd, square])
def test_progress_and_result_are_reported(attack):
    message = []
    params = attack.Params(queries=50) if attack is square else attack.Params()
    attack.run(Slope(), X, Y, params, attack_context(eps=0.01, report=message.append))
    if attack is not fgsm:  # one step needs no line
        assert message[-1].startswith(f"{attack.LABEL}: 3 of 3 still robust")


# ---------------------------------------------------------------- the tally


def test_tally_stores_pictures_of_the_first_broken_images(monkeypatch):
    monkeypatch.setattr(tally, "PICTURES", 2)
    found = Tally(X, Y, attack_context())
    moved = torch.tensor([[0.4, 0.6], [0.5, 0.4], [0.1, 0.9]]).view(3, 1, 1, 2)
    found.record(Slope(), slice(0, 3), moved)
    assert found.robust.tolist() == [False, True, False]
    assert list(found.pictures) == [0]
    assert torch.equal(found.pictures[0].image, moved[0])
    assert found.pictures[0].predicted == 0


def test_tally_counts_by_index_and_has_the_largest_change():
    tally = Tally(X, Y, attack_context("L2"))
    tally.record(
        Slope(), torch.tensor([2, 0]), torch.tensor([[0.5, 0.4], [0.1, 0.8]]).view(2, 1, 1, 2)
    )
    assert tally.robust.tolist() == [False, True, True]
    assert tally.largest == pytest.approx(0.5)
    tally.record(Slope(), slice(1, 2), X[1:2])
    assert tally.largest == pytest.approx(0.5)
    assert tally.robust.tolist() == [False, True, True]


def test_tally_counts_pixels_that_are_not_a_number():
    tally = Tally(X, Y, attack_context())
    bad = X.clone()
    bad[1, 0, 0, 0] = math.nan
    tally.record(Slope(), slice(0, 3), bad)
    assert tally.nans == 1
    assert tally.largest == 0.0


def test_tally_attacks_the_given_images_in_batches():
    seen = []

    def craft(x, y, index):
        seen.append((x.clone(), y.tolist(), index.tolist()))
        return x

    tally = Tally(X, torch.tensor([1, 0, 1]), attack_context(batch_size=1))
    tally.attack(Slope(), craft, torch.tensor([2, 1]))
    assert [(y, index) for _, y, index in seen] == [([1], [2]), ([0], [1])]
    assert torch.equal(seen[0][0], X[2:])
    assert tally.robust.tolist() == [True, False, True]
    tally.attack(Slope(), craft)
    assert [index for _, _, index in seen[2:]] == [[0], [1], [2]]


def test_tally_is_restored_from_its_arrays_with_its_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tally = Tally(X, Y, attack_context())
    moved = X.clone()
    moved[0] += torch.tensor([-0.125, 0.125])
    tally.record(Slope(), slice(0, 3), moved)
    now[0] = 107.0
    kept = tally.arrays()
    again = Tally(X, Y, attack_context())
    now[0] = 200.0
    again.restore(kept)
    now[0] = 203.0
    assert again.seconds() == 10.0
    assert again.robust.tolist() == [False, True, True]
    assert (again.largest, again.nans) == (0.125, 0)
    outcome = again.outcome({"steps": 2})
    assert (outcome.settings, outcome.warnings) == ({"steps": 2}, [])
    assert outcome.earlier_seconds == 7.0
    assert outcome.components["all"].tolist() == [False, True, True]
    assert outcome.pictures[0].predicted == 0
    parts = {"one": torch.ones(3, dtype=torch.bool)}
    found_again = again.outcome({}, parts, ["a warning"])
    assert (found_again.components, found_again.warnings) == (parts, ["a warning"])


def test_smallest_perturbations_are_compared_with_eps():
    lengths = torch.tensor([0.05, 0.1, 0.2, math.inf])
    outcome = outcome_from_distances(lengths, 0.1, {"steps": 4})
    assert outcome.components["all"].tolist() == [False, False, True, True]
    assert outcome.max_perturbation == pytest.approx(0.1)
    assert torch.equal(outcome.distances, lengths)
    assert outcome.settings == {"steps": 4}
    assert outcome_from_distances(torch.tensor([math.inf]), 0.1, {}).max_perturbation == 0.0


def test_lengths_by_hand():
    change = torch.tensor([[[[0.3, -0.4]]], [[[0.0, -0.1]]]])
    assert length(change, "Linf").tolist() == pytest.approx([0.4, 0.1])
    assert length(change, "L2").tolist() == pytest.approx([0.5, 0.1])
