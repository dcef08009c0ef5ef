"""The options of `robsparse evaluate` for a network without a study, in this process."""

import json

import numpy as np
import pytest
import torch

from robsparse import models
from robsparse.base import registry
from robsparse.cli.main import main


@pytest.fixture
def weights(tmp_path):
    """A file of weights of small_cnn with its default width, for digits."""
    torch.manual_seed(3)
    params = registry.entry("arch", "small_cnn").params()
    path = tmp_path / "weights.pt"
    torch.save(models.build("small_cnn", params, (1, 8, 8), 10).state_dict(), path)
    return path


@pytest.fixture
def evaluate(weights, repository, monkeypatch, capsys):
    """evaluate(*options) -> (exit code, stdout, stderr), for attacks clean and pgd."""
    monkeypatch.chdir(repository)

    def call(*words):
        base = ("--weights", weights, "--arch", "small_cnn", "--attacks", "clean,pgd")
        code = main(["evaluate", *map(str, (*base, *words))])
        return code, *capsys.readouterr()

    return call


def record(weights, threat):
    return json.loads(weights.with_name(f"weights.pt.{threat}.evaluation.json").read_text())


def test_defaults_work_for_digits_and_sanity_checks_can_be_left_out(evaluate, weights):
    code, out, err = evaluate("--dataset", "digits", "--no-sanity-checks")
    assert code == 0, err
    assert "first 400 test images, Linf eps 0.15" in out
    assert "sanity checks" not in out
    assert record(weights, "Linf-0.15")["sanity_checks"] == {}


def test_options_of_attacks_seed_and_threat_are_in_the_record_and_its_name(evaluate, weights):
    words = ("--dataset", "digits", "--n-examples", 20, "--attack-option", "pgd.steps=7")
    words += ("--attack-option", "pgd.restarts=1", "--norm", "L2")
    for further in ((), ("--eps", "0.25", "--seed", "3")):
        code, out, err = evaluate(*words, *further)
        assert code == 0, err
        assert "sanity checks on 20 images: pgd 200" in out
    seeds = set()
    for threat in ("L2-0.502", "L2-0.25"):
        [pgd] = [row for row in record(weights, threat)["rows"] if row["attack"] == "pgd"]
        assert (pgd["steps"], pgd["restarts"], pgd["norm"]) == (7, 1, "L2")
        seeds.add(pgd["attack_seed"])
    assert len(seeds) == 2


def test_a_file_with_test_images_only_is_enough(evaluate, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.random((30, 8, 8), dtype=np.float32), np.arange(30) % 9
    np.savez(tmp_path / "own.npz", test_images=images, test_labels=labels)
    words = ("--dataset", "npz", "--file", tmp_path / "own.npz", "--no-sanity-checks")
    assert "expected (9, " in evaluate(*words)[2]  # the largest label is 8
    code, out, err = evaluate(*words, "--dataset-option", "classes=10")
    assert code == 0, err
    assert "first 30 test images, Linf eps 0.031373" in out


def test_the_data_set_can_be_that_of_a_study(evaluate):
    """config/tiny.yaml has 50 test images of digits; without it, the data set has 400."""
    words = ("--dataset", "digits", "--split-of", "config/tiny.yaml", "--no-sanity-checks")
    code, out, err = evaluate(*words)
    assert code == 0, err
    assert "first 50 test images" in out


WRONG = {
    "an option of another attack": (("--attack-option", "square.queries=5"), "(clean, pgd)"),
    "an attack option without a value": (("--attack-option", "pgd.steps"), "expected KEY=VALUE"),
    "an unknown attack option": (("--attack-option", "pgd.stepps=5"), "unknown key"),
    "an unknown option of the data set": (("--dataset-option", "files=5"), "unknown key"),
    "a study without the data set": (("--split-of", "config/paper.yaml"), "no data set 'digits'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_option_is_one_line_and_writes_nothing(what, evaluate, weights):
    words, message = WRONG[what]
    code, out, err = evaluate("--dataset", "digits", *words)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert message in line
    assert list(weights.parent.iterdir()) == [weights]


def test_the_message_on_other_names_hints_at_their_order(evaluate, weights):
    state = torch.load(weights, weights_only=True)
    torch.save({f"x{i}": value for i, value in enumerate(state.values())}, weights)
    assert "try match: order (--match order)" in evaluate("--dataset", "digits")[2]
    torch.save({"x": torch.ones(2)}, weights)
    assert "is the arch the right one?" in evaluate("--dataset", "digits")[2]


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net"])
def test_state_dicts_are_found_in_the_usual_wrappers(wrapper, evaluate, weights):
    state = torch.load(weights, weights_only=True)
    torch.save({wrapper: state, "acc": 93.1, "epoch": 5}, weights)
    words = ("--dataset", "digits", "--n-examples", 4, "--no-sanity-checks")
    assert evaluate(*words)[0] == 0
