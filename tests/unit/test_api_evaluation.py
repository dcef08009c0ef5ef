"""`robsparse.evaluate` and `robsparse.read_results`."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import robsparse
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.datasets import Part
from robsparse.evaluation.runner import EvaluationError, attack_model
from robsparse.records.rows import Row, wilson_interval
from robsparse.study.planned import Attack

EPS = 0.1


@pytest.fixture(scope="module")
def known_network(known_network):
    """A copy: attacks leave gradients in a network that a function hides (`Masked`)."""
    network, part = known_network
    return copy.deepcopy(network), part


@pytest.fixture(scope="module")
def evaluated(known_network):
    network, part = known_network
    attacks = {"pgd": {"steps": 5, "restarts": 2}, "fgsm": {}}
    y = part.y_N.clone()
    y[:3] = (y[:3] + 1) % 10  # three wrong labels: the network misclassifies these images
    found = robsparse.evaluate(
        network, part.x_NCHW[:60], y[:60], eps=EPS, attacks=attacks, sanity_checks=20
    )
    return network, part.x_NCHW[:60], y[:60], found


def test_outcomes_are_those_of_the_suite(evaluated):
    network, x, y, found = evaluated
    params = registry.entry("attack", "pgd").params(steps=5, restarts=2)
    attacks = [Attack("clean", "clean", registry.entry("attack", "clean").params(), "Linf", 0.0)]
    attacks.append(Attack("pgd", "pgd", params, "Linf", EPS))
    results = attack_model(
        network, Part(x, y), attacks, seed=0, batch_size=250, device=torch.device("cpu")
    )
    for result in results:
        assert found.correct[result.attack].tolist() == result.robust["all"].tolist()
    assert found.clean_accuracy == 57 / 60


def test_rows_have_counts_and_intervals(evaluated):
    *_, found = evaluated
    table = found.accuracies.set_index("attack")
    assert [*table.index] == ["clean", "pgd", "fgsm"]
    for attack, row in table.iterrows():
        correct = int(found.correct[attack].sum())
        assert (row.n_correct, row.n_examples, row.accuracy) == (correct, 60, correct / 60)
        assert (row.ci_low, row.ci_high) == wilson_interval(correct, 60)
        assert (row.norm, row.eps) == ("Linf", 0.0 if attack == "clean" else EPS)
    assert table.max_perturbation["pgd"] == pytest.approx(EPS, abs=1e-6)
    assert 0 < table.accuracy["pgd"] <= table.accuracy["fgsm"] < 1


def test_robust_accuracy_counts_images_that_withstand_all_attacks(evaluated):
    *_, found = evaluated
    both = found.correct["pgd"] & found.correct["fgsm"] & found.correct["clean"]
    assert found.robust_accuracy == both.mean()


def test_text_has_a_line_for_each_attack(evaluated):
    *_, found = evaluated
    lines = str(found).splitlines()
    assert lines[0].startswith("clean         95.00 % [86.")
    assert lines[0].endswith("], 57 of 60 images")
    assert [line.split()[0] for line in lines[:3]] == ["clean", "pgd", "fgsm"]


def test_sanity_checks_find_masked_gradients(known_network):
    network, part = known_network

    class Masked(nn.Module):
        def forward(self, x_NCHW):
            return 1e6 * network(x_NCHW)  # the cross entropy has a gradient of 0

    found = robsparse.evaluate(
        Masked(), part.x_NCHW[:20], part.y_N[:20], eps="8/255", attacks=["fgsm"], sanity_checks=20
    )
    assert "no gradient on" in found.potentially_unreliable
    assert found.sanity_checks["examined"] == 20
    assert found.accuracies.eps.tolist() == [0.0, 8 / 255]
    assert str(found).splitlines()[-1].startswith("potentially unreliable: ")


def test_without_sanity_checks_there_are_no_numbers(known_network, capsys):
    network, part = known_network
    given = network, part.x_NCHW[:4].numpy(), part.y_N[:4].tolist()
    found = robsparse.evaluate(*given, eps=0.5, norm="L2", attacks=["fgsm"], sanity_checks=0)
    assert (found.sanity_checks, found.potentially_unreliable) == ({}, "")
    assert found.accuracies.norm.tolist() == ["L2", "L2"]
    assert capsys.readouterr().out == ""
    robsparse.evaluate(*given, eps=0.1, attacks=["fgsm"], sanity_checks=0, verbose=True)
    assert "fgsm: " in capsys.readouterr().out


X, Y = torch.rand(4, 1, 8, 8), torch.arange(4)
WRONG = {
    "eps": ({"eps": 8}, "eps = 8: .*nearest match: '8/255'"),
    "norm": ({"norm": "linf"}, "norm = .linf.: expected 'Linf' or 'L2'; nearest match: 'Linf'"),
    "attack": ({"attacks": ["pdg"]}, "unknown attack 'pdg'.*nearest match: 'pgd'"),
    "parameter": ({"attacks": {"pgd": {"step": 1}}}, "attacks.pgd.step = 1: unknown key"),
    "surrogate": (
        {"attacks": {"transfer": {"surrogate": "dense"}}},
        "attacks.transfer: attacks through another network",
    ),
    "batch": ({"batch_size": 0}, "batch_size = 0: .*greater than 0"),
    "checks": ({"sanity_checks": -1}, "sanity_checks.n_examples = -1"),
    "pixels": ({"images": 255 * X}, r"expected values in \[0,1\]"),
    "bytes": ({"images": X.byte()}, "images: expected numbers x_NCHW"),
    "one image": ({"images": X[0]}, "images: expected numbers x_NCHW"),
    "fewer labels": ({"labels": Y[:3]}, "labels: expected one class for each of the 4 images"),
    "labels": ({"labels": Y + 7}, r"test labels: expected 0\.\.9"),
    "channels": ({"images": X.repeat(1, 3, 1, 1)}, "network: fails on 2 images"),
    "logits": ({"model": nn.Identity()}, "network: 2 images give"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line(wrong, known_network):
    changed, expected = WRONG[wrong]
    given = {"model": known_network[0], "images": X, "labels": Y, "eps": 0.1} | changed
    with pytest.raises(UsageError, match=expected) as caught:
        robsparse.evaluate(**given)
    assert "\n" not in str(caught.value)


def test_network_that_fails_later_is_an_evaluation_error(known_network):
    network, part = known_network

    class Fails(nn.Module):
        def forward(self, x_NCHW):
            if len(x_NCHW) > 2:
                raise ZeroDivisionError("by design")
            return network(x_NCHW)

    with pytest.raises(EvaluationError, match="clean: ZeroDivisionError: by design"):
        robsparse.evaluate(Fails(), part.x_NCHW[:5], part.y_N[:5], eps=0.1, attacks=["fgsm"])


# ---------------------------------------------------------------- results


def test_results_of_a_study_are_its_rows(row_values, tmp_path):
    rows = [row_values | {"seed": seed, "accuracy": 0.25 * seed} for seed in range(3)]
    extra = {"other_code": "", "budget": ""}
    rows = [Row(**row).model_dump() | extra for row in rows]
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    found = robsparse.read_results(str(tmp_path))
    assert found.accuracy.tolist() == [0.0, 0.25, 0.5]
    assert found.method.tolist() == ["bcs"] * 3
    assert np.issubdtype(found.sparsity.dtype, np.floating)


@pytest.mark.parametrize("study", ["quick", "quick_all"])
def test_reference_results_of_the_repository_can_be_read(study, repository):
    found = robsparse.read_results(repository / "results" / "reference" / study)
    assert "bcs" in set(found.method)


def test_results_of_a_version_without_a_later_column_can_be_read(repository, tmp_path):
    path = repository / "results" / "reference" / "quick" / "results.csv"
    older = pd.read_csv(path).drop(columns=["training_state_bytes", "kernels"], errors="ignore")
    older.to_csv(tmp_path / "results.csv", index=False)
    found = robsparse.read_results(tmp_path)
    assert found.training_state_bytes.isna().all()
    assert set(found.kernels) == {""}


def test_study_without_results_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"results\.csv: not there; run `robsparse collect"):
        robsparse.read_results(tmp_path)
